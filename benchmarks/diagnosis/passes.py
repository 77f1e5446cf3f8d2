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

from benchmarks.cifar10 import CLEAN, REFERENCE, Cifar10, base_baseline, right
from benchmarks.diagnosis import drifts, faults
from benchmarks.diagnosis.drifts import Change, Images, part_of
from orchestrator.drift.baseline import Baseline
from orchestrator.drift.sample import Sample

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
        self.folder = folder
        self._shared = Cifar10(data)
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
        right_2N = [right(self.sample(n)).astype(float) for n in (CLEAN, name)]
        lost_N = right_2N[0] - right_2N[1]
        return float(lost_N.mean()), float(lost_N.std() / np.sqrt(len(lost_N)))

    @cached_property
    def baseline(self) -> Baseline:
        """The base's baseline."""
        return base_baseline(self.sample(REFERENCE), self._shared.fit_rows_N)

    def images(self, name: str) -> Images:
        """The changed images, (N, 32, 32, 3)."""
        seed = np.random.default_rng(zlib.crc32(name.encode()))
        change, _, under = name.partition(" on ")
        if under:
            return KNOWN[change](self.images(under), seed)
        drift, _, percent = name.partition("@")
        if drift in KNOWN:
            changed = part_of(KNOWN[drift], float(percent) / 100.0) if percent else KNOWN[drift]
            return changed(self._shared.images(CLEAN)[0], seed)
        return self._shared.blend(drift, float(percent or 100))

    # ------------------------------------------------------------ inside

    def _measure(self, name: str, path: Path) -> None:
        if name == REFERENCE:
            sample = self._shared.see(*self._shared.images(REFERENCE))
        else:
            sample = self._shared.see(self.images(name), self._shared.images(CLEAN)[1])
        values = {f.name: getattr(sample, f.name) for f in fields(Sample)}
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new.npz")
        np.savez(fresh, **{key: value for key, value in values.items() if value is not None})
        os.replace(fresh, path)
