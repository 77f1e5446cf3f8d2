"""A real but tiny problem: coloured stripes, a small convolutional net trained on them, and a drift that hurts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from orchestrator.datasets import write_dataset

CODE = '''"""A small convolutional classifier; uint8 [N, 16, 16, 3] in, logits [N, 4] out."""
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        )
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = x.permute(0, 3, 1, 2).to(self.head.weight.dtype) / 255 - 0.5
        return self.head(self.body(x).flatten(1))


def build():
    return Net()
'''

SPEC = """spec_version: 1
name: stripes
task: classification
factory: stripes_net:build
weights: weights.safetensors
input: {shape: [16, 16, 3], dtype: UINT8, layout: HWC}
classes: [horizontal, vertical, diagonal, checker]
reference: reference.parquet
"""


def make(n: int, seed: int, drift: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """`n` images uint8 (n, 16, 16, 3) and labels int64 (n,); drift: dimmed, tinted and noisy."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, n)
    y, x = np.mgrid[0:16, 0:16]
    phase = rng.uniform(0, 2 * np.pi, n)[:, None, None]
    freq = rng.uniform(0.9, 1.3, n)[:, None, None]
    patterns = np.stack(
        [
            np.sin(freq * y + phase),
            np.sin(freq * x + phase),
            np.sin(freq * (x + y) / 1.4 + phase),
            np.sin(freq * x + phase) * np.sin(freq * y + phase),
        ],
        axis=1,
    )[np.arange(n), labels]
    image = 128 + patterns[..., None] * rng.uniform(25, 60, (n, 1, 1, 3)) + rng.normal(0, 18, (n, 16, 16, 3))
    if drift:
        image = 190 + (image - 128) * 0.45 + rng.normal(0, 10, image.shape) + np.array([35, 0, -90])
    return image.clip(0, 255).astype(np.uint8), labels.astype(np.int64)


def prepare(folder: Path) -> Path:
    """Write code, weights, spec and data into `folder`; returns the spec's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stripes_net.py").write_text(CODE)
    (folder / "model.yaml").write_text(SPEC)
    namespace: dict[str, object] = {}
    exec(CODE, namespace)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = namespace["build"]()  # type: ignore[operator]
    images, labels = make(2400, seed=1)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for epoch in range(6):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(64):
            loss = torch.nn.functional.cross_entropy(
                net(torch.from_numpy(images[batch])), torch.from_numpy(labels[batch])
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    net.eval()
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, folder / "weights.safetensors")
    write_dataset(folder / "reference.parquet", *make(900, seed=2))
    return folder / "model.yaml"


def accuracy(folder: Path, drift: bool) -> float:
    """Accuracy of the saved base on fresh images."""
    from safetensors.torch import load_file

    namespace: dict[str, object] = {}
    exec(CODE, namespace)
    net = namespace["build"]()  # type: ignore[operator]
    net.load_state_dict(load_file(folder / "weights.safetensors"))
    net.eval()
    images, labels = make(1000, seed=3, drift=drift)
    with torch.inference_mode():
        return float((net(torch.from_numpy(images)).argmax(1).numpy() == labels).mean())
