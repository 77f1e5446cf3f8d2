"""What the CIFAR-10 ResNet-18 makes of every change: one pass each, kept under out/diagnosis, read by the episodes.

A change's name says how it was made: `fog`, `fog@25` (a blend of 25% of its pixels into the clean image), `bgr`,
`bgr on fog`. Row i is the same image under every name: the 2,000 traffic rows, then the 1,000 eval rows.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import fields
from functools import cached_property
from pathlib import Path

import numpy as np

from benchmarks.diagnosis import drifts, faults
from benchmarks.diagnosis.drifts import Change, Images, clip, part_of
from orchestrator.drift.baseline import Baseline, fit_baseline
from orchestrator.drift.sample import Sample, rows_of

SHARED = ("gaussian_noise", "defocus_blur", "glass_blur", "fog", "contrast", "brightness")
CLEAN, REFERENCE = "clean", "reference"
KNOWN: dict[str, Change] = {
    **drifts.DEVELOPED,
    **drifts.GENTLE,
    **drifts.HELD_OUT,
    **faults.NAMED,
    **faults.DEVELOPED,
    **faults.HELD_OUT,
}


class Passes:
    """Samples by the name of the change; made when first asked for.

    Args:
        data: folder of the CIFAR-10 drift data.
        folder: where the passes are kept.
    """

    def __init__(self, data: Path, folder: Path) -> None:
        self.data, self.folder = data, folder
        self._read: dict[str, Sample] = {}

    def sample(self, name: str) -> Sample:
        """All rows under one change."""
        if name not in self._read:
            path = self.folder / f"{name.replace(' ', '_')}.npz"
            if not path.exists():
                self._measure(name, path)
            with np.load(path) as stored:
                self._read[name] = Sample(**{key: stored[key] for key in stored.files})
        return self._read[name]

    def loss(self, name: str) -> tuple[float, float]:
        """Accuracy truly lost to a change, 0..1, and the standard error of that figure: the rows are paired."""
        right_2N = [_right(self.sample(n)).astype(float) for n in (CLEAN, name)]
        lost_N = right_2N[0] - right_2N[1]
        return float(lost_N.mean()), float(lost_N.std() / np.sqrt(len(lost_N)))

    @cached_property
    def baseline(self) -> Baseline:
        """The base's baseline, fitted on what the product fits it on."""
        from orchestrator.datasets import split_reference

        stored = self._dataset(REFERENCE)
        numbered = type(stored)(**{**vars(stored), "labels": np.arange(len(stored))})
        parts = split_reference(numbered)
        rows_N = np.sort(np.concatenate([parts[name].labels for name in ("fit", "gate")]))
        return fit_baseline("bench", "base", rows_of(self.sample(REFERENCE), rows_N), None, None, 3)

    # ------------------------------------------------------------ inside

    @cached_property
    def _model(self):  # type: ignore[no-untyped-def]
        import torch

        from orchestrator.spec import load_spec
        from tuning.base_model import build_module, feature_tap

        torch.set_num_threads(1)
        spec = load_spec(self.data / "model.yaml")
        module = build_module(self.data, spec)
        return module, feature_tap(module, spec, self._dataset(REFERENCE).inputs[:2])

    def _dataset(self, name: str):  # type: ignore[no-untyped-def]
        from orchestrator.datasets import read_dataset

        return read_dataset(self.data / f"{name}.parquet")

    def images(self, name: str) -> Images:
        """The changed images, (N, 32, 32, 3)."""
        seed = np.random.default_rng(zlib.crc32(name.encode()))
        change, _, under = name.partition(" on ")
        if under:
            return KNOWN[change](self.images(under), seed)
        drift, _, percent = name.partition("@")
        if drift in KNOWN:
            changed = part_of(KNOWN[drift], float(percent) / 100.0) if percent else KNOWN[drift]
            return changed(self._stored(CLEAN)[0], seed)
        stored = self._stored(drift)[0]
        if not percent:
            return stored
        share = np.float32(float(percent) / 100.0)
        return clip(share * stored + (1 - share) * self._stored(CLEAN)[0])

    def _stored(self, name: str) -> tuple[Images, np.ndarray]:
        parts = [self._dataset(f"{name}.{part}") for part in ("traffic", "eval")]
        return np.concatenate([p.inputs for p in parts]), np.concatenate([p.labels for p in parts])

    def _measure(self, name: str, path: Path) -> None:
        import torch

        from tuning.base_model import collect_sample

        if name == REFERENCE:
            images, labels = (getattr(self._dataset(REFERENCE), n) for n in ("inputs", "labels"))
        else:
            images, labels = self.images(name), self._stored(CLEAN)[1]
        module, tap = self._model
        images = np.ascontiguousarray(images)
        sample = collect_sample(module, tap, images, torch.device("cpu"), labels=labels, layout="HWC")
        values = {f.name: getattr(sample, f.name) for f in fields(Sample)}
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new.npz")
        np.savez(fresh, **{key: value for key, value in values.items() if value is not None})
        os.replace(fresh, path)


def _right(sample: Sample) -> np.ndarray:
    assert sample.labels_N is not None
    return np.asarray(sample.logits_NK.argmax(axis=1) == sample.labels_N)
