"""Endless clean traffic that looks like the real features: a class-wise kernel density of all columns jointly.

A draw picks a real row of its class and adds Gaussian noise with the class's own covariance, scaled by a bandwidth:
embedding, logits and channel moments move together, other columns are the picked row's. Reference and stream can both
be drawn afresh, so a measurement of false alarms sees the luck of the reference too.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from orchestrator.drift.sample import Sample

Array = NDArray[np.float32]

BANDWIDTH = 0.3  # part of the class's standard deviation in each direction
BURST_MEAN = 20  # instances of one class in a row, geometric
CYCLE_INSTANCES, CYCLE_SWING = 50_000, 0.2  # day and night: class priors +-20%
COLUMNS = ("embedding_ND", "logits_NK", "channel_means_NC", "channel_squares_NC")
CHUNK = 8192


class Generator:
    """Kernel density fitted to a labelled sample.

    Args:
        real: (N, ...) with labels for all rows.
        bandwidth: of the noise, in class standard deviations, >= 0.
    """

    def __init__(self, real: Sample, bandwidth: float = BANDWIDTH) -> None:
        parts = [np.asarray(getattr(real, name), dtype=np.float32) for name in COLUMNS]
        self._widths = [part.shape[1] for part in parts]
        self._rows_NX = np.concatenate(parts, axis=1)
        rest = {name: value for name, value in vars(real).items() if name not in (*COLUMNS, "labels_N")}
        self._copied = {name: np.asarray(value) for name, value in rest.items() if value is not None}
        labels_N = np.asarray(real.labels_N)
        self.num_classes = int(labels_N.max()) + 1
        self._members = [np.flatnonzero(labels_N == k) for k in range(self.num_classes)]
        self.priors_K = np.array([len(m) for m in self._members]) / len(labels_N)
        self._noise = [self._factor(member, bandwidth) for member in self._members]

    def _factor(self, member_N: NDArray[np.int64], bandwidth: float) -> Array:
        """(R, X): a standard normal (n, R) times it has the class covariance times bandwidth squared."""
        centred = self._rows_NX[member_N] - self._rows_NX[member_N].mean(axis=0)
        scale = np.maximum(centred.std(axis=0), 1e-9)
        _, values, axes = np.linalg.svd(centred / scale, full_matrices=False)
        keep = int(np.searchsorted(np.cumsum(values**2) / (values**2).sum(), 0.999)) + 1
        factor = values[:keep, None] * axes[:keep] * scale / np.sqrt(len(member_N) - 1)
        return np.asarray(bandwidth * factor, dtype=np.float32)

    def draw(self, labels_N: NDArray[np.int64], rng: np.random.Generator) -> Sample:
        """One instance per label, in that order."""
        out_NX = np.empty((len(labels_N), self._rows_NX.shape[1]), dtype=np.float32)
        picked_N = np.empty(len(labels_N), dtype=np.int64)
        for k, (member, noise) in enumerate(zip(self._members, self._noise, strict=True)):
            at = np.flatnonzero(labels_N == k)
            picked_N[at] = member[rng.integers(0, len(member), len(at))]
            for start in range(0, len(at), CHUNK):
                rows = at[start : start + CHUNK]
                z = rng.standard_normal((len(rows), len(noise)), dtype=np.float32)
                out_NX[rows] = self._rows_NX[picked_N[rows]] + z @ noise
        embedding, logits, means, squares = np.split(out_NX, np.cumsum(self._widths)[:-1], axis=1)
        copied = {name: value[picked_N] for name, value in self._copied.items()}
        drawn = dict(zip(COLUMNS, (embedding, logits, means, squares), strict=True))
        return Sample(**drawn, **copied, labels_N=labels_N)

    def independent(self, num: int, rng: np.random.Generator, start: int = 0) -> NDArray[np.int64]:
        """Labels drawn independently from the real priors; `start` is ignored."""
        return rng.choice(self.num_classes, num, p=self.priors_K)

    def bursts(self, num: int, rng: np.random.Generator, start: int = 0) -> NDArray[np.int64]:
        """Runs of one class, geometric with mean BURST_MEAN; `start` is ignored."""
        runs = rng.geometric(1.0 / BURST_MEAN, 2 * num // BURST_MEAN + 50)
        labels = np.repeat(rng.choice(self.num_classes, len(runs), p=self.priors_K), runs)
        while len(labels) < num:
            labels = np.concatenate([labels, self.bursts(num, rng)])
        return labels[:num]

    def cycle(self, num: int, rng: np.random.Generator, start: int = 0) -> NDArray[np.int64]:
        """Half the classes swing up by day while the others swing down; instance `start` of the period comes first."""
        phase_N = np.sin(2 * np.pi * (start + np.arange(num)) / CYCLE_INSTANCES)
        sign_K = np.where(np.arange(self.num_classes) % 2, -1.0, 1.0)
        weights_NK = self.priors_K * (1.0 + CYCLE_SWING * phase_N[:, None] * sign_K)
        edges_NK = np.cumsum(weights_NK / weights_NK.sum(axis=1, keepdims=True), axis=1)
        return np.minimum((rng.random((num, 1)) > edges_NK).sum(axis=1), self.num_classes - 1)

    def labels(self, traffic: str) -> Callable[..., NDArray[np.int64]]:
        """The labels of one kind of traffic: independent, bursts or cycle."""
        kinds = {"independent": self.independent, "bursts": self.bursts, "cycle": self.cycle}
        return kinds[traffic]

    def reference_labels(self, traffic: str, num: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Labels of a commissioning sample: `num` instances picked evenly out of two periods of the same traffic."""
        stream_N = self.labels(traffic)(2 * CYCLE_INSTANCES, rng)
        return np.asarray(stream_N[np.sort(rng.choice(len(stream_N), num, replace=False))])
