"""Publishes the module that a deployment holds, so that trials and other replicas load the very same bytes.

Called by `Healable` at construction, where no published base was named.
"""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from orchestrator.models import publish_model
from orchestrator.spec import ModelSpec
from orchestrator.storage import Storage


def publish(storage: Storage, spec: ModelSpec, module: nn.Module) -> str:
    """Write spec, code and weights to `models/<digest>/` unless they are there.

    The weights are the spec's file when the module holds its values, else the module's own: a user may have trained
    on, or loaded them by other means.

    Returns:
        The base's digest, equal on every replica that holds equal values.
    """
    state = {name: value.detach().cpu() for name, value in module.state_dict().items()}
    if _spec_has(spec, state):
        return publish_model(storage, spec)
    # Clones: tied or strided tensors share memory, which the format refuses.
    return publish_model(storage, spec, save({name: value.contiguous().clone() for name, value in state.items()}))


def _spec_has(spec: ModelSpec, state: dict[str, torch.Tensor]) -> bool:
    """True when the weights file beside the spec holds these values, at whatever precision it stores them."""
    if not spec.weights or "://" in spec.weights:
        return False
    try:
        stored = load_file(spec.locate(spec.weights))
    except (OSError, SafetensorError):
        return False
    return stored.keys() == state.keys() and all(
        stored[name].shape == value.shape and torch.equal(stored[name].to(value.dtype), value)
        for name, value in state.items()
    )
