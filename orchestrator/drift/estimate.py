"""What can be said about accuracy and class shares without labels: estimates, and honest only about covariate shift.

Every method here assumes that P(label | input) did not change. Under concept drift they said 80-86% where the truth
was 43%: they may veto, never promote by themselves. Called by diagnosis and by the search's finish; pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.drift.baseline import Baseline
from orchestrator.drift.statistics import Summary

Array = NDArray[Any]

EM_ITERATIONS = 200
MIN_MASS = 0.10  # smallest share of the reference that a density ratio is read from ...
MIN_ROWS = 20  # ... and its smallest number of rows
SHARE_SIGMAS = 2.5  # standard errors added to each density ratio before the smallest is taken
MAX_SHARE_ROWS = 2000  # rows of either sample that the classifier learns from
MAX_SHARE_DIMENSIONS = 64
RIDGE = 1.0  # L2 penalty per coefficient of the standardised logistic regression
NUM_FOLDS = 5
_SEED = 20240301


def estimate_accuracies(baseline: Baseline, summary: Summary) -> dict[str, float]:
    """Label-free estimates of a window's accuracy; nan where the baseline has no labels or no instance is valid.

    Returns:
        `average_confidence`: mean calibrated confidence (Hendrycks & Gimpel 2017);
        `difference_of_confidence`: reference accuracy minus the fall in confidence (Guillory et al. 2021);
        `atc`: share of confidences above the threshold that the reference exceeds as often as it is right (Garg 2022);
        `bins`: reference accuracy per confidence bin, reweighted.
    """
    if summary.num_valid == 0:
        return dict.fromkeys(("average_confidence", "difference_of_confidence", "atc", "bins"), float("nan"))
    return _from_histogram(baseline, summary.mean_confidence, summary.confidence_shares_B)


def _from_histogram(baseline: Baseline, mean_confidence: float, shares_B: Array) -> dict[str, float]:
    first = int(np.searchsorted(baseline.confidence_edges_E, baseline.atc_threshold, side="right"))
    has_labels = np.isfinite(baseline.accuracy)
    return {
        "average_confidence": mean_confidence,
        "difference_of_confidence": baseline.accuracy - (baseline.reference_confidence - mean_confidence),
        "atc": float(shares_B[first:].sum()) if has_labels else float("nan"),
        "bins": float(shares_B @ baseline.bin_accuracy_B),
    }


@dataclass(frozen=True)
class LossEstimate:
    """Accuracy lost against the digest's normal traffic, without labels; nan when no instance is valid."""

    loss: float  # 0..1
    standard_error: float  # of sampling alone: the methods' own bias comes on top


def estimate_loss(baseline: Baseline, summary: Summary) -> LossEstimate:
    """Accuracy lost against the digest's normal traffic: the mean of the methods' differences, at least 0."""
    if summary.num_valid == 0:
        return LossEstimate(float("nan"), float("nan"))
    now = estimate_accuracies(baseline, summary)
    normal = _from_histogram(baseline, baseline.mean_confidence, baseline.confidence_shares_B)
    losses = [normal[name] - now[name] for name in ("average_confidence", "atc", "bins")]
    known = [loss for loss in losses if np.isfinite(loss)]
    # What one instance adds to the methods' mean depends on its confidence bin alone (nearly: see mean_confidence).
    value_B = _value_of_bins(baseline)
    variance = sum(
        _variance(value_B, shares_B) / num
        for shares_B, num in (
            (summary.confidence_shares_B, summary.num_valid),
            (baseline.confidence_shares_B, baseline.normal_count),
        )
    )
    return LossEstimate(max(0.0, float(np.mean(known))), float(np.sqrt(variance)))


def _value_of_bins(baseline: Baseline) -> Array:
    edges_B = np.concatenate([baseline.confidence_edges_E[:1], baseline.confidence_edges_E])
    values = [edges_B, baseline.bin_accuracy_B]
    if np.isfinite(baseline.accuracy):
        first = int(np.searchsorted(baseline.confidence_edges_E, baseline.atc_threshold, side="right"))
        values.append(np.arange(len(edges_B)) >= first)
    return np.asarray(np.mean(values, axis=0))


def _variance(value_B: Array, shares_B: Array) -> float:
    return float(shares_B @ value_B**2 - (shares_B @ value_B) ** 2)


