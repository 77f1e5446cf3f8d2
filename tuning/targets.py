"""Which layers of a model an adapter touches: placements, and PEFT's rules for naming layers.

Pure over module names and types; `adapter` and `adapter_format` call it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from orchestrator.errors import AdapterError
from orchestrator.messages import Placement

DUMMY_TARGET = "dummy-target-modules"  # PEFT's own word for an adapter that only saves whole modules
OUT_PROJ_TIMES = 2.0  # PEFT 0.21.2 adds an attention's out-projection delta twice (decision 0007)


@dataclass(frozen=True)
class Targets:
    """Layer names of one placement.

    Attributes:
        lora: convolutions, linear layers and attention that get a low-rank delta.
        saved: modules saved whole (`modules_to_save`).
        trained: those of `saved` whose parameters are trained; statistics are recomputed, not trained.
    """

    lora: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoraWeight:
    """One weight that takes a low-rank delta.

    Attributes:
        key: PEFT's name of the layer that holds the delta.
        path: the weight's own name in the model.
        times: how often PEFT adds the delta.
    """

    key: str
    path: str
    times: float = 1.0


def is_norm(module: nn.Module) -> bool:
    """True for a normalisation layer that has scale and shift, running statistics, or both."""
    kinds = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    return isinstance(module, kinds) and bool(module.state_dict())


def has_statistics(module: nn.Module) -> bool:
    """True for a normalisation layer with running statistics."""
    return isinstance(module, _NormBase) and module.running_mean is not None


def accepts_lora(module: nn.Module) -> bool:
    """True for a linear layer, a plain 2-D convolution (one group, no dilation, zero padding), or attention.

    Attention is `torch.nn.MultiheadAttention` with q, k and v packed in one weight. Its out-projection is no target of
    its own: the attention reads that weight without calling the layer, and PEFT would lose the delta.
    """
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
    if isinstance(module, nn.MultiheadAttention):
        return bool(module._qkv_same_embed_dim)
    return isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)


def lora_weights(name: str, module: nn.Module) -> tuple[LoraWeight, ...]:
    """Weights that get a delta when the layer `name` is a target: one, or attention's two projections."""
    if isinstance(module, nn.MultiheadAttention):
        out = LoraWeight(f"{name}.base_layer.out_proj", f"{name}.out_proj.weight", OUT_PROJ_TIMES)
        return LoraWeight(name, f"{name}.in_proj_weight"), out
    return (LoraWeight(name, f"{name}.weight"),)


def attention_around(module: nn.Module, name: str) -> str | None:
    """Name of the attention that the layer `name` lies in; None if in none."""
    parts = name.split(".")
    parents = [".".join(parts[:i]) for i in range(1, len(parts))]
    around = (p for p in parents if isinstance(module.get_submodule(p), nn.MultiheadAttention))
    return next(around, None)


def plan_targets(module: nn.Module, placement: Placement) -> Targets:
    """Layers that a placement touches.

    Attention counts as one layer. One with separate q, k and v weights (`kdim`, `vdim`) is left out: PEFT's format
    does not know it.

    Args:
        module: the base model.
        placement: see `messages.Placement`.

    Raises:
        AdapterError: the model has no layer for this placement; the message says which kind it lacks.
    """
    names = dict(module.named_modules())
    norms = tuple(name for name, m in names.items() if is_norm(m))
    if placement in (Placement.HEAD, Placement.LOGIT_CORRECTION):
        head = _head(module, with_bias=placement is Placement.LOGIT_CORRECTION)
        trained = (head,) if placement is Placement.HEAD else ()
        return Targets((), saved_by_peft(module, (head,)), trained)
    if placement is Placement.NORM_STATISTICS:
        norms = tuple(name for name in norms if has_statistics(names[name]))
    if placement in (Placement.NORM, Placement.NORM_STATISTICS):
        if not norms:
            raise AdapterError(f"placement {placement} needs normalisation layers; the model has none that fit")
        return Targets((), saved_by_peft(module, norms), norms if placement is Placement.NORM else ())
    layers = tuple(n for n, m in names.items() if n and accepts_lora(m) and not attention_around(module, n))
    if not layers:
        kinds = "linear layers, plain convolutions or attention with q, k and v in one weight"
        raise AdapterError(f"placement {placement} needs {kinds}; the model has none")
    chosen = layers if placement is Placement.ALL else layers[: math.ceil(len(layers) / 3)]
    saved = saved_by_peft(module, norms)
    lora = tuple(name for name in chosen if not excluded_by_peft(name, saved))
    return Targets(lora, saved, norms)


def _head(module: nn.Module, with_bias: bool) -> str:
    linear = [name for name, m in module.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise AdapterError("placement head needs a linear layer; the model has none")
    if with_bias and module.get_submodule(linear[-1]).bias is None:
        raise AdapterError(f"placement logit_correction needs a bias in the last linear layer; {linear[-1]} has none")
    return str(linear[-1])


def saved_by_peft(module: nn.Module, wanted: Sequence[str]) -> tuple[str, ...]:
    """Modules that PEFT saves whole for `modules_to_save=wanted`: it matches by the end of the name.

    A layer swept in by a short name (`1` sweeps in `11`) is saved too, unchanged, so that PEFT finds its tensors.
    """
    swept = [
        name
        for name, m in module.named_modules()
        if name
        and any(name.endswith(w) for w in wanted)
        and m.state_dict()
        and (name in wanted or not any(m.children()))
    ]
    return tuple(swept)


def excluded_by_peft(name: str, saved: Sequence[str]) -> bool:
    """PEFT's rule: a module that is saved whole, or lies in one, takes no LoRA."""
    return any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in saved)


def matched_by_peft(module: nn.Module, target_modules: Sequence[str] | str | None, saved: Sequence[str]) -> set[str]:
    """Names that PEFT targets for a config's `target_modules`: a regular expression, or name endings."""
    if not target_modules or target_modules == DUMMY_TARGET:
        return set()
    matched = set()
    for name, _ in module.named_modules():
        if not name or excluded_by_peft(name, saved):
            continue
        if isinstance(target_modules, str):
            hit = re.fullmatch(target_modules, name) is not None
        else:
            hit = any(name == t or name.endswith(f".{t}") for t in target_modules)
        if hit:
            matched.add(name)
    return matched


def peft_names(module: nn.Module, targets: Targets) -> list[str] | str:
    """`target_modules` that PEFT resolves to exactly `targets.lora`.

    Names where they are unambiguous; a regular expression where a name is the ending of another layer's (`conv1` and
    `layer1.0.conv1`); PEFT's dummy where there is no LoRA at all.
    """
    if not targets.lora:
        return DUMMY_TARGET
    if matched_by_peft(module, targets.lora, targets.saved) == set(targets.lora):
        return sorted(targets.lora)
    return "|".join(re.escape(name) for name in targets.lora)
