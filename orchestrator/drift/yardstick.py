"""One vector of sums against what is normal *for the classes that were predicted*.

    r = x - sum_k n_k m_k,   T = |r|^2 / (sum_k n_k t_k + sum_k n_k^2 t_k / N_k) - n_eff * tolerance

x sums a window's vectors, n_k counts its predictions of class k, m_k is what such a prediction brings along, t_k its
variance, N_k the reference rows behind it. A burst of one class, a day-and-night cycle and a prior shift move x and n
together and cancel; a change of what the classes look like does not. The second term of the variance is the reference's
own error: averaged over references the law is exact. Pure; used for the outputs and for the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.drift.null import (
    BOOTSTRAP_SCALES,
    MAX_POOL,
    NUM_WINDOWS,
    SCALES,
    draw_rows,
    gaussian_table,
    p_value,
    scale_index,
    tail_table,
)

Array = NDArray[Any]

SHRINK_ROWS = 5.0  # a class's mean is drawn towards the overall mean as if by this many rows ...
SHRINK_SPREAD_ROWS = 20.0  # ... and its variance as if by this many
RIDGE = 1e-3  # of the inversion that finds what a prediction brings along from what a true class does
MAX_KURTOSIS = 10.0  # of an entry that is tested: an exponential has 9
MIN_EIGENVALUE = 1e-3  # of the largest: directions of less variance are not stretched to unit variance
LEAST_SCORE_SD = 0.01  # nats, of an entropy that is weighted in full
CHUNK = 512  # windows of the bootstrap at once


@dataclass(frozen=True)
class Yardstick:
    """Normal per predicted class, in mixed coordinates."""

    mix_VW: Array  # V x W: what the raw vector is multiplied by; (V,) for weights of single entries
    means_KW: Array  # m_k
    spread_K: Array  # t_k, total variance
    counts_K: Array  # N_k
    tables_ST: Array  # a row per scale: quantiles of T and mean excess, see `null.tail_table`
    tolerance: float  # squared distance, in total variances, that is never drift

    @cached_property
    def _error_K(self) -> Array:
        """Variance of the mean of each class."""
        return np.asarray(self.spread_K / np.maximum(self.counts_K, 1.0))

    def mixed(self, raw_NV: Array) -> Array:
        """Raw vectors (N, V) or (V,) in mixed coordinates."""
        return raw_NV * self.mix_VW if self.mix_VW.ndim == 1 else raw_NV @ self.mix_VW

    def residual(self, raw_V: Array, counts_K: Array) -> Array:
        """Residual of a window's sums (V,) and its predictions by class (K,): float64 (W,). Additive over windows."""
        return np.asarray(self.mixed(raw_V) - counts_K @ self.means_KW)

    def statistic(self, residual_W: Array, counts_K: Array) -> Array:
        """T of a residual (W,) with its counts (K,), or of a row of each: float64 () or (R,); 0 for no instance."""
        own = counts_K @ self.spread_K
        variance = np.maximum(own + (counts_K * counts_K) @ self._error_K, 1e-300)
        forgiven = counts_K.sum(axis=-1) * own * self.tolerance
        return np.asarray((np.vecdot(residual_W, residual_W) - forgiven) / variance)

    def p_value(self, residual_W: Array, counts_K: Array) -> float:
        """P-value of a window's residual; 1 for no instance."""
        statistic = float(self.statistic(residual_W, counts_K))
        return p_value(max(statistic, 0.0), self.tables_ST[scale_index(float(counts_K.sum()))])


def whitening_mix(raw_NV: Array) -> Array:
    """Matrix (V, W) that makes the sample's covariance unit, but for directions of hardly any variance.

    Entries with long tails are left out (W < V): a few rows of a sample say nothing of how far the next one lies, and
    one such row moves a window's mean.
    """
    light_V = _kurtosis(raw_NV) <= MAX_KURTOSIS
    if not light_V.any():
        return np.zeros((raw_NV.shape[1], 0))
    values_W, vectors_WW = np.linalg.eigh(np.atleast_2d(np.cov(raw_NV[:, light_V], rowvar=False)))
    least = max(MIN_EIGENVALUE * float(values_W[-1]), 1e-12)
    mix_VW = np.zeros((raw_NV.shape[1], len(values_W)))
    mix_VW[light_V] = vectors_WW / np.sqrt(np.maximum(values_W, least))
    return mix_VW


def _kurtosis(raw_NV: Array) -> Array:
    """Fourth moment of each entry in its squared variance, (V,): 3 for a Gaussian, 0 for a constant."""
    centred_NV = raw_NV - raw_NV.mean(axis=0)
    variance_V = (centred_NV**2).mean(axis=0)
    return np.asarray((centred_NV**4).mean(axis=0) / np.maximum(variance_V, 1e-12) ** 2)


def score_weights(residual_NV: Array, share: float) -> Array:
    """Weights (V,) that are 1, but for the last entry, whose variance becomes `share` of the others' sum.

    Less where it hardly varies: a model that is always sure would have rounding blown up.
    """
    weights_V = np.ones(residual_NV.shape[1])
    variance_V = residual_NV.var(axis=0)
    weights_V[-1] = np.sqrt(share * variance_V[:-1].sum() / max(float(variance_V[-1]), LEAST_SCORE_SD**2))
    return weights_V


