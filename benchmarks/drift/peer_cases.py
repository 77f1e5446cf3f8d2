"""The streams that every detector of the comparison sees: clean ones to tune on, drifting ones to time.

Clean: references and streams drawn from the generator. Drifting: the real reference, 2,016 clean instances and up to
31 more (so that no detector's window is in step with the onset), then drifted ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.cifar10 import CLEAN, REFERENCE
from benchmarks.drift.false_alarms import drawn_baseline_and_fit, generator_of
from benchmarks.drift.features import Features
from benchmarks.drift.streams import endless_rows
from orchestrator.drift.baseline import Baseline
from orchestrator.drift.sample import Sample, rows_of
from orchestrator.drift.statistics import probabilities

CLEAN_REFERENCES, CLEAN_INSTANCES = 16, 12_000
LEAD_INSTANCES, MAX_INSTANCES = 2_016, 2_000  # before the onset, and after it until a miss


@dataclass(frozen=True)
class Case:
    """One stream; `onset` is -1 where it is clean throughout."""

    baseline: Baseline
    reference: Sample
    stream: Sample
    onset: int


def clean_case(path: Path, seed: int) -> Case:
    """A fresh reference and a fresh clean stream."""
    generator, rng = generator_of(path), np.random.default_rng([seed, 77])
    baseline, reference = drawn_baseline_and_fit(generator, "independent", rng)
    stream = generator.draw(generator.independent(CLEAN_INSTANCES, rng), rng)
    return Case(baseline, reference, stream, -1)


class Drifting:
    """The drifting streams of the named sets."""

    def __init__(self, features: Features) -> None:
        self._features = features
        self.baseline = features.baseline
        self.reference = rows_of(features.sample(REFERENCE), features.fit_rows_N)

    @cached_property
    def clean(self) -> Sample:
        """All clean rows."""
        return self._features.sample(CLEAN)

    def sample(self, name: str) -> Sample:
        """All rows of a set."""
        return self._features.sample(name)

    def rows(self, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """Row numbers of the clean part and of the drifted part, and the onset."""
        rng = np.random.default_rng([seed, 78])
        onset = LEAD_INSTANCES + int(rng.integers(32))
        num = len(self.clean.logits_NK)
        return endless_rows(num, onset, rng), endless_rows(num, MAX_INSTANCES, rng), onset


FEATURES = {
    "embedding": "projected embedding, 64 numbers",
    "probabilities": "predicted probabilities",
    "confidence": "largest predicted probability",
}


def columns(kind: str, baseline: Baseline, sample: Sample) -> NDArray[np.float32]:
    """What a peer is shown of a sample: float32 (N, X)."""
    if kind == "embedding":
        return ((sample.embedding_ND - baseline.center_D) @ baseline.projection_DP).astype(np.float32)
    shares = probabilities(sample.logits_NK, float(baseline.temperature)).astype(np.float32)
    return shares if kind == "probabilities" else shares.max(axis=1, keepdims=True)
