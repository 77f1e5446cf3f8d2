"""Adapters as a search leaves them, for tests of what becomes of them."""

import copy
import json

import torch
from safetensors.numpy import load_file, save_file

from orchestrator.messages import TrialConfig
from tuning.adapter import attach


def trained(module, placement, adapter_rank=4):
    """An exported adapter whose every tensor differs from its initial value."""
    handle = attach(copy.deepcopy(module), TrialConfig(placement, adapter_rank=adapter_rank))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.02)
        for name in handle.targets.saved:
            for key, b in handle.module.get_submodule(name).named_buffers():
                b.add_(3 if key == "num_batches_tracked" else torch.rand(b.shape, generator=generator) * 0.1)
    return handle


def gap(a, b, x):
    """Largest difference of two models' logits."""
    with torch.no_grad():
        return (a(x) - b(x)).abs().max().item()


def write(folder, config, tensors):
    """The two files of an adapter, as PEFT names them."""
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


def read(folder):
    """Config and tensors of the two files."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")
