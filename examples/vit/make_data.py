"""Trains the model and writes its data into a folder: `python make_data.py OUT`.

Real handwritten digits of scikit-learn's, as in the demo. The drift: a lamp fails. The images get dark and flat, and
the sensor's grain shows.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from digits_vit import build
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from torchvision.transforms import v2

from orchestrator.datasets import write_dataset
from serve_app.digits.images import jitter, load_images, transformed

EPOCHS, BATCH, LEARNING_RATE = 30, 64, 1e-3
LIGHT, GRAIN = 0.5, 0.06  # what is left of it; standard deviation of the noise, of the full range
SPEC = """spec_version: 1
name: digits-vit
task: classification
factory: digits_vit:build
weights: weights.safetensors
input: {shape: [32, 32, 3], dtype: UINT8, layout: HWC}
classes: ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
reference: reference.parquet
metric: accuracy
"""


class FailingLamp(v2.Transform):
    """Less light, more grain."""

    def transform(self, inpt: torch.Tensor, params: dict[str, object]) -> torch.Tensor:
        """One uint8 image (3, H, W)."""
        dark = LIGHT * inpt.float() + 255.0 * GRAIN * torch.randn(inpt.shape) + 30.0
        return dark.round().clamp(0, 255).to(torch.uint8)


def train(inputs: np.ndarray, labels: np.ndarray) -> torch.nn.Module:
    """The model; every epoch sees every image once, slightly moved, turned and zoomed."""
    torch.manual_seed(0)
    model = build()
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    steps = EPOCHS * (len(labels) // BATCH + 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps)
    images, target, move = torch.from_numpy(inputs), torch.from_numpy(labels), jitter()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(target)).split(BATCH):
            moved = torch.stack([move(image) for image in images[batch].permute(0, 3, 1, 2)]).permute(0, 2, 3, 1)
            loss = cross_entropy(model(moved), target[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return model.eval()


def main() -> None:
    """Train, write, print how often the model is right on each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    parts = load_images()
    model = train(parts["train"].inputs, parts["train"].labels)
    save_file(model.state_dict(), args.out / "weights.safetensors")
    (args.out / "model.yaml").write_text(SPEC)
    shutil.copy(Path(__file__).with_name("digits_vit.py"), args.out / "digits_vit.py")
    dark = v2.Compose([jitter(), FailingLamp()])
    written = {
        "reference": transformed(parts["reference"], jitter(), 1200, 3),
        "clean": transformed(parts["traffic"], jitter(), 1500, 1),
        "dark": transformed(parts["traffic"], dark, 2000, 2),
        "eval_dark": transformed(parts["eval"], dark, 600, 12),
    }
    for name, split in written.items():
        write_dataset(args.out / f"{name}.parquet", split.inputs, split.labels)
        with torch.inference_mode():
            right = (model(torch.from_numpy(split.inputs)).argmax(1).numpy() == split.labels).mean()
        print(f"{name:10s} {len(split.labels):6,d} images  accuracy {right:.3f}")


if __name__ == "__main__":
    main()
