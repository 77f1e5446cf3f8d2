"""Judges trials on the `choose` rows: one scale for all of them, 0..1, higher is better. Never sees eval data.

Without labels the score is a calibrated confidence. Plain confidence and mutual information grow with every epoch that
maximises them, while accuracy falls (measured: mutual information .86 to .92, accuracy .796 to .794). So each model's
temperature is set anew where its labels are known: on reference rows that no trial trains on, normalised by their own
statistics, its mean confidence must equal its accuracy. What sharpened without learning is cooled by that.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from orchestrator.drift.estimate import em_priors
from orchestrator.drift.statistics import probabilities
from orchestrator.messages import Placement, TrialResult
from tuning.base_model import batches
from tuning.objective import use_batch_statistics

MAX_BATCH_STATISTICS = 512  # calibration rows normalised together in one pass
PRIOR_ROWS = 30.0  # the label-free estimate counts as this many labelled rows
FREE_DISTANCE = 0.3  # total variation of predicted shares to the reference's that is not held against a trial
WINNER_MARGIN = 0.01  # a winner must beat the untouched base by this much ...
TRAINED_MARGIN = 0.002  # ... and a trained one the recomputed statistics by this much, to be worth its cost


def predict(module: nn.Module, inputs: np.ndarray, device: torch.device, batch: int = 256) -> np.ndarray:
    """Logits float32 (N, K) in eval mode; (0, 0) for no rows."""
    module.eval()
    with torch.inference_mode():
        rows = [module(x).float().cpu().numpy() for x in batches(inputs, device, batch)]
    return np.concatenate(rows) if rows else np.empty((0, 0), np.float32)


def match_temperature(logits_NK: np.ndarray, accuracy: float) -> float:
    """Temperature in [0.2, 20] at which the mean confidence equals `accuracy`, by bisection."""
    low, high = 0.2, 20.0
    for _ in range(30):
        middle = float(np.sqrt(low * high))
        if probabilities(logits_NK, middle).max(axis=1).mean() > accuracy:
            low = middle
        else:
            high = middle
    return float(np.sqrt(low * high))


def calibrate(
    module: nn.Module, layers: list[nn.Module], inputs: np.ndarray, labels: np.ndarray, device: torch.device
) -> float:
    """Temperature of a model on reference rows normalised by their own statistics.

    Args:
        module: the model; its running statistics are left as they are.
        layers: normalisation layers that the adapter set to traffic.
        inputs: (N, *shape) of the reference, not trained on.
        labels: int64 (N,).
        device: where the module is.

    Returns:
        The temperature; 1.0 without rows.
    """
    if not len(inputs):
        return 1.0
    saved = [{k: v.clone() for k, v in layer.named_buffers()} for layer in layers]
    use_batch_statistics(module, layers)
    try:
        with torch.no_grad():
            size = MAX_BATCH_STATISTICS if layers else 256
            logits = np.concatenate([module(x).float().cpu().numpy() for x in batches(inputs, device, size)])
    finally:
        for layer, buffers in zip(layers, saved, strict=True):
            for name, value in buffers.items():
                layer.get_buffer(name).copy_(value)
        module.eval()
    return match_temperature(logits, float((logits.argmax(axis=1) == labels).mean()))


def estimate_accuracy(logits_NK: np.ndarray, temperature: float) -> float:
    """Calibrated mean confidence: accuracy expected without labels, 0..1; nan without rows."""
    return float(probabilities(logits_NK, temperature).max(axis=1).mean()) if len(logits_NK) else float("nan")


def class_shares(logits_NK: np.ndarray) -> np.ndarray:
    """Shares of predicted classes, float64 (K,)."""
    return np.bincount(logits_NK.argmax(axis=1), minlength=logits_NK.shape[1]) / max(len(logits_NK), 1)


def total_variation(a_K: np.ndarray, b_K: np.ndarray) -> float:
    """Half the summed difference of two distributions, 0..1."""
    return float(np.abs(a_K - b_K).sum() / 2)


def covariate_score(
    logits_NK: np.ndarray, temperature: float, labels_N: np.ndarray, reference_shares_K: np.ndarray
) -> float:
    """Score of one model under covariate or concept drift.

    The label-free estimate, less what its predicted shares stray from the reference's beyond FREE_DISTANCE (a collapse
    is confident too), drawn towards the accuracy on labelled rows:
    (right + PRIOR_ROWS * estimate) / (rows + PRIOR_ROWS).

    Args:
        logits_NK: on the choose rows, N >= 1.
        temperature: of this model.
        labels_N: int64 (N,), -1 where unknown.
        reference_shares_K: predicted shares of the base on the reference.
    """
    stray = max(0.0, total_variation(class_shares(logits_NK), reference_shares_K) - FREE_DISTANCE)
    estimate = estimate_accuracy(logits_NK, temperature) - stray
    known_N = labels_N >= 0
    right = float((logits_NK.argmax(axis=1) == labels_N)[known_N].sum())
    return (right + PRIOR_ROWS * estimate) / (float(known_N.sum()) + PRIOR_ROWS)


def corrected_posteriors(
    base_logits_NK: np.ndarray, temperature: float, old_priors_K: np.ndarray, new_priors_K: np.ndarray
) -> np.ndarray:
    """Calibrated posteriors of the base under other class priors, float64 (N, K)."""
    ratio_K = np.asarray(new_priors_K) / np.maximum(old_priors_K, 1e-6)
    joint_NK = probabilities(base_logits_NK, temperature) * ratio_K
    return np.asarray(joint_NK / np.maximum(joint_NK.sum(axis=1, keepdims=True), 1e-12))


def prior_shift_score(logits_NK: np.ndarray, posteriors_NK: np.ndarray, labels_N: np.ndarray) -> float:
    """Score of one model under prior shift: how probable its predictions are under the corrected posteriors.

    Labelled rows are counted as in `covariate_score`.
    """
    predicted_N = logits_NK.argmax(axis=1)
    estimate = float(posteriors_NK[np.arange(len(predicted_N)), predicted_N].mean())
    known_N = labels_N >= 0
    right = float((predicted_N == labels_N)[known_N].sum())
    return (right + PRIOR_ROWS * estimate) / (float(known_N.sum()) + PRIOR_ROWS)


def logit_offset(
    base_logits_NK: np.ndarray, temperature: float, old_priors_K: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Bias that corrects the logits for the priors EM finds in the traffic.

    Args:
        base_logits_NK: of the base on traffic, N >= 1.
        temperature: of the base: the offset is applied to uncalibrated logits and grows with it.
        old_priors_K: class shares of the reference.

    Returns:
        Offset float32 (K,), and the new priors float64 (K,).
    """
    old_K = np.maximum(np.asarray(old_priors_K, dtype=np.float64), 1e-4)
    old_K = old_K / old_K.sum()
    new_K = em_priors(probabilities(base_logits_NK, temperature), old_K)
    ratio_K = np.log(np.maximum(new_K, 1e-4) / old_K)  # a class that EM emptied keeps a chance
    return (temperature * (ratio_K - ratio_K.mean())).astype(np.float32), new_K


def choose_winner(results: list[TrialResult], base_score: float) -> TrialResult | None:
    """The trial worth releasing, or None.

    The best score wins; a trained trial must beat the best untrained one by TRAINED_MARGIN, and any winner the
    untouched base by WINNER_MARGIN. Ties go to the cheaper one. Failed trials and nan scores are left out.
    """
    untrained = (Placement.NORM_STATISTICS, Placement.LOGIT_CORRECTION)
    usable = [r for r in results if r.status != "failed" and np.isfinite(r.score)]
    bar = max((r.score for r in usable if r.config.placement in untrained), default=float("-inf"))
    fit = [r for r in usable if r.config.placement in untrained or r.score >= bar + TRAINED_MARGIN]
    winner = max(fit, key=lambda r: (r.score, -r.parameters), default=None)
    return winner if winner is not None and winner.score >= base_score + WINNER_MARGIN else None


def choose_runner_up(results: list[TrialResult], base_score: float, winner: TrialResult) -> TrialResult | None:
    """What is released where the gate refuses the winner: the best of another placement, by `choose_winner`.

    Of another placement, for what one trial does to a class its neighbours do as well.
    """
    return choose_winner([r for r in results if r.config.placement is not winner.config.placement], base_score)
