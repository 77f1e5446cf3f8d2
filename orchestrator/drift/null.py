"""How far a window's mean strays when nothing is wrong: the null distribution of one quadratic statistic.

`yardstick` fits a table per scale once, `detector` and `diagnosis` turn a statistic into a p-value with it. Pure.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SCALES: tuple[int, ...] = tuple(4 << j for j in range(12))  # instances of a tested window: from severe to mild shifts
BOOTSTRAP_SCALES = 7  # up to 256 instances the table is drawn from the sample; above, the Gaussian limit holds
SURVIVAL_Q = np.array([0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01])  # survival probabilities of a table's quantiles
TAIL_INFLATION = 1.1  # the mean excess beyond the last quantile is stretched by this: an estimate from some 40 windows
MAX_POOL = 2048  # instances of the sample that windows are drawn from
NUM_WINDOWS = (4096, 4096, 4096, 4096, 4096, 2048, 2048)  # drawn per scale, half of them class-bursty
NUM_GAUSSIAN = 4096
BURST = 20  # mean length of a run of one class in a bursty window: cameras do not shuffle what they see


def draw_rows(truth_N: Array, num: int, windows: int, bursty: bool, rng: np.random.Generator) -> Array:
    """Row numbers of random windows, with replacement: int64 (windows, num); bursty: in runs of one class."""
    if not bursty:
        return rng.integers(0, len(truth_N), (windows, num))
    order_N = np.argsort(truth_N, kind="stable")
    counts_K = np.bincount(truth_N)
    starts_K = np.cumsum(counts_K) - counts_K
    new_WN = rng.random((windows, num)) < 1.0 / BURST
    new_WN[:, 0] = True
    drawn_WN = truth_N[rng.integers(0, len(truth_N), (windows, num))]
    run_WN = np.maximum.accumulate(np.where(new_WN, np.arange(num), 0), axis=1)
    class_WN = np.take_along_axis(drawn_WN, run_WN, axis=1)
    within_WN = (rng.random((windows, num)) * counts_K[class_WN]).astype(np.int64)
    return np.asarray(order_N[starts_K[class_WN] + within_WN])


def tail_table(statistics_W: Array) -> Array:
    """Quantiles at SURVIVAL_Q, then the mean excess beyond the last one, stretched: (len(SURVIVAL_Q) + 1,)."""
    quantiles_Q = np.quantile(statistics_W, 1.0 - SURVIVAL_Q)
    excess = float((statistics_W[statistics_W >= quantiles_Q[-1]] - quantiles_Q[-1]).mean())
    return np.append(quantiles_Q, max(excess * TAIL_INFLATION, 1e-9))


def gaussian_table(eigenvalues_V: Array, rng: np.random.Generator) -> Array:
    """Table of sum(l z^2) / sum(l), z standard normal: the limit for long windows."""
    used_V = eigenvalues_V[eigenvalues_V > 0]
    if not len(used_V):
        return tail_table(np.zeros(NUM_GAUSSIAN))
    return tail_table((rng.standard_normal((NUM_GAUSSIAN, len(used_V))) ** 2) @ (used_V / used_V.sum()))


def scale_index(num: float) -> int:
    """Which scale's table serves a window of `num` instances: the nearest in ratio."""
    return int(np.clip(round(float(np.log2(max(num, 1.0) / SCALES[0]))), 0, len(SCALES) - 1))


def p_value(statistic: float, table_T: Array) -> float:
    """P(T >= statistic) under the null: log-linear between quantiles, an exponential tail beyond; in (0, 1]."""
    last, excess = float(table_T[-2]), float(table_T[-1])
    if statistic >= last:
        return float(max(SURVIVAL_Q[-1] * np.exp(-(statistic - last) / excess), 1e-300))
    quantiles_Q = np.append(0.0, table_T[:-1])
    return float(np.exp(np.interp(statistic, quantiles_Q, np.append(0.0, np.log(SURVIVAL_Q)))))


def critical_value(level: float, table_T: Array) -> float:
    """The statistic whose p-value is `level`, in (0, 1]: the inverse of `p_value`."""
    last, excess = float(table_T[-2]), float(table_T[-1])
    if level <= SURVIVAL_Q[-1]:
        return last + excess * float(np.log(SURVIVAL_Q[-1] / level))
    rising_Q = np.append(np.log(SURVIVAL_Q)[::-1], 0.0)
    return float(np.interp(np.log(level), rising_Q, np.append(table_T[:-1][::-1], 0.0)))
