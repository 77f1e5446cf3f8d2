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

from orchestrator.errors import AdapterError
from orchestrator.messages import Placement

DUMMY_TARGET = "dummy-target-modules"  # PEFT's own word for an adapter that only saves whole modules


@dataclass(frozen=True)
class Targets:
    """Layer names of one placement.

    Attributes:
        lora: convolutions and linear layers that get a low-rank delta.
        saved: modules saved whole (`modules_to_save`).
        trained: those of `saved` whose parameters are trained; statistics are recomputed, not trained.
    """

    lora: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()


def is_norm(module: nn.Module) -> bool:
    """True for a normalisation layer that has scale and shift, running statistics, or both."""
    kinds = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    return isinstance(module, kinds) and bool(module.state_dict())


def has_statistics(module: nn.Module) -> bool:
    """True for a normalisation layer with running statistics."""
    return isinstance(module, _NormBase) and module.running_mean is not None


def accepts_lora(module: nn.Module) -> bool:
    """True for a linear layer or a plain 2-D convolution (one group, no dilation, zero padding)."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
    # MultiheadAttention reads its output projection's weight without calling the layer; PEFT would miss the delta.
    return isinstance(module, nn.Linear) and type(module).__name__ != "NonDynamicallyQuantizableLinear"


def plan_targets(module: nn.Module, placement: Placement) -> Targets:
    """Layers that a placement touches.

    Args:
        module: the base model.
        placement: see `messages.Placement`.

    Raises:
        AdapterError: the model has no layer for this placement; the message says which kind it lacks.
    """
    names = dict(module.named_modules())
    norms = tuple(name for name, m in names.items() if is_norm(m))
    layers = tuple(name for name, m in names.items() if accepts_lora(m))
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
    if not layers:
        raise AdapterError(f"placement {placement} needs linear layers or plain convolutions; the model has none")
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
