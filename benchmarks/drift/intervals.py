"""Intervals of the figures: rates clustered by run, medians by bootstrap."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 4000


def rate_per_million(alarms: Sequence[int], instances_per_run: int, seed: int = 0) -> tuple[float, float, float]:
    """Alarms per million instances and its 95% interval; each run is a cluster.

    The larger of a bootstrap over runs and the exact Poisson bound is taken on the upper side, the smaller on the
    lower: with few alarms a bootstrap knows too little.
    """
    alarms_R = np.asarray(alarms, dtype=np.float64)
    millions = len(alarms_R) * instances_per_run / 1e6
    rng = np.random.default_rng(seed)
    draws_BR = rng.integers(0, len(alarms_R), (RESAMPLES, len(alarms_R)))
    low, high = np.percentile(alarms_R[draws_BR].sum(axis=1), [2.5, 97.5])
    total = int(alarms_R.sum())
    poisson_low, poisson_high = poisson_interval(total)
    return total / millions, min(low, poisson_low) / millions, max(high, poisson_high) / millions


def poisson_interval(total: int) -> tuple[float, float]:
    """Exact 95% interval of a Poisson mean (Garwood 1936), by bisection."""

    def at_most(k: int, mean: float) -> float:
        return sum(math.exp(i * math.log(mean) - mean - math.lgamma(i + 1)) for i in range(k + 1)) if mean > 0 else 1.0

    def solve(k: int, target: float) -> float:
        low, high = 0.0, 10.0 + 4.0 * (k + 1)
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if at_most(k, middle) > target else (low, middle)
        return high

    return (0.0 if total == 0 else solve(total - 1, 0.975)), solve(total, 0.025)


def ratio_interval(top: Sequence[float], bottom: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Median of the paired ratios and its 95% bootstrap interval."""
    ratios = np.asarray(top) / np.asarray(bottom)
    rng = np.random.default_rng(seed)
    medians = np.median(ratios[rng.integers(0, len(ratios), (RESAMPLES, len(ratios)))], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


def mean_time_interval(alarms: Sequence[int], instances: Sequence[int], seed: int = 0) -> tuple[float, float, float]:
    """Instances per alarm and its 95% bootstrap interval over runs; infinite where there was no alarm."""
    alarms_R, instances_R = np.asarray(alarms, dtype=np.float64), np.asarray(instances, dtype=np.float64)
    rng = np.random.default_rng(seed)
    draws_BR = rng.integers(0, len(alarms_R), (RESAMPLES, len(alarms_R)))
    with np.errstate(divide="ignore"):
        times = instances_R[draws_BR].sum(axis=1) / alarms_R[draws_BR].sum(axis=1)
        point = float(instances_R.sum() / alarms_R.sum())
    low, high = np.percentile(times, [2.5, 97.5])
    return point, float(low), float(high)
