"""Reads PEFT's on-disk adapters: checks one against a base, and merges it into a twin of the base.

Called by replicas before a swap and by the gate. Supported: LoRA on Conv2d, Linear and MultiheadAttention with rank and
alpha patterns and rank-stabilised scaling, and modules saved whole. Everything else is refused by name, never ignored.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from orchestrator.errors import AdapterError
from tuning.targets import LoraWeight, accepts_lora, attention_around, lora_weights, matched_by_peft

PREFIX = "base_model.model."
PEFT_VERSION = "0.21.2"  # the last whose reading of attention is known, see `targets.OUT_PROJ_TIMES`
_READ = ("peft_type", "r", "lora_alpha", "target_modules", "modules_to_save", "rank_pattern", "alpha_pattern")
_HARMLESS = (  # no effect on a trained LoRA's outputs
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("lora_dropout", "megatron_core", "runtime_config", "arrow_config", "qalora_group_size", "use_rslora"),
)
_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "kaiming")  # others rewrite the base's weights
_NORMAL = {"bias": "none", "init_lora_weights": True}


def lora_delta(a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """`scaling * B A` in the weight's shape.

    Args:
        a: (r, in) or (r, in, kh, kw).
        b: (out, r) or (out, r, 1, 1).
        scaling: alpha / r, or alpha / sqrt(r).

    Returns:
        (out, in) or (out, in, kh, kw).
    """
    return (b.flatten(1) @ a.flatten(1)).view(b.shape[0], *a.shape[1:]) * scaling


def _by_pattern(patterns: dict[str, Any] | None, name: str, default: float) -> float:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return float(value)
    return float(default)


def _rank(config: dict[str, Any], name: str) -> int:
    return int(_by_pattern(config.get("rank_pattern"), name, config.get("r", 8)))


def _scaling(config: dict[str, Any], name: str) -> float:
    rank = _rank(config, name)
    alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _refuse_unsupported(config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"peft_type must be LORA; got {config.get('peft_type')!r}")
    if config.get("init_lora_weights", True) not in _INITIALISATIONS:
        raise AdapterError(f"init_lora_weights {config['init_lora_weights']!r} changes the base; save it converted")
    for option, value in config.items():
        known = option in _READ or option in _HARMLESS or option == "init_lora_weights"
        if not known and value and value != _NORMAL.get(option):
            raise AdapterError(f"adapter option {option}={value!r} is not supported; only plain LoRA is")


def _refuse_later_peft(version: str, name: str) -> None:
    """PEFT means to change how often attention's out-projection delta counts: its later files are not guessed at."""
    wrote = [int(part) for part in re.findall(r"\d+", version.partition("@")[0])[:3]]
    if wrote > [int(part) for part in PEFT_VERSION.split(".")]:
        raise AdapterError(f"LoRA on attention ({name}) is read as PEFT <= {PEFT_VERSION} wrote it; got {version}")


def _saved(module: nn.Module, config: dict[str, Any]) -> list[str]:
    wanted = config.get("modules_to_save") or []
    return [name for name, _ in module.named_modules() if name and any(name.endswith(w) for w in wanted)]


def _targeted(module: nn.Module, config: dict[str, Any]) -> Iterator[tuple[str, LoraWeight]]:
    """Target layers that the config names on this module, each with a weight of its that takes a delta."""
    saved = _saved(module, config)
    for name in matched_by_peft(module, config.get("target_modules"), config.get("modules_to_save") or []):
        layer = module.get_submodule(name)
        if around := attention_around(module, name):
            raise AdapterError(f"LoRA on attention must name the attention, {around}; got {name}")
        if not accepts_lora(layer):
            kinds = "Linear, plain Conv2d and MultiheadAttention with q, k and v in one weight"
            raise AdapterError(f"LoRA goes on {kinds}; {name} is {type(layer).__name__}")
        if isinstance(layer, nn.MultiheadAttention):
            _refuse_later_peft(config.get("peft_version") or "", name)
            if inner := [s for s in saved if s.startswith(f"{name}.")]:
                raise AdapterError(f"attention must take LoRA or have its parts saved whole, not both; got {inner[0]}")
        for weight in lora_weights(name, layer):
            yield name, weight