def class_means(raw_NV: Array, predicted_N: Array, truth_N: Array, num_classes: int) -> Array:
    """What a prediction of each class brings along on average: (K, V).

    Where classes are known: solved for, so that every true class's mean is the mix of what its predictions bring along.
    That holds under any class shares. Source: the moment equation of Lipton et al. 2018 (BBSE), turned round.
    """
    overall_V = raw_NV.mean(axis=0)
    counts_K = np.bincount(predicted_N, minlength=num_classes)
    sums_KV = np.zeros((num_classes, raw_NV.shape[1]))
    np.add.at(sums_KV, predicted_N, raw_NV)
    plain_KV = (sums_KV + SHRINK_ROWS * overall_V) / (counts_K + SHRINK_ROWS)[:, None]
    if np.array_equal(predicted_N, truth_N):
        return np.asarray(plain_KV)
    joint_KK = np.zeros((num_classes, num_classes))  # true, predicted
    np.add.at(joint_KK, (truth_N, predicted_N), 1.0)
    true_K = joint_KK.sum(axis=1)
    known = true_K > 0
    given_KK = joint_KK[known] / true_K[known, None]
    true_sums_KV = np.zeros((num_classes, raw_NV.shape[1]))
    np.add.at(true_sums_KV, truth_N, raw_NV)
    target_KV = true_sums_KV[known] / true_K[known, None]
    normal_KK = given_KK.T @ given_KK + RIDGE * np.eye(num_classes)
    return np.asarray(plain_KV + np.linalg.solve(normal_KK, given_KK.T @ (target_KV - given_KK @ plain_KV)))


def fit_yardstick(
    raw_NV: Array,
    mix_VW: Array,
    predicted_N: Array,
    truth_N: Array,
    num_classes: int,
    tolerance: float,
    rng: np.random.Generator,
) -> Yardstick:
    """Fit means, spreads and null tables.

    Args:
        raw_NV: vectors of normal instances, finite, N >= 2.
        mix_VW: see `Yardstick.mix_VW`.
        predicted_N: predicted class of each.
        truth_N: true class where known, else the predicted one.
        num_classes: K.
        tolerance: see `Yardstick.tolerance`.
        rng: seeded: equal inputs give equal yardsticks.
    """
    mixed_NW = raw_NV * mix_VW if mix_VW.ndim == 1 else raw_NV @ mix_VW
    means_KW = class_means(mixed_NW, predicted_N, truth_N, num_classes)
    residual_NW = (mixed_NW - means_KW[predicted_N]).astype(np.float32)
    counts_K = np.bincount(predicted_N, minlength=num_classes).astype(np.float64)
    squares_N = (residual_NW.astype(np.float64) ** 2).sum(axis=1)
    total = max(float(squares_N.mean()), 1e-12)
    by_class_K = np.bincount(predicted_N, squares_N, num_classes) * counts_K / np.maximum(counts_K - 1.0, 1.0)
    spread_K = (by_class_K + SHRINK_SPREAD_ROWS * total) / (counts_K + SHRINK_SPREAD_ROWS)
    tables_ST = _tables(residual_NW, predicted_N, truth_N, spread_K, rng)
    return Yardstick(mix_VW, means_KW, spread_K, counts_K, tables_ST, tolerance)


def _tables(residual_NW: Array, predicted_N: Array, truth_N: Array, spread_K: Array, rng: np.random.Generator) -> Array:
    if len(residual_NW) > MAX_POOL:
        rows_N = rng.choice(len(residual_NW), MAX_POOL, replace=False)
        residual_NW, predicted_N, truth_N = residual_NW[rows_N], predicted_N[rows_N], truth_N[rows_N]
    covariance_WW = np.atleast_2d(np.cov(residual_NW, rowvar=False))
    limit_T = gaussian_table(np.linalg.eigvalsh(covariance_WW), rng)
    rows = []
    for num, windows in zip(SCALES[:BOOTSTRAP_SCALES], NUM_WINDOWS, strict=True):
        drawn = [
            tail_table(_bootstrap(residual_NW, spread_K[predicted_N], truth_N, num, windows // 2, bursty, rng))
            for bursty in (False, True)
        ]
        rows.append(np.maximum(*drawn))  # the worse of the two
    return np.stack(rows + [limit_T] * (len(SCALES) - len(rows)))


def _bootstrap(
    residual_NW: Array,
    spread_N: Array,
    truth_N: Array,
    num: int,
    windows: int,
    bursty: bool,
    rng: np.random.Generator,
) -> Array:
    """T (reference taken as exact, no tolerance) of windows drawn from the sample."""
    found = []
    for _ in range(0, windows, CHUNK):
        rows_WN = draw_rows(truth_N, num, CHUNK, bursty, rng)
        flat_N = (rows_WN + np.arange(CHUNK)[:, None] * len(residual_NW)).ravel()
        draws_WN = np.bincount(flat_N, minlength=CHUNK * len(residual_NW)).reshape(CHUNK, -1)
        sums_WW = (draws_WN.astype(np.float32) @ residual_NW).astype(np.float64)
        found.append((sums_WW**2).sum(axis=1) / spread_N[rows_WN].sum(axis=1))
    return np.concatenate(found)
