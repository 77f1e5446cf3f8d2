"""A Gaussian-mixture world for the drift tests: labelled, separable, with three input channels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from orchestrator.drift.baseline import Baseline, Sample, fit_baseline
from orchestrator.drift.statistics import summarise
from orchestrator.messages import Window

NUM_CLASSES, WIDTH, NUM_CHANNELS = 4, 12, 3
CHANNEL_LEVELS = np.array([90.0, 110.0, 130.0])


class World:
    """Draws samples; `shift` moves the embedding along a direction that costs accuracy."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.centres_KD = np.random.default_rng(seed + 1000).standard_normal((NUM_CLASSES, WIDTH)) * 0.8

    def sample(self, num: int, shift: float = 0.0, priors: list[float] | None = None) -> Sample:
        labels_N = self.rng.choice(NUM_CLASSES, num, p=priors)
        x_ND = self.centres_KD[labels_N] + self.rng.standard_normal((num, WIDTH))
        x_ND = (1.0 - 0.5 * min(shift, 1.0)) * x_ND + shift * np.linspace(-1.0, 1.0, WIDTH)
        logits_NK = x_ND @ self.centres_KD.T - 0.5 * (self.centres_KD**2).sum(axis=1)
        light_N1 = 10.0 * self.rng.standard_normal((num, 1))
        means_NC = CHANNEL_LEVELS + light_N1 + 4.0 * self.rng.standard_normal((num, NUM_CHANNELS))
        return Sample(
            embedding_ND=x_ND,
            logits_NK=logits_NK,
            channel_means_NC=means_NC,
            channel_squares_NC=means_NC**2 + 40.0**2,
            input_min_N=np.zeros(num) + self.rng.uniform(0, 3, num),
            input_max_N=np.full(num, 255.0) - self.rng.uniform(0, 3, num),
            labels_N=labels_N,
        )

    def baseline(self, num: int = 1500) -> Baseline:
        return fit_baseline("b" * 8, "base", self.sample(num), None, None, NUM_CHANNELS)


def window(baseline: Baseline, sample: Sample, start_s: float = 0.0, segment: str = "", **checks: object) -> Window:
    """One window of the whole sample, an instance a second; `checks` replaces columns of its InputChecks."""
    num = len(sample.logits_NK)
    inputs = replace(sample.checks(), **checks)
    sums = summarise(baseline, baseline.layout, sample.embedding_ND, sample.logits_NK, inputs)
    return Window(baseline.base, baseline.digest, segment, num, start_s, start_s + num - 1, sums)
