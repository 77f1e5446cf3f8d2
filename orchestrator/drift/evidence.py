"""What a window says against "nothing has changed": four statistics and their p-values, from sums that add up.

`outputs`: embedding and entropy against the predicted classes; `inputs`: channels against the predicted classes;
`classes`: shares of predicted classes; `checks`: anomalous inputs. Called by detector, monitor and diagnosis; pure.
"""

from __future__ import annotations

import math

import numpy as np

from orchestrator.drift.baseline import Array, Baseline
from orchestrator.drift.null import p_value, scale_index
from orchestrator.drift.statistics import CHECKS
from orchestrator.messages import Window
from orchestrator.settings import FEATURE_SCALE, FOURIER_SCALE

CHECK_FLOORS = {"nan": 0.01, "invalid": 0.01, "constant": 0.01, "out_of_range": 0.02, "duplicates": 0.10}
CLASS_TOLERANCE = 0.05  # chi-square distance of class shares that is never drift: a day and its night, +-20%
MIN_DISPERSION, MAX_DISPERSION = 4.0, 80.0  # of class counts, in those of independent traffic


class Evidence:
    """Sums over instances in one vector; those of two windows add up.

    Attributes, of one vector (V,) or a row for each of several (R, V):
        vector: all of it.
        outputs_W: residual of embedding and entropy, see `yardstick`.
        inputs_W: residual of the channels; (0,) where inputs are not tested.
        classes_K: valid instances by predicted class.
        checks_C: anomalous inputs in the order of CHECKS.
        count: instances, float64 () or (R,).
    """

    __slots__ = ("checks_C", "classes_K", "count", "inputs_W", "outputs_W", "vector")

    def __init__(self, vector: Array, baseline: Baseline) -> None:
        outputs, inputs, classes, _ = _ends(baseline)
        self.vector = vector
        self.outputs_W, self.inputs_W = vector[..., :outputs], vector[..., outputs:inputs]
        self.classes_K, self.checks_C = vector[..., inputs:classes], vector[..., classes:-1]
        self.count = vector[..., -1]


def evidence_size(baseline: Baseline) -> int:
    """Length of a vector of evidence."""
    return _ends(baseline)[-1]


def _ends(baseline: Baseline) -> tuple[int, int, int, int]:
    """Where outputs, inputs, classes and the whole vector (checks, then the count) end."""
    outputs = int(baseline.outputs.means_KW.shape[1])
    inputs = outputs + (0 if baseline.inputs is None else int(baseline.inputs.means_KW.shape[1]))
    classes = inputs + baseline.num_classes
    return outputs, inputs, classes, classes + len(CHECKS) + 1


def evidence_of(baseline: Baseline, window: Window) -> Evidence:
    """A window's evidence; raises ValueError when its vector has another length than the baseline's layout."""
    layout = baseline.layout
    if len(window.sums) != layout.size:
        raise ValueError(f"a window's vector must have {layout.size} entries; got {len(window.sums)}")
    at, sums = layout.slices, window.sums
    classes_K = sums[at["classes"]].astype(np.float64)
    features_V = np.append(sums[at["features"]] / FOURIER_SCALE, sums[at["entropy_sum"]] / FEATURE_SCALE)
    parts = [baseline.outputs.residual(features_V, classes_K)]
    if baseline.inputs is not None:
        inputs_V = np.append(sums[at["channel_means"]], sums[at["channel_squares"]]) / FEATURE_SCALE
        parts.append(baseline.inputs.residual(inputs_V, _as_if_valid(baseline, classes_K, window.count)))
    vector = np.concatenate([*parts, classes_K, sums[at["checks"]], [window.count]])
    return Evidence(vector, baseline)


def _as_if_valid(baseline: Baseline, classes_K: Array, count: Array | float) -> Array:
    """Instances by predicted class, those without valid outputs spread over the classes: (K,) or (R, K)."""
    valid, count = classes_K.sum(axis=-1), np.asarray(count)
    if np.array_equal(valid, count):
        return classes_K
    spread_K = classes_K * (count / np.maximum(valid, 1.0))[..., None]
    return np.where(valid[..., None] > 0, spread_K, baseline.class_shares_K * count[..., None])


def inputs_statistic(baseline: Baseline, found: Evidence) -> Array:
    """Statistic of the input channels, () or (R,); 0 where they are not tested."""
    if baseline.inputs is None:
        return np.zeros(found.count.shape)
    return baseline.inputs.statistic(found.inputs_W, _as_if_valid(baseline, found.classes_K, found.count))


