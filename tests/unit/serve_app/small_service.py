"""A four-class model of a few parameters, its adapters, and an orchestrator that lives in memory."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from orchestrator.datasets import write_dataset
from orchestrator.messages import BASE, Report, Target
from orchestrator.registry import save_adapter
from orchestrator.settings import ServiceConfig
from orchestrator.storage import Storage
from serve_app.healable import Healable
from serve_app.heartbeat import LinkError

CODE = """import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body(x.flatten(1).to(self.head.weight.dtype) / 255).relu())


def build():
    torch.manual_seed(0)
    return Net()
"""
SPEC = """spec_version: 1
name: small
factory: small_net:build
weights: weights.safetensors
input: {shape: [2, 3], dtype: UINT8}
classes: [a, b, c, d]
reference: reference.parquet
"""
KEY = b"f" * 32
SHIFT = 100.0  # a shifted adapter adds this much to one logit: its answers are known by their size


def build() -> nn.Module:
    names: dict[str, Any] = {}
    exec(CODE, names)
    module: nn.Module = names["build"]()
    return module.eval()


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 2, 3), dtype=np.uint8)


def write_spec(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "small_net.py").write_text(CODE)
    (folder / "model.yaml").write_text(SPEC)
    save_file({k: v.contiguous() for k, v in build().state_dict().items()}, folder / "weights.safetensors")
    labels = np.arange(40) % 4
    write_dataset(folder / "reference.parquet", images(40), labels)
    return folder / "model.yaml"


def make_adapter(storage: Storage, base: str, label: int, **manifest: Any) -> str:
    """An adapter that adds SHIFT to the logit of `label`."""
    head = build().get_submodule("head")
    bias = head.bias.detach().clone().numpy()
    bias[label] += SHIFT
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [], "modules_to_save": ["head"]}
    prefix = "base_model.model.head."
    tensors = {prefix + "weight": head.weight.detach().numpy(), prefix + "bias": bias}
    return save_adapter(storage, config, tensors, {"base": base, **manifest}, None)


@dataclass
class Memory:
    """An orchestrator in memory: answers with `target`, keeps the reports; `down` makes it unreachable."""

    target: Target = field(default_factory=lambda: Target(0, BASE, feedback_key=KEY))
    reports: list[Report] = field(default_factory=list)
    down: bool = False
    lose_answers: int = 0
    connected: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def connect(self, _: ServiceConfig) -> Memory:
        self.connected += 1
        if self.down:
            raise ConnectionError("nobody is there")
        return self

    def heartbeat(self, report: Report, timeout_s: float) -> Target:
        if self.down:
            raise LinkError("gone", lost=True)
        with self.changed:
            self.reports.append(report)
            self.changed.notify_all()
            if self.lose_answers:
                self.lose_answers -= 1
                raise LinkError("the answer was lost", lost=False)
            return self.target

    def wait(self, condition: Any, timeout_s: float = 20.0) -> None:
        """Until a report fulfils `condition`."""
        with self.changed:
            done = self.changed.wait_for(lambda: any(condition(r) for r in self.reports), timeout_s)
        assert done, self.reports[-1:]


def healable(folder: Path, memory: Memory, **options: Any) -> Healable:
    torch.set_num_threads(1)
    spec = folder / "spec" / "model.yaml"
    if not spec.exists():
        write_spec(folder / "spec")
    values = {"first_target_s": 10.0, "heartbeat_s": 0.02, **options}
    return Healable(build(), spec=spec, storage=str(folder / "storage"), connect=memory.connect, **values)
