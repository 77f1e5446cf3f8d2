"""Is it the class shares alone? Then everything else, class by class, is as it was.

EM always finds some priors, so what it leaves decides. A test would not do: few reference rows of a class forgive any
residual, and of many instances none fits to the last digit. So the residual is measured, in the embedding, in the
inputs and in the confidences. Called by `diagnosis`; pure.
"""

from __future__ import annotations

import numpy as np

from orchestrator.drift.case import Array, Case, Finding
from orchestrator.drift.estimate import priors_from_shares
from orchestrator.messages import Kind

MIN_CHANGE = 0.10  # total variation of the priors below which there is no prior shift to speak of
MAX_RESIDUAL = 0.25  # part of the squared distance that the reweighted reference may leave
MAX_WEIGHT = 20.0  # a class weighted higher rests on too few reference instances
MAX_INPUT_SIGMAS = 4.5  # of one standardised mean of the inputs against the reweighted reference
INPUT_TOLERANCE = 0.01  # of its variance that is forgiven
MAX_CONFIDENCE_DISTANCE = 0.15  # total variation of the confidence histogram, beyond chance


def find_priors(case: Case) -> Finding | None:
    """Class shares alone: the reference, reweighted by class, leaves no residual shift anywhere."""
    baseline, summary = case.baseline, case.summary
    prior_K = baseline.confusion_KK.sum(axis=0)
    now_K = priors_from_shares(baseline.confusion_KK, summary.class_shares_K)
    change = 0.5 * float(np.abs(now_K - prior_K).sum())
    weight = float((now_K / np.maximum(prior_K, 1e-12)).max())
    if change < MIN_CHANGE or weight > MAX_WEIGHT or not np.isfinite(baseline.accuracy):
        return None
    counts_K = np.maximum(baseline.class_counts_K, 1.0)
    left, before = _feature_residual(case, now_K)
    sigmas = _input_residual(case, now_K, counts_K)
    stray = _confidence_residual(case, now_K, counts_K)
    if left > MAX_RESIDUAL * max(before, 0.0):
        return None
    if sigmas > MAX_INPUT_SIGMAS or stray > MAX_CONFIDENCE_DISTANCE:
        return None
    reason = (
        f"class shares alone explain the shift (change {change:.2f}): distance left {left:.3g} <= {MAX_RESIDUAL} x "
        f"{before:.3g}, inputs off by {sigmas:.1f} <= {MAX_INPUT_SIGMAS} standard errors"
    )
    evidence = {
        "residual_p": case.shift_p,
        "residual": left,
        "shift": before,
        "input_sigmas": sigmas,
        "confidence_stray": stray,
    }
    return Finding(Kind.PRIOR_SHIFT, reason, evidence | {f"prior_{k}": float(v) for k, v in enumerate(now_K)})


def _feature_residual(case: Case, now_K: Array) -> tuple[float, float]:
    """Squared distance of the embedding's mean to the reweighted reference, and to normal; both less chance.

    A feature vector has length sqrt(F / 2), so a class whose mean is mu spreads F / 2 - |mu|^2 about it.
    """
    baseline, summary = case.baseline, case.summary
    num, per_class_K = summary.num_valid, np.maximum(baseline.class_counts_K, 1.0)
    gap_M = summary.feature_mean_M - now_K @ baseline.class_means_KM
    length = len(baseline.normal_mean_M) / 2.0
    spread_K = (length - (baseline.class_means_KM**2).sum(axis=1)) * per_class_K / np.maximum(per_class_K - 1.0, 1.0)
    by_chance = float((now_K * spread_K).sum()) / num + float((now_K**2 * spread_K / per_class_K).sum())
    spread = length - float((baseline.normal_mean_M**2).sum())
    before = float(((summary.feature_mean_M - baseline.normal_mean_M) ** 2).sum())
    return float(gap_M @ gap_M) - by_chance, before - spread * (1.0 / num + 1.0 / baseline.normal_count)


def _input_residual(case: Case, now_K: Array, counts_K: Array) -> float:
    """Largest standardised residual of the inputs' means, in standard errors."""
    expected_X = now_K @ case.baseline.class_inputs_KX
    variance = 1.0 / case.summary.count + float((now_K**2 / counts_K).sum()) + INPUT_TOLERANCE
    sd_X = np.maximum(case.baseline.normal_inputs_2X[1], 0.1)
    return float((np.abs(case.inputs_X - expected_X) / (sd_X * np.sqrt(variance))).max(initial=0.0))


def _confidence_residual(case: Case, now_K: Array, counts_K: Array) -> float:
    """Total variation of the confidence histogram to the reweighted reference's, less what chance gives."""
    expected_B = now_K @ case.baseline.class_confidence_KB
    variance = 1.0 / max(case.summary.num_valid, 1) + float((now_K**2 / counts_K).sum())
    by_chance = 0.4 * float(np.sqrt(expected_B * (1.0 - expected_B) * variance).sum())  # half of E|normal| = 0.8 sd
    return 0.5 * float(np.abs(case.summary.confidence_shares_B - expected_B).sum()) - by_chance