def _expected(module: nn.Module, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor keys and shapes that the config asks for on this module."""
    state = module.state_dict()
    expected: dict[str, tuple[int, ...]] = {}
    for name in _saved(module, config):
        keys = module.get_submodule(name).state_dict()
        expected |= {f"{PREFIX}{name}.{k}": tuple(state[f"{name}.{k}"].shape) for k in keys}
    for name, target in _targeted(module, config):
        out, *rest = state[target.path].shape
        rank = _rank(config, name)
        expected[f"{PREFIX}{target.key}.lora_A.weight"] = (rank, *rest)
        expected[f"{PREFIX}{target.key}.lora_B.weight"] = (out, rank, *(1,) * (len(rest) - 1))
    return expected


def check_adapter(module: nn.Module, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """Verifies that an adapter fits a base completely: kind, keys, shapes, number types, finite values.

    Args:
        module: the base model.
        config: PEFT's adapter_config.
        tensors: of adapter_model.safetensors.

    Raises:
        AdapterError: names the first option or tensor that does not fit, and what was expected.
    """
    _refuse_unsupported(config)
    expected = _expected(module, config)
    if not expected:
        raise AdapterError(f"target_modules {config.get('target_modules')!r} and modules_to_save match no layer")
    state = module.state_dict()
    for key in sorted(expected.keys() - tensors.keys()):
        raise AdapterError(f"adapter lacks tensor {key}")
    for key, value in tensors.items():
        if key not in expected:
            raise AdapterError(f"adapter tensor {key} belongs to no layer that the config names")
        if tuple(value.shape) != expected[key]:
            raise AdapterError(f"adapter tensor {key} must have shape {expected[key]}; got {tuple(value.shape)}")
        target = state.get(key.removeprefix(PREFIX))
        floating = target is None or target.is_floating_point()
        if floating != np.issubdtype(value.dtype, np.floating):
            raise AdapterError(
                f"adapter tensor {key} must be {'floating' if floating else 'integer'}; got {value.dtype}"
            )
        if floating and not np.isfinite(value).all():
            raise AdapterError(f"adapter tensor {key} holds a value that is not finite")


def merged_twin(module: nn.Module, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> nn.Module:
    """A copy of `module` with the adapter merged in; tensors it does not change are shared, not copied.

    Args:
        module: the base; it is not touched.
        config: PEFT's adapter_config.
        tensors: of adapter_model.safetensors.

    Returns:
        A plain module in eval mode, as fast as the base.

    Raises:
        AdapterError: the adapter does not fit (see `check_adapter`).
    """
    check_adapter(module, config, tensors)
    shared: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    twin = copy.deepcopy(module, shared)
    loaded = {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}  # copies: may be read-only
    for name, target in _targeted(module, config):
        a, b = (loaded.pop(f"{PREFIX}{target.key}.lora_{part}.weight").float() for part in "AB")
        delta = lora_delta(a, b, _scaling(config, name) * target.times)
        _replace(twin, target.path, module.get_parameter(target.path).detach().float().cpu() + delta)
    for key, value in loaded.items():
        _replace(twin, key.removeprefix(PREFIX), value)
    return twin.eval()


def _replace(twin: nn.Module, name: str, value: torch.Tensor) -> None:
    """Rebinds one tensor of the twin; assigning in place would write through to the base."""
    path, _, attribute = name.rpartition(".")
    layer = twin.get_submodule(path)
    old = getattr(layer, attribute)
    new = value.to(device=old.device, dtype=old.dtype)
    if attribute in layer._parameters:
        layer._parameters[attribute] = nn.Parameter(new, requires_grad=False)
    else:
        layer._buffers[attribute] = new
