"""Trains the model and writes its data into a folder: `python make_data.py OUT`.

The world of the published self-healing benchmark: 10 features, all N(0, 1), but for feature 7 of a fraud, N(-2.5, 0.8);
15% are frauds. `drifted`: feature 7 of the normal ones becomes N(-2.2, 1), so that hardly anything tells the two apart.
`offset`: the sensor behind feature 7 reads 3 less for everyone, so that everything still does.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from fraud_mlp import build
from safetensors.torch import save_file

from orchestrator.datasets import write_dataset

FRAUD_SHARE, FEATURE = 0.15, 7
OFFSET = -3.0
ROWS = {
    "reference": 4_000,
    "clean": 2_000,
    "drifted": 4_000,
    "offset": 4_000,
    "eval_drifted": 2_000,
    "eval_offset": 2_000,
}
SPEC = """spec_version: 1
name: fraud-mlp
task: classification
factory: fraud_mlp:build
weights: weights.safetensors
input: {shape: [10], dtype: FP32, layout: F, columns: [f0, f1, f2, f3, f4, f5, f6, f7, f8, f9]}
classes: [normal, fraud]
reference: reference.parquet
metric: accuracy
"""


def draw(num: int, rng: np.random.Generator, world: str = "clean") -> tuple[np.ndarray, np.ndarray]:
    """`num` rows: float32 (N, 10) and int64 labels."""
    labels = (rng.random(num) < FRAUD_SHARE).astype(np.int64)
    rows = rng.standard_normal((num, 10))
    fraud = rng.normal(-2.5, 0.8, num)
    normal = rng.normal(-2.2 if "drifted" in world else 0.0, 1.0, num)
    rows[:, FEATURE] = np.where(labels == 1, fraud, normal) + (OFFSET if "offset" in world else 0.0)
    return rows.astype(np.float32), labels


def train(rng: np.random.Generator) -> torch.nn.Module:
    """The model, on 20,000 rows of the clean world."""
    torch.manual_seed(0)
    model = build()
    rows, labels = (torch.from_numpy(part) for part in draw(20_000, rng))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4)
    for _ in range(5):
        for batch in torch.randperm(len(rows)).split(128):
            loss = torch.nn.functional.cross_entropy(model(rows[batch]), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model.eval()


def main() -> None:
    """Train, write, print how often the model is right on each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    model = train(rng)
    save_file(model.state_dict(), args.out / "weights.safetensors")
    (args.out / "model.yaml").write_text(SPEC)
    shutil.copy(Path(__file__).with_name("fraud_mlp.py"), args.out / "fraud_mlp.py")
    for name, num in ROWS.items():
        rows, labels = draw(num, rng, name)
        write_dataset(args.out / f"{name}.parquet", rows, labels)
        with torch.inference_mode():
            right = (model(torch.from_numpy(rows)).argmax(1).numpy() == labels).mean()
        print(f"{name:14s} {num:6,d} rows  accuracy {right:.3f}")


if __name__ == "__main__":
    main()
