"""Low-rank and whole-module adapters on a model in training, exported in PEFT's on-disk format.

Trials attach one to their own copy of the base; replicas only ever see merged twins (`adapter_format`, re-exported
here). Knows nothing of objectives, Ray or storage. `peft` is not imported: tests use it as the oracle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from orchestrator.errors import AdapterError
from orchestrator.messages import TrialConfig
from tuning.adapter_format import PEFT_VERSION, PREFIX, check_adapter, lora_delta, merged_twin
from tuning.targets import Targets, lora_weights, peft_names, plan_targets

__all__ = ["AdapterHandle", "LoraDelta", "attach", "check_adapter", "merged_twin", "plan_targets"]


class LoraDelta(nn.Module):
    """Adds `scaling * B A` to a weight; B starts at zero, so that an untrained adapter changes nothing.

    Args:
        weight: (out, in) or (out, in, kh, kw).
        adapter_rank: inner dimension, >= 1.
        scaling: lora_alpha / adapter_rank, times how often PEFT adds the delta.
        generator: seeds A.
    """

    def __init__(self, weight: torch.Tensor, adapter_rank: int, scaling: float, generator: torch.Generator) -> None:
        super().__init__()
        bound = 1 / math.sqrt(math.prod(weight.shape[1:]))  # kaiming_uniform with a = sqrt(5), as PEFT
        a = torch.empty(adapter_rank, *weight.shape[1:]).uniform_(-bound, bound, generator=generator)
        b = torch.zeros(weight.shape[0], adapter_rank, *(1,) * (weight.ndim - 2))
        self.lora_A = nn.Parameter(a.to(weight))
        self.lora_B = nn.Parameter(b.to(weight))
        self.scaling = scaling

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Weight plus delta, same shape."""
        return weight + lora_delta(self.lora_A, self.lora_B, self.scaling)


class AdapterHandle:
    """An adapter attached to a model in training.

    Attributes:
        module: the model with the adapter in place.
        targets: the layers touched.
        config: PEFT's adapter_config.
    """

    def __init__(self, module: nn.Module, targets: Targets, deltas: dict[str, LoraDelta], config: dict[str, Any]):
        self.module = module
        self.targets = targets
        self.config = config
        self._deltas = deltas

    def parameters(self) -> Iterator[nn.Parameter]:
        """Trainable parameters: the deltas, and those of the modules trained whole."""
        for delta in self._deltas.values():
            yield from (delta.lora_A, delta.lora_B)
        for name in self.targets.trained:
            yield from self.module.get_submodule(name).parameters()

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.parameters())

    def _named(self) -> Iterator[tuple[str, torch.Tensor]]:
        for key, delta in self._deltas.items():
            yield f"{PREFIX}{key}.lora_A.weight", delta.lora_A.data
            yield f"{PREFIX}{key}.lora_B.weight", delta.lora_B.data
        for name in self.targets.saved:
            for key, value in self.module.get_submodule(name).state_dict().items():
                yield f"{PREFIX}{name}.{key}", value

    def export(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """PEFT's adapter_config and the tensors of adapter_model.safetensors (float32 or int64, copies)."""
        tensors = {}
        for key, value in self._named():
            value = value.detach().float() if value.is_floating_point() else value.detach()
            tensors[key] = value.cpu().clone().contiguous().numpy()
        return dict(self.config), tensors

    def load(self, tensors: dict[str, np.ndarray]) -> None:
        """Puts an `export`'s tensors back, to continue a trial from its checkpoint.

        Raises:
            AdapterError: the tensors are another adapter's.
        """
        current = dict(self._named())
        if set(current) != set(tensors):
            raise AdapterError(f"checkpoint must hold this adapter's tensors; differs in {set(current) ^ set(tensors)}")
        with torch.no_grad():
            for key, value in current.items():
                value.copy_(torch.from_numpy(np.array(tensors[key])))

    def shift_bias(self, offset_K: np.ndarray) -> None:
        """Adds `offset_K` (K,) to the bias of the one saved layer: a logit correction."""
        bias = self.module.get_submodule(self.targets.saved[0]).get_parameter("bias")
        with torch.no_grad():
            bias.add_(torch.as_tensor(offset_K, dtype=bias.dtype, device=bias.device))


def attach(module: nn.Module, config: TrialConfig) -> AdapterHandle:
    """Freezes `module` and attaches an adapter to it, in place; its outputs do not change yet.

    Args:
        module: a copy of the base that the trial owns.
        config: placement, rank (>= 1 where the placement has low-rank layers) and seed.

    Raises:
        AdapterError: the model has no layer for this placement, or the rank is not positive.
    """
    targets = plan_targets(module, config.placement)
    if targets.lora and config.adapter_rank < 1:
        raise AdapterError(f"adapter_rank must be >= 1 for placement {config.placement}; got {config.adapter_rank}")
    generator = torch.Generator().manual_seed(config.seed)
    names = peft_names(module, targets)  # before parametrisation adds modules of its own
    module.requires_grad_(False)
    deltas = {}
    for target in (w for name in targets.lora for w in lora_weights(name, module.get_submodule(name))):
        path, _, attribute = target.path.rpartition(".")
        weight = module.get_parameter(target.path)
        deltas[target.key] = LoraDelta(weight, config.adapter_rank, target.times, generator)
        parametrize.register_parametrization(module.get_submodule(path), attribute, deltas[target.key])
    for name in targets.trained:
        module.get_submodule(name).requires_grad_(True)
    return AdapterHandle(module, targets, deltas, _peft_config(names, targets, config.adapter_rank))


def _peft_config(names: list[str] | str, targets: Targets, adapter_rank: int) -> dict[str, Any]:
    rank = adapter_rank if targets.lora else 1  # PEFT wants a positive one even where nothing uses it
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "peft_version": PEFT_VERSION,  # whose reading of attention the tensors are written for
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": names,
        "modules_to_save": list(targets.saved) or None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "bias": "none",
        "init_lora_weights": True,
    }
