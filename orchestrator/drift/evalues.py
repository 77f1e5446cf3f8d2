"""What one step of traffic says against "nothing has changed", as e-values: bets whose fair price is at most 1.

Each function takes the means of one merged window and answers a number >= 0 with expectation <= DISCOUNT while the
traffic is normal. The detector multiplies them up. Pure.
"""

from __future__ import annotations

import math

import numpy as np

from orchestrator.drift.baseline import Baseline
from orchestrator.drift.null import (
    CHANNEL_TOLERANCE,
    REFERENCE_INFLATION,
    SCALES,
    TOLERANCE,
    distance_statistic,
    p_value,
)
from orchestrator.drift.statistics import CHECKS, Summary

CALIBRATORS = (0.1, 0.3, 0.5)  # kappa of kappa p^(kappa - 1); Vovk & Wang 2021, E-values: calibration and combination
P_FLOOR = 1.0e-5  # no p-value counts as smaller: a table from a few thousand windows knows no more
DISCOUNT = 0.7  # price of a bet: the null table may be off by 40% in expectation before the bound breaks
COARSE_MIN_REFERENCE = 4 * SCALES[1]  # normal instances needed for the slow scale
MIN_SEPARATION = 2.0  # standard deviations at SCALES[0] between two worlds that can be told apart
RETURN_BETS = (1.0, 2.0, 3.0)  # tilts of the Gaussian likelihood ratio, standard deviations
CHECK_FLOORS = {"nan": 0.01, "invalid": 0.01, "constant": 0.01, "out_of_range": 0.02, "duplicates": 0.10}
CHECK_ALTERNATIVES = (0.25, 0.75, 0.97)  # anomalous shares bet on, beside four times the tolerated one
MAX_CHECK_EVALUE = 1.0e4


def p_to_e(p: float) -> float:
    """E-value of a p-value in (0, 1]: a mean of power calibrators, floored at P_FLOOR, times DISCOUNT."""
    floored = max(p, P_FLOOR)
    bets = [k * math.pow(floored, k - 1.0) for k in CALIBRATORS]
    return DISCOUNT * sum(bets) / len(bets)


MAX_EVALUE: float = p_to_e(P_FLOOR)


def scale_index(num: int) -> int:
    """Which row of the null table serves a window of `num` instances: the nearest scale in ratio."""
    return int(np.argmin([abs(math.log(max(num, 1) / scale)) for scale in SCALES]))


def feature_p_value(baseline: Baseline, summary: Summary) -> float:
    """P-value of the window's feature mean against the digest's normal traffic; 1 for no valid instance."""
    row = scale_index(summary.num_valid)
    statistic = distance_statistic(
        summary.feature_mean_M, baseline.normal_mean_M, summary.num_valid, baseline.normal_count, TOLERANCE
    )
    return p_value(statistic, baseline.null_quantiles_SQ[row], float(baseline.null_tails_S[row]))


def channel_p_value(baseline: Baseline, summary: Summary) -> float:
    """P-value of the input's channel means against normal; 1 above 4 channels, where they are not tested."""
    if len(baseline.null_quantiles_SQ) == len(SCALES):
        return 1.0
    gap_C = (summary.channel_means_C - baseline.normal_channels_3C[0]) @ baseline.channel_whitening_CC
    statistic = distance_statistic(gap_C, np.zeros_like(gap_C), summary.count, baseline.normal_count, CHANNEL_TOLERANCE)
    return p_value(statistic, baseline.null_quantiles_SQ[-1], float(baseline.null_tails_S[-1]))


def difference_p_value(baseline: Baseline, left: Summary, right: Summary) -> float:
    """P-value of two windows having one feature mean or one channel mean, the smaller doubled; 1 without instances."""
    num = left.num_valid * right.num_valid // max(left.num_valid + right.num_valid, 1)
    if num == 0:
        return 1.0
    shift = num * float(((left.feature_mean_M - right.feature_mean_M) ** 2).sum())
    row = scale_index(num)
    p = p_value(shift, baseline.null_quantiles_SQ[row], float(baseline.null_tails_S[row]))
    if len(baseline.null_quantiles_SQ) > len(SCALES):
        gap_C = (left.channel_means_C - right.channel_means_C) @ baseline.channel_whitening_CC
        p = min(
            p, p_value(num * float(gap_C @ gap_C), baseline.null_quantiles_SQ[-1], float(baseline.null_tails_S[-1]))
        )
    return min(1.0, 2.0 * p)


def has_two_worlds(baseline: Baseline) -> bool:
    """Whether the old world can be told from the digest's normal one: MIN_SEPARATION at SCALES[0] instances."""
    gap = float(np.linalg.norm(baseline.reference_mean_M - baseline.normal_mean_M))
    return gap > 0 and gap * math.sqrt(SCALES[0]) >= MIN_SEPARATION * max(baseline.direction_scale, 1e-9)


def return_evalue(baseline: Baseline, summary: Summary) -> float:
    """Bet that the window moved from normal towards the old world; only where `has_two_worlds`.

    z of the projection on the line between the means, Gaussian likelihood ratios for shifts of RETURN_BETS, averaged.
    """
    num = summary.num_valid
    if num == 0:
        return 1.0
    direction_M = baseline.reference_mean_M - baseline.normal_mean_M
    along = float((summary.feature_mean_M - baseline.normal_mean_M) @ direction_M) / float(np.linalg.norm(direction_M))
    inflation = 1.0 + num * (REFERENCE_INFLATION / baseline.normal_count + TOLERANCE)
    z = along * math.sqrt(num / inflation) / max(baseline.direction_scale, 1e-9)
    bets = [math.exp(min(bet * z - bet * bet / 2.0, 50.0)) for bet in RETURN_BETS]
    return DISCOUNT * min(sum(bets) / len(bets), MAX_EVALUE)


def tolerated_rate(baseline: Baseline, name: str) -> float:
    """Share of anomalous inputs that is still normal: three times the reference's upper estimate, and a floor."""
    rate = float(baseline.check_rates[CHECKS.index(name)])
    num = baseline.normal_count
    return min(max(CHECK_FLOORS[name], 3.0 * (rate * num + 1.0) / (num + 2.0)), 0.9)


def checks_evalue(baseline: Baseline, summary: Summary) -> float:
    """Bet that some input check fires more often than tolerated: binomial likelihood ratios, averaged over checks."""
    ratios = []
    for name in CHECKS:
        fired, tolerated = summary.check_counts[name], tolerated_rate(baseline, name)
        clear = summary.count - fired
        for share in (min(4.0 * tolerated, 0.95), *CHECK_ALTERNATIVES):
            if share <= tolerated:
                continue
            log_ratio = fired * math.log(share / tolerated) + clear * math.log((1.0 - share) / (1.0 - tolerated))
            ratios.append(math.exp(min(log_ratio, 50.0)))
    return min(sum(ratios) / len(ratios), MAX_CHECK_EVALUE)
