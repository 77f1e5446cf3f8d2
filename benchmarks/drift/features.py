"""What the CIFAR-10 ResNet-18 makes of every drift set: computed once, kept as one npz, read by all measurements.

Rows are what the product sees (`tuning.base_model.collect_sample`). Each set holds the traffic rows, then the eval
rows; the same row is the same image in every set. Blends mix a part of the severity-5 image into the clean one.
"""

from __future__ import annotations

import os
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from orchestrator.drift.baseline import Baseline, fit_baseline
from orchestrator.drift.sample import Sample, rows_of

DRIFTS = ("gaussian_noise", "defocus_blur", "glass_blur", "fog", "contrast", "brightness")
PERCENTS = (100, 50, 25)  # of the drifted image's pixels in the blend
CLEAN, REFERENCE = "clean", "reference"
NUM_CHANNELS = 3
FITTED_PARTS = ("fit", "gate")  # of the reference, that the base's baseline is fitted on: `tuning.prepare`


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
        return accuracy(self.sample(name))

    @cached_property
    def fit_rows_N(self) -> np.ndarray:
        """Which rows of the reference the baseline is fitted on, as the product splits it by content."""
        return np.asarray(self._npz["fit_rows"])

    @cached_property
    def baseline(self) -> Baseline:
        """The base's baseline, fitted on what the product fits it on."""
        return fit_baseline("bench", "base", rows_of(self.sample(REFERENCE), self.fit_rows_N), None, None, NUM_CHANNELS)


def accuracy(sample: Sample) -> float:
    """Share of right predictions, 0..1."""
    return float((sample.logits_NK.argmax(axis=1) == sample.labels_N).mean())


def measure(data: Path, path: Path) -> None:
    """Run the model over every set and write the npz; about three minutes on one core."""
    import torch

    from orchestrator.datasets import Dataset, read_dataset, split_reference
    from orchestrator.spec import load_spec
    from tuning.base_model import build_module, collect_sample, feature_tap

    torch.set_num_threads(1)
    spec = load_spec(data / "model.yaml")
    module = build_module(data, spec)
    reference = read_dataset(data / "reference.parquet")
    tap = feature_tap(module, spec, reference.inputs[:2])
    arrays: dict[str, np.ndarray] = {}

    def keep(name: str, inputs: np.ndarray, labels: np.ndarray | None) -> None:
        sample = collect_sample(module, tap, inputs, torch.device("cpu"), labels=labels, layout=spec.layout)
        for f in fields(Sample):
            value = getattr(sample, f.name)
            if value is not None:
                arrays[f"{name}/{f.name}"] = value
        print(f"{name:20s} rows {len(inputs):5d}  accuracy {accuracy(sample):.3f}", flush=True)

    def both(name: str) -> Dataset:
        parts = [read_dataset(data / f"{name}.{part}.parquet") for part in ("traffic", "eval")]
        return replace(
            parts[0],
            inputs=np.concatenate([p.inputs for p in parts]),
            labels=np.concatenate([p.labels for p in parts if p.labels is not None]),
        )

    numbered = replace(reference, labels=np.arange(len(reference)))
    parts = split_reference(numbered)
    arrays["fit_rows"] = np.sort(np.concatenate([parts[name].labels for name in FITTED_PARTS]))
    keep(REFERENCE, reference.inputs, reference.labels)
    clean = both(CLEAN)
    keep(CLEAN, clean.inputs, clean.labels)
    for drift in DRIFTS:
        drifted = both(drift)
        for percent in PERCENTS:
            part = percent / 100
            mixed = part * drifted.inputs.astype(np.float32) + (1 - part) * clean.inputs.astype(np.float32)
            keep(set_name(drift, percent), np.rint(mixed).astype(np.uint8), drifted.labels)
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
