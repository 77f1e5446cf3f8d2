"""Sequential test of one scope: has the traffic changed, and since when?

Windows are merged to steps of at least 32 instances. Each step yields e-values (`evalues`), each feeds a
Shiryaev-Roberts sum R = (1 + R) e, and the weighted mean of the sums is compared with the threshold.

    E[e | past] <= 1 while nothing changed  =>  E[R at step T] <= E[T]  =>  mean steps to a false alarm >= threshold

A mean of such sums has the same bound, so several tests share one threshold. Under the null this holds for every
stopping rule and however windows are interleaved. Source: Shin, Ramdas & Rinaldo 2024, E-detectors, NEJSDS 2:229.
Called by `monitor`; pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestrator.drift import evalues
from orchestrator.drift.baseline import Baseline
from orchestrator.drift.null import SCALES
from orchestrator.drift.statistics import Summary, merge, read
from orchestrator.messages import Window

MAX_SUM = 1.0e15
ONSET_LOG_CUSUM = 1.5  # evidence below this does not date an onset: rather a step late than normal traffic taken in
WEIGHTS = {"features": 0.35, "coarse_features": 0.25, "channels": 0.2, "returned": 0.1, "checks": 0.1}


@dataclass
class ShiryaevRoberts:
    """One sum of evidence and the CUSUM beside it, whose last visit near zero estimates the onset.

    `steps` of the fine scale pass per update: that many starts are added, which keeps E[total after t steps] <= t.
    """

    steps: int = 1
    total: float = 0.0
    log_cusum: float = 0.0
    onset_s: float = 0.0

    def update(self, evalue: float, first_s: float) -> None:
        """Take one e-value in, of instances that begin at `first_s` (seconds)."""
        self.total = min((self.steps + self.total) * evalue, MAX_SUM)
        if self.log_cusum < ONSET_LOG_CUSUM:
            self.onset_s = first_s
        self.log_cusum = max(0.0, self.log_cusum + math.log(max(evalue, 1e-12)))


class Detector:
    """Test of one scope under one digest.

    Args:
        baseline: of the digest.
        threshold: mean number of steps (of >= 32 instances) between false alarms at the least, > 0.
    """

    def __init__(self, baseline: Baseline, threshold: float) -> None:
        if threshold <= 0:
            raise ValueError(f"threshold must be > 0 steps; got {threshold}")
        self.baseline = baseline
        self.threshold = threshold
        self.instances = 0
        self._pending: list[Window] = []
        self._coarse: list[Window] = []
        self._fine_bets: dict[str, Callable[[Baseline, Summary], float]] = {
            "features": lambda b, s: evalues.p_to_e(evalues.feature_p_value(b, s)),
            "checks": evalues.checks_evalue,
        }
        if len(baseline.null_quantiles_SQ) > len(SCALES):
            self._fine_bets["channels"] = lambda b, s: evalues.p_to_e(evalues.channel_p_value(b, s))
        if evalues.has_two_worlds(baseline):
            self._fine_bets["returned"] = evalues.return_evalue
        self._sums = {name: ShiryaevRoberts() for name in self._fine_bets}
        if baseline.normal_count >= evalues.COARSE_MIN_REFERENCE:
            self._sums["coarse_features"] = ShiryaevRoberts(steps=SCALES[1] // SCALES[0])
        self._total_weight = sum(WEIGHTS[name] for name in self._sums)

    def absorb(self, window: Window) -> bool:
        """Take a window in; whether the statistic stands at or above the threshold now.

        Raises:
            ValueError: the window's vector does not fit the baseline's layout.
        """
        self.instances += window.count
        self._pending.append(window)
        if sum(w.count for w in self._pending) >= SCALES[0]:
            self._step(merge(self._pending))
            self._pending = []
        return self.statistic >= self.threshold

    @property
    def statistic(self) -> float:
        """Weighted mean of the Shiryaev-Roberts sums, >= 0."""
        return sum(WEIGHTS[name] * s.total for name, s in self._sums.items()) / self._total_weight

    @property
    def onset_s(self) -> float:
        """Estimated time of the first changed instance, seconds since the epoch, from the strongest test."""
        strongest = max(self._sums, key=lambda name: WEIGHTS[name] * self._sums[name].total)
        if strongest == "coarse_features" and self._sums["features"].log_cusum >= ONSET_LOG_CUSUM:
            return max(self._sums["features"].onset_s, self._sums[strongest].onset_s)
        return self._sums[strongest].onset_s

    def _step(self, window: Window) -> None:
        summary = read(self.baseline.layout, window)
        for name, bet in self._fine_bets.items():
            self._sums[name].update(bet(self.baseline, summary), window.first_s)
        if "coarse_features" not in self._sums:
            return
        self._coarse.append(window)
        if sum(w.count for w in self._coarse) >= SCALES[1]:
            coarse = merge(self._coarse)
            self._coarse = []
            p = evalues.feature_p_value(self.baseline, read(self.baseline.layout, coarse))
            self._sums["coarse_features"].update(evalues.p_to_e(p), coarse.first_s)

    def snapshot(self) -> dict[str, Any]:
        """Plain values; instances that wait to fill a step are not kept."""
        sums = {n: [s.total, s.log_cusum, s.onset_s] for n, s in self._sums.items()}
        return {"instances": self.instances, "sums": sums}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a snapshot; tests that this baseline does not have are skipped."""
        self.instances = int(state["instances"])
        for name, (total, log_cusum, onset_s) in state["sums"].items():
            if name in self._sums:
                s = self._sums[name]
                s.total, s.log_cusum, s.onset_s = float(total), float(log_cusum), float(onset_s)
