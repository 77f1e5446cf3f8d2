"""How far a window's feature mean strays from the reference when nothing is wrong.

`baseline` calibrates the null distribution once, `detector` and `diagnosis` turn a statistic into a p-value with it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SCALES = (32, 256)  # instances per test: fast for severe shifts, slow for mild ones
REFERENCE_INFLATION = 1.5  # variance of a mean of n against one of N counts as 1/n + 1.5/N; 1 would be the plain law
TOLERANCE = 1.0e-3  # squared distance, in total feature variances, that is never drift: worlds never repeat exactly
CHANNEL_TOLERANCE = 0.02  # the same for means of input channels: light changes over a day
NUM_SPLITS = 8
WINDOWS_PER_SPLIT = 512
SMALL_SAMPLE = 16.0  # T is stretched by 1 + 16/N: a handful of instances does not know its own variance
MAX_POOL = 4096  # instances of the normal sample used to calibrate
TAIL_PROBABILITY = 0.01  # beyond this an exponential tail is fitted
TAIL_INFLATION = 1.1  # its mean excess is stretched by this: an estimate from some 40 windows
SURVIVAL_Q = 0.5 ** (np.arange(0, 27) / 4.0)  # survival probabilities of the table's quantiles, 1 .. 0.011


def distance_statistic(mean_M: Array, centre_M: Array, num: int, num_reference: int, tolerance: float) -> float:
    """T = n |mean - centre|^2 / (1 + n (1.5 / N + tolerance)); 0 for an empty window.

    Args:
        mean_M: feature mean of the window.
        centre_M: feature mean of the reference.
        num: n, instances of the window.
        num_reference: N, instances behind the centre.
        tolerance: squared distance per total feature variance that is forgiven.
    """
    if num == 0:
        return 0.0
    gap = float(((mean_M - centre_M) ** 2).sum())
    return num * gap / (1.0 + num * (REFERENCE_INFLATION / num_reference + tolerance))


def calibrate(features_NM: Array, num: int, rng: np.random.Generator) -> tuple[Array, float]:
    """Null distribution of T for windows of `num` instances, by split bootstrap.

    The sample is halved at random NUM_SPLITS times; one half gives the centre, windows drawn with replacement from the
    other half give T. Several splits spread the luck of one reference over the table. Distances between the halves
    are about four times what the full sample causes later, so the table errs to the safe side.

    Args:
        features_NM: (N, M) random Fourier features (or other vectors) of the normal sample, N >= 4.
        num: window size.
        rng: a seeded generator: equal inputs give equal tables.

    Returns:
        Ascending quantiles (len(SURVIVAL_Q),) and the mean excess of the exponential tail.
    """
    pool_NM = np.asarray(features_NM, dtype=np.float32)
    if len(pool_NM) > MAX_POOL:
        pool_NM = pool_NM[rng.choice(len(pool_NM), MAX_POOL, replace=False)]
    half = len(pool_NM) // 2
    statistics = []
    for _ in range(NUM_SPLITS):
        order_N = rng.permutation(len(pool_NM))
        centre_M = pool_NM[order_N[:half]].mean(axis=0)
        other_NM = pool_NM[order_N[half:]] - centre_M
        draws_WN = rng.multinomial(num, np.full(len(other_NM), 1.0 / len(other_NM)), size=WINDOWS_PER_SPLIT)
        means_WM = draws_WN.astype(np.float32) @ other_NM / num
        squares_W = (means_WM.astype(np.float64) ** 2).sum(axis=1)
        statistics.append(num * squares_W / (1.0 + num * REFERENCE_INFLATION / half))
    all_W = np.concatenate(statistics) * (1.0 + SMALL_SAMPLE / len(pool_NM))
    quantiles_Q = np.quantile(all_W, 1.0 - SURVIVAL_Q)
    start = np.quantile(all_W, 1.0 - TAIL_PROBABILITY)
    excess = float((all_W[all_W >= start] - start).mean())
    return quantiles_Q, max(excess * TAIL_INFLATION, 1e-9)


def p_value(statistic: float, quantiles_Q: Array, tail: float) -> float:
    """P(T >= statistic) under the null: log-linear between quantiles, an exponential tail beyond; in (0, 1]."""
    last = float(quantiles_Q[-1])
    if statistic >= last:
        return float(max(SURVIVAL_Q[-1] * np.exp(-(statistic - last) / tail), 1e-300))
    return float(np.exp(np.interp(statistic, quantiles_Q, np.log(SURVIVAL_Q))))
