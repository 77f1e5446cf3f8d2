"""How well each look explains the traffic: `python -m benchmarks.healing.looks --drift gaussian_noise`.

Prints the squared distance of the base's mean Fourier features between reference rows with the look and the traffic,
the same between two halves of the traffic, and how often the base is right on rows with the look and on the traffic.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.healing.buffers import DRIFTS, Limits, Scene, build
from benchmarks.healing.options import DATA
from orchestrator.drift.statistics import fourier_features
from tuning.base_model import collect_sample
from tuning.restyle import fit_look, variants
from tuning.scoring import predict
from tuning.workbench import known_labels, load_workbench

ROWS = 512


def main() -> None:
    """Fit every look on every drift, print how far it is off."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--drift", nargs="*", default=DRIFTS, choices=DRIFTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for drift in args.drift:
        with TemporaryDirectory(prefix="looks-") as folder:
            compare(args.data, Path(folder), drift)


def compare(data: Path, folder: Path, drift: str) -> None:
    """One drift set."""
    world = build(data, folder, Scene(drift), Limits(1, 1, 600.0))
    bench = load_workbench(world.storage, world.request, keep=False)
    old, new, other = bench.replay.inputs[:ROWS], *np.split(bench.parts["train"].inputs[: 2 * ROWS], 2)
    labels = known_labels(bench.replay)[:ROWS]

    def mean_features(inputs: np.ndarray) -> np.ndarray:
        sample = collect_sample(bench.module, bench.tap, inputs, bench.device, layout=bench.layout)
        return np.asarray(fourier_features(bench.baseline, sample.embedding_ND).mean(axis=0))

    goal_M = mean_features(new)
    right = float(
        (predict(bench.module, world.evaluation.inputs, bench.device).argmax(1) == world.evaluation.labels).mean()
    )
    print(
        f"{drift}: halves of the traffic {np.square(mean_features(other) - goal_M).sum():.3f}; base right {right:.3f}"
    )
    for reach, share in variants(old, bench.layout):
        rows = fit_look(old, new, bench.layout, (reach, share)).apply(old, np.random.default_rng(0))
        gap = np.square(mean_features(rows) - goal_M).sum()
        right = float((predict(bench.module, rows, bench.device).argmax(1) == labels).mean())
        print(f"    reach {reach}, noise {share:+.2f}: {gap:.3f}; base right {right:.3f}", flush=True)


if __name__ == "__main__":
    main()
