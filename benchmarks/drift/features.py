"""What the CIFAR-10 ResNet-18 makes of every drift set: computed once, kept as one npz, read by all measurements.

Blends mix a part of the severity-5 image into the clean one.
"""

from __future__ import annotations

import os
from dataclasses import fields
from functools import cached_property
from pathlib import Path

import numpy as np

from benchmarks.cifar10 import CLEAN, DRIFTS, REFERENCE, Cifar10, base_baseline, right
from orchestrator.drift.baseline import Baseline
from orchestrator.drift.sample import Sample

PERCENTS = (100, 50, 25)  # of the drifted image's pixels in the blend


def set_name(drift: str, percent: int) -> str:
    """Name of one set in the file: `fog` at severity 5, `fog@25` for a blend of 25%."""
    return drift if percent == 100 else f"{drift}@{percent}"


class Features:
    """The npz, read by set.

    Args:
        path: as written by `measure`.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise SystemExit(f"{path} must exist; make it with: python -m benchmarks.drift features")
        self._npz = np.load(path)

    def sample(self, name: str) -> Sample:
        """All rows of one set; a column that the file does not know yet is left at its default."""
        known = {f.name: f"{name}/{f.name}" for f in fields(Sample)}
        return Sample(**{column: self._npz[key] for column, key in known.items() if key in self._npz})

    def accuracy(self, name: str) -> float:
        """Share of right predictions on a set, 0..1."""
        return float(right(self.sample(name)).mean())

    @cached_property
    def fit_rows_N(self) -> np.ndarray:
        """Which rows of the reference the baseline is fitted on, as the product splits it by content."""
        return np.asarray(self._npz["fit_rows"])

    @cached_property
    def baseline(self) -> Baseline:
        """The base's baseline."""
        return base_baseline(self.sample(REFERENCE), self.fit_rows_N)


def measure(data: Path, path: Path) -> None:
    """Run the model over every set and write the npz; about three minutes on one core."""
    shared = Cifar10(data)
    arrays: dict[str, np.ndarray] = {"fit_rows": shared.fit_rows_N}

    def keep(name: str, inputs: np.ndarray, labels: np.ndarray) -> None:
        sample = shared.see(inputs, labels)
        for f in fields(Sample):
            value = getattr(sample, f.name)
            if value is not None:
                arrays[f"{name}/{f.name}"] = value
        print(f"{name:20s} rows {len(inputs):5d}  accuracy {right(sample).mean():.3f}", flush=True)

    for name in (REFERENCE, CLEAN):
        keep(name, *shared.images(name))
    labels_N = shared.images(CLEAN)[1]
    for drift in DRIFTS:
        for percent in PERCENTS:
            keep(set_name(drift, percent), shared.blend(drift, percent), labels_N)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new.npz")  # a measurement under way goes on reading the old file
    np.savez(fresh, **arrays)
    os.replace(fresh, path)


def print_losses(features: Features) -> None:
    """Accuracy lost per set, in points, on the same images."""
    clean = features.accuracy(CLEAN)
    print(f"clean accuracy {clean:.3f}; points lost by part of the drifted pixels")
    print(f"{'set':16s}" + "".join(f"{p:>8d}%" for p in PERCENTS))
    for drift in DRIFTS:
        losses = [100 * (clean - features.accuracy(set_name(drift, p))) for p in PERCENTS]
        print(f"{drift:16s}" + "".join(f"{loss:9.1f}" for loss in losses))