def em_priors(probabilities_NK: Array, priors_K: Array) -> Array:
    """Class priors of unlabelled traffic by EM on calibrated probabilities.

    Right only when the shift is a prior shift. Classes of prior 0 stay at 0.

    Args:
        probabilities_NK: calibrated P(class | input) under the old priors, N >= 1.
        priors_K: class shares of the reference.

    Returns:
        float64 (K,), sums to 1.

    Raises:
        ValueError: no rows, or widths differ.

    Source: Saerens, Latinne & Decaestecker 2002, Neural Computation 14:21.
    """
    if len(probabilities_NK) == 0 or probabilities_NK.shape[1] != len(priors_K):
        raise ValueError(f"em_priors needs (N >= 1, {len(priors_K)}) probabilities; got {probabilities_NK.shape}")
    old_K = np.asarray(priors_K, dtype=np.float64) / np.sum(priors_K)
    ratio_NK = np.asarray(probabilities_NK, dtype=np.float64) / np.maximum(old_K, 1e-12)
    new_K = old_K.copy()
    for _ in range(EM_ITERATIONS):
        joint_NK = ratio_NK * new_K
        updated_K = (joint_NK / np.maximum(joint_NK.sum(axis=1, keepdims=True), 1e-300)).mean(axis=0)
        if np.abs(updated_K - new_K).max() < 1e-7:
            break
        new_K = updated_K
    return np.asarray(updated_K / updated_K.sum())


def priors_from_shares(confusion_KK: Array, predicted_shares_K: Array) -> Array:
    """Class priors from shares of predicted classes and the reference's confusion, by maximum likelihood (EM).

    Args:
        confusion_KK: joint P(predicted i, true j) on the reference.
        predicted_shares_K: shares of predicted classes in the traffic, sum to 1.

    Returns:
        float64 (K,), sums to 1; a class that the reference lacks gets 0.

    Source: the likelihood form of Lipton et al. 2018, Detecting and correcting for label shift (BBSE).
    """
    prior_K = confusion_KK.sum(axis=0)
    given_KK = confusion_KK / np.maximum(prior_K, 1e-12)  # P(predicted i | true j)
    new_K = prior_K / prior_K.sum()
    for _ in range(EM_ITERATIONS):
        expected_K = np.maximum(given_KK @ new_K, 1e-12)
        new_K = new_K * (given_KK.T @ (predicted_shares_K / expected_K))
        new_K = new_K / max(float(new_K.sum()), 1e-300)
    return np.asarray(new_K)


@dataclass(frozen=True)
class Mixture:
    """Traffic as a mixture of what looks like the reference and what does not."""

    share: float  # that looks like the reference, 0..1
    drifted_N: Array  # bool, by row of the traffic: the rest, those that look least like it


def split_mixture(reference_ND: Array, traffic_ND: Array) -> Mixture:
    """How much of the traffic still looks like the reference, and which rows do not: a mixture proportion.

    traffic = a reference + (1 - a) other bounds a <= P(score > t | traffic) / P(score > t | reference) at every t. A
    cross-fitted logistic regression on principal components and their squares gives the score; a is the smallest
    ratio over thresholds that leave MIN_MASS of the reference, each raised by SHARE_SIGMAS standard errors against the
    luck of the minimum. An upper bound in kind: where drifted instances look like reference ones, it stays high.

    Args:
        reference_ND: features of the reference, N >= 20.
        traffic_ND: features of the traffic through the same model, N >= 20.

    Returns:
        A share near 1 for samples of one distribution, near 0 for separable ones; as many rows as it leaves.

    Raises:
        ValueError: too few rows, or widths differ; the message gives both.

    Source: Garg et al. 2021, Mixture proportion estimation and PU learning: a modern approach.
    """
    if min(len(reference_ND), len(traffic_ND)) < MIN_ROWS or reference_ND.shape[1] != traffic_ND.shape[1]:
        got = (reference_ND.shape, traffic_ND.shape)
        raise ValueError(f"split_mixture needs >= {MIN_ROWS} rows and equal widths; got {got[0]} and {got[1]}")
    rng = np.random.default_rng(_SEED)
    kept_N, asked_N = (rng.permutation(len(part))[:MAX_SHARE_ROWS] for part in (reference_ND, traffic_ND))
    rows_ND = np.concatenate([reference_ND[kept_N], traffic_ND]).astype(np.float64)
    x_NE = _expand(rows_ND, len(kept_N))
    is_traffic_N = np.repeat([0.0, 1.0], [len(kept_N), len(traffic_ND)])
    used_N = np.concatenate([np.arange(len(kept_N)), len(kept_N) + asked_N])
    fold_N = rng.integers(0, NUM_FOLDS, size=len(x_NE))
    score_N = np.zeros(len(x_NE))  # of looking like traffic
    for fold in range(NUM_FOLDS):
        trains_N = used_N[fold_N[used_N] != fold]
        held_N = fold_N == fold
        score_N[held_N] = x_NE[held_N] @ _fit_logistic(x_NE[trains_N], is_traffic_N[trains_N])
    traffic_N = score_N[len(kept_N) :]
    share = _smallest_ratio(score_N[: len(kept_N)], traffic_N[asked_N])
    return Mixture(share, traffic_N > np.quantile(traffic_N, share))


