"""The metric that a model spec declares, as one number, and the exact or resampled tests that compare two models on it.

Called by the gate's measurement and by the gate. Pure: numpy and labels, no model. All scores read alike: higher is
better, 1 is perfect, and a cost table in which every mistake costs the same gives the accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Metric = str | dict[str, Any]  # as `ModelSpec.metric` holds it

NUM_SWAPS = 2000  # resamples of a swap test: p is known to 0.5 points at 0.05
Z_95 = 1.645  # one-sided, of a normal distribution
UNNAMED_COST = 1.0  # of a mistake that a cost table leaves out


def metric_name(metric: Metric) -> str:
    """The metric as the spec spells it; a cost table is called `cost`."""
    return metric if isinstance(metric, str) else "cost"


def score(metric: Metric, classes: Sequence[str], labels_N: Array, predicted_N: Array) -> float:
    """Score of predictions on the declared metric.

    `accuracy`: share of right answers. `balanced_accuracy`: mean recall of the classes that have rows. `f1:<class>`:
    2 TP / (2 TP + FP + FN) of that class. `cost`: 1 - mean cost / mean cost of a wrong answer, the latter over all
    wrong answers to the true labels at hand; a mistake that the table leaves out costs 1, a right answer 0 unless the
    table says otherwise. 0 is thus as bad as being always wrong at random, and dearer mistakes fall below 0.

    Args:
        metric: of the model spec.
        classes: its names, in the order of the logits.
        labels_N: int64 (N,), 0..K-1.
        predicted_N: int64 (N,), 0..K-1.

    Returns:
        At most 1; nan without rows, for an F1 of a class that is neither there nor predicted, and for a table in which
        no mistake on these labels costs anything.
    """
    if not len(labels_N):
        return float("nan")
    right_N = predicted_N == labels_N
    if metric == "accuracy":
        return float(right_N.mean())
    if metric == "balanced_accuracy":
        rows_K, right_K = np.bincount(labels_N), np.bincount(labels_N, weights=right_N)
        return float((right_K[rows_K > 0] / rows_K[rows_K > 0]).mean())
    if isinstance(metric, str):
        wanted = list(classes).index(metric.removeprefix("f1:"))
        return f1(labels_N == wanted, predicted_N == wanted, np.ones(len(labels_N)))
    cost_KK = cost_table(metric["cost"], classes)
    wrong_K = (cost_KK.sum(axis=1) - cost_KK.diagonal()) / (len(classes) - 1)
    worst = float(wrong_K[labels_N].mean())
    return 1.0 - float(cost_KK[labels_N, predicted_N].mean()) / worst if worst > 0 else float("nan")


def f1(is_class_N: Array, called_N: Array, weights_N: Array) -> float:
    """F1 of one class: 2 TP / (2 TP + FP + FN) over weighted rows; nan where it is neither there nor called."""
    either = float(weights_N @ is_class_N + weights_N @ called_N)
    return 2.0 * float(weights_N @ (is_class_N & called_N)) / either if either > 0 else float("nan")


def cost_table(costs: dict[str, dict[str, float]], classes: Sequence[str]) -> Array:
    """Cost of answering the column's class where the row's is true, float64 (K, K)."""
    cost_KK = UNNAMED_COST * (1.0 - np.eye(len(classes)))
    place = {name: k for k, name in enumerate(classes)}
    for true, row in costs.items():
        for predicted, cost in row.items():
            cost_KK[place[true], place[predicted]] = cost
    return np.asarray(cost_KK)


def sign_test(wins: int, losses: int) -> float:
    """Exact one-sided p-value of at least this many wins if both sides were equally good; 1.0 without any trial."""
    trials = wins + losses
    if trials == 0:
        return 1.0
    return sum(math.comb(trials, k) for k in range(wins, trials + 1)) / (1 << trials)


def swap_test(
    metric: Metric, classes: Sequence[str], labels_N: Array, base_N: Array, candidate_N: Array, seed: int
) -> tuple[float, float]:
    """One-sided p-values that the candidate scores better, and that it scores worse, than the base on the same rows.

    If both were equally good, swapping their answers on any row would change nothing: each of NUM_SWAPS resamples
    swaps every row with probability 1/2. Rows on which both answer alike decide nothing.

    Args:
        metric: of the model spec.
        classes: its names.
        labels_N: int64 (N,), all known.
        base_N: int64 (N,), answers.
        candidate_N: int64 (N,), answers.
        seed: of the resamples.

    Returns:
        p of gain, p of harm; 1.0 and 1.0 where the two never differ or a score is nan.

    Source: Phipson & Smyth 2010, Stat. Appl. Genet. Mol. Biol. 9:39, for the p-value (b + 1) / (m + 1).
    """
    differs_N = base_N != candidate_N
    if not differs_N.any():
        return 1.0, 1.0

    def gain(swapped_N: Array) -> float:
        ours_N, theirs_N = np.where(swapped_N, base_N, candidate_N), np.where(swapped_N, candidate_N, base_N)
        return score(metric, classes, labels_N, ours_N) - score(metric, classes, labels_N, theirs_N)

    seen = gain(np.zeros(len(labels_N), dtype=bool))
    rng = np.random.default_rng(seed)
    drawn_M = np.array([gain(differs_N & (rng.random(len(labels_N)) < 0.5)) for _ in range(NUM_SWAPS)])
    if not math.isfinite(seen) or not np.isfinite(drawn_M).all():
        return 1.0, 1.0
    as_good, as_bad = (drawn_M >= seen - 1e-12).sum(), (drawn_M <= seen + 1e-12).sum()
    return float(as_good + 1) / (NUM_SWAPS + 1), float(as_bad + 1) / (NUM_SWAPS + 1)