def outputs_p(baseline: Baseline, found: Evidence) -> float:
    """P-value of embedding and entropy; 1 for no valid instance."""
    return baseline.outputs.p_value(found.outputs_W, found.classes_K)


def inputs_p(baseline: Baseline, found: Evidence) -> float:
    """P-value of the input channels; 1 where they are not tested."""
    if baseline.inputs is None or found.count == 0:
        return 1.0
    return baseline.inputs.p_value(found.inputs_W, _as_if_valid(baseline, found.classes_K, found.count))


def classes_statistic(baseline: Baseline, classes_K: Array, dispersion: float) -> Array:
    """Chi-square of predicted class shares over its degrees of freedom, less the tolerance; 0 for no instance.

    Args:
        baseline: of the digest.
        classes_K: valid instances by predicted class, (K,) or (R, K).
        dispersion: variance of class counts in that of independent traffic.

    Returns:
        float64 () or (R,).
    """
    num = classes_K.sum(axis=-1)
    if baseline.num_classes < 2:
        return np.zeros(num.shape)
    used = np.maximum(num, 1.0)
    effective = 1.0 / (min(max(dispersion, MIN_DISPERSION), MAX_DISPERSION) / used + 1.0 / baseline.normal_count)
    expected_K = baseline.class_shares_K + 0.5 / baseline.normal_count
    distance = ((classes_K / used[..., None] - baseline.class_shares_K) ** 2 / expected_K).sum(axis=-1)
    found = np.maximum(effective * (distance - CLASS_TOLERANCE), 0.0) / (baseline.num_classes - 1)
    return np.asarray(np.where(num > 0, found, 0.0))


def classes_p(baseline: Baseline, classes_K: Array, dispersion: float) -> float:
    """P-value of predicted class shares; 1 for no instance."""
    return p_value(float(classes_statistic(baseline, classes_K, dispersion)), baseline.classes_table_T)


def tolerated_rates(baseline: Baseline) -> Array:
    """Shares of anomalous inputs that are still normal: three times the reference's upper estimate, and a floor."""
    num = baseline.normal_count
    floors_C = np.array([CHECK_FLOORS[name] for name in CHECKS])
    upper_C = (baseline.check_rates * num + 1.0) / (num + 2.0)
    return np.asarray(np.minimum(np.maximum(floors_C, 3.0 * upper_C), 0.9))


def checks_statistic(tolerated_C: Array, checks_C: Array, count: Array) -> Array:
    """Largest log likelihood ratio of an input check firing more often than tolerated: exp(-it) bounds its p-value.

    Args:
        tolerated_C: see `tolerated_rates`.
        checks_C: anomalous inputs, (C,) or (R, C).
        count: instances, () or (R,).

    Returns:
        float64 () or (R,).

    Source: Chernoff 1952, Ann. Math. Stat. 23:493.
    """
    num = np.asarray(count, dtype=np.float64)
    if not (checks_C > tolerated_C * num[..., None]).any():
        return np.zeros(num.shape)
    rate_C = np.clip(checks_C / np.maximum(num, 1.0)[..., None], tolerated_C, 1.0)
    clear_C = np.maximum(1.0 - rate_C, 1e-12)
    terms_C = rate_C * np.log(rate_C / tolerated_C) + clear_C * np.log(clear_C / (1.0 - tolerated_C))
    return np.asarray(num * terms_C.max(axis=-1))


def checks_p(baseline: Baseline, found: Evidence) -> float:
    """Bound on the p-value of the input checks."""
    statistic = float(checks_statistic(tolerated_rates(baseline), found.checks_C, found.count))
    return min(1.0, len(CHECKS) * math.exp(-statistic))


def difference_p(baseline: Baseline, left: Evidence, right: Evidence) -> float:
    """P-value of two windows having the same residual outputs and inputs, the smaller doubled; 1 without instances."""
    nums = float(left.classes_K.sum()), float(right.classes_K.sum())
    if min(nums) == 0:
        return 1.0
    smallest = 1.0
    effective = nums[0] * nums[1] / sum(nums)
    for stick, left_W, right_W in (
        (baseline.outputs, left.outputs_W, right.outputs_W),
        (baseline.inputs, left.inputs_W, right.inputs_W),
    ):
        if stick is None:
            continue
        gap_W = left_W / nums[0] - right_W / nums[1]
        spread = float((left.classes_K + right.classes_K) @ stick.spread_K) / sum(nums)
        smallest = min(
            smallest, p_value(effective * float(gap_W @ gap_W) / spread, stick.tables_ST[scale_index(effective)])
        )
    return min(1.0, 2.0 * smallest)