def _expand(rows_ND: Array, num_reference: int) -> Array:
    """Standardised principal components of the reference, their squares and 1; fewer components for few rows."""
    reference_ND = rows_ND[:num_reference]
    center_D = reference_ND.mean(axis=0)
    _, values_R, vectors_RD = np.linalg.svd(reference_ND - center_D, full_matrices=False)
    keep = min(MAX_SHARE_DIMENSIONS, max(1, len(rows_ND) // 10), len(values_R))
    scale_P = np.maximum(values_R[:keep], 1e-6 * max(float(values_R[0]), 1e-12)) / np.sqrt(num_reference)
    z_NP = np.clip((rows_ND - center_D) @ vectors_RD[:keep].T / scale_P, -10.0, 10.0)
    raw_NE = np.concatenate([z_NP, z_NP**2], axis=1)
    scaled_NE = (raw_NE - raw_NE.mean(axis=0)) / np.maximum(raw_NE.std(axis=0), 1e-9)
    return np.concatenate([scaled_NE, np.ones((len(rows_ND), 1))], axis=1)


def _fit_logistic(x_NE: Array, y_N: Array) -> Array:
    """Ridge logistic regression, classes of equal weight, by damped Newton steps: float64 (E,)."""
    balance_N = np.where(y_N > 0, 0.5 / max(float(y_N.mean()), 1e-9), 0.5 / max(float(1.0 - y_N.mean()), 1e-9))
    weights_E = np.zeros(x_NE.shape[1])
    for _ in range(12):
        p_N = 1.0 / (1.0 + np.exp(-np.clip(x_NE @ weights_E, -30.0, 30.0)))
        gradient_E = x_NE.T @ (balance_N * (p_N - y_N)) + RIDGE * weights_E
        curvature_N = balance_N * np.maximum(p_N * (1.0 - p_N), 1e-4)
        hessian_EE = (x_NE * curvature_N[:, None]).T @ x_NE + RIDGE * np.eye(len(weights_E))
        step_E = np.linalg.solve(hessian_EE, gradient_E)
        weights_E = weights_E - step_E / max(1.0, float(np.abs(step_E).max()))
    return weights_E


def _smallest_ratio(reference_N: Array, traffic_N: Array) -> float:
    """Min over thresholds of P(traffic <= t) / P(reference <= t), each raised by its sampling error; capped at 1.

    Low scores look like the reference. Both shares err, and the smallest of many ratios is a lucky one: without the
    raise, equal samples of some hundred rows would give 0.7 to 0.8, and a share too small makes a gate too lenient.
    """
    thresholds_T = np.quantile(reference_N, np.linspace(MIN_MASS, 1.0, 40))
    num_reference, num_traffic = len(reference_N), len(traffic_N)
    reference_T = (reference_N[:, None] <= thresholds_T).mean(axis=0)
    usable_T = reference_T * num_reference >= MIN_ROWS / 2
    if not usable_T.any():
        return 1.0
    traffic_T = ((traffic_N[:, None] <= thresholds_T).sum(axis=0) + 1.0) / (num_traffic + 2.0)
    ratio_T = traffic_T / np.maximum(reference_T, 1e-9)
    variance_T = traffic_T * (1.0 - traffic_T) / num_traffic
    variance_T += ratio_T**2 * reference_T * (1.0 - reference_T) / num_reference
    upper_T = ratio_T + SHARE_SIGMAS * np.sqrt(variance_T) / np.maximum(reference_T, 1e-9)
    return float(np.clip(upper_T[usable_T].min(), 0.0, 1.0))
