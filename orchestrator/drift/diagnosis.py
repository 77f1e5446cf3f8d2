"""Which kind of drift is it, and does it harm? A decision list, from the most special cause to the most general.

Broken inputs first (they imitate covariate drift in embedding space), then one broken replica, then a mere change of
class shares, then covariate drift by its estimated loss. Whatever does not fit is `unknown`. Concept drift cannot be
seen here: without labels it looks like nothing. Called by the controller; pure.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.drift.baseline import Baseline
from orchestrator.drift.estimate import estimate_accuracies, estimate_loss, priors_from_shares
from orchestrator.drift.evalues import channel_p_value, feature_p_value, scale_index, tolerated_rate
from orchestrator.drift.null import CHANNEL_TOLERANCE, TOLERANCE, distance_statistic, p_value
from orchestrator.drift.statistics import CHECKS, MAX_PRODUCT_CHANNELS, Summary, read
from orchestrator.messages import Alarm, Diagnosis, Kind, Window
from orchestrator.settings import HealSettings

Array = NDArray[Any]

MIN_INSTANCES = 32  # valid ones, to tell one kind of drift from another
NORMAL_P = 0.05  # features and channels above this: the alarm was false
CHECK_SIGMAS = 4.0  # standard errors above the tolerated rate that make an input check speak
MIN_CHECK_SHARE = 0.05  # a rarer defect does not explain an alarm
SWAP_MIN_DISTANCE = 30.0  # squared standard errors by which the channels must be off ...
SWAP_MAX_RATIO = 0.1  # ... and the part of it that may be left after swapping them back
GAIN_RANGE = (0.05, 8.0)  # input spread against normal: outside, a scale was forgotten or applied twice
PRIOR_MIN_CHANGE = 0.10  # total variation of the priors below which there is no prior shift to speak of
PRIOR_RESIDUAL_P = 0.01  # the reweighted reference must be as close as this p-value says ...
PRIOR_MAX_RESIDUAL = 0.25  # ... and leave no more than this part of the statistic
PRIOR_MAX_WEIGHT = 20.0  # a class weighted higher rests on too few reference instances


@dataclass(frozen=True)
class _Case:
    """What every rule looks at."""

    baseline: Baseline
    summary: Summary
    alarm: Alarm
    fleet_size: int
    settings: HealSettings


@dataclass(frozen=True)
class _Finding:
    """A rule's conclusion."""

    kind: Kind
    reason: str
    evidence: dict[str, Any]


def diagnose(baseline: Baseline, window: Window, alarm: Alarm, fleet_size: int, settings: HealSettings) -> Diagnosis:
    """Tell the kind of drift from the merged window since the onset.

    Args:
        baseline: of the alarm's digest.
        window: everything under that digest since the onset; with a replica or segment scope, best only its part.
        alarm: what the sequential test raised.
        fleet_size: replicas that are alive.
        settings: `harm_threshold` separates benign from harmful.

    Returns:
        Kind, a reason in one sentence with its inequality, and evidence as plain numbers and words. `none` when the
        longer window shows nothing any more.

    Raises:
        ValueError: the window's vector does not fit the baseline's layout.
    """
    summary = read(baseline.layout, window)
    case = _Case(baseline, summary, alarm, fleet_size, settings)
    evidence = _evidence(case)
    loss = estimate_loss(baseline, summary)
    for rule in (_find_bad_values, _find_gain, _find_swap, _find_replica, _find_too_few, _find_nothing, _find_priors):
        finding = rule(case)
        if finding is not None:
            break
    else:
        finding = _weigh_harm(case, loss)
    finite_loss = loss if math.isfinite(loss) else 0.0
    return Diagnosis(finding.kind, finding.reason, window.count, finite_loss, {**evidence, **finding.evidence})


def _evidence(case: _Case) -> dict[str, Any]:
    baseline, summary = case.baseline, case.summary
    estimates = estimate_accuracies(baseline, summary)
    change = 0.5 * float(np.abs(summary.class_shares_K - baseline.class_shares_K).sum())
    numbers = {
        "feature_p": feature_p_value(baseline, summary),
        "channel_p": channel_p_value(baseline, summary),
        "class_share_change": change,
        **{f"{name}_share": summary.check_counts[name] / max(summary.count, 1) for name in CHECKS},
        **{f"accuracy_{name}": value for name, value in estimates.items() if math.isfinite(value)},
    }
    return {"scope": case.alarm.scope, "returned": case.alarm.returned, **{k: float(v) for k, v in numbers.items()}}


def _find_bad_values(case: _Case) -> _Finding | None:
    """NaN, non-finite outputs, constant (black) inputs, values out of range, repeated inputs."""
    num = max(case.summary.count, 1)
    for name in CHECKS:
        tolerated = tolerated_rate(case.baseline, name)
        share = case.summary.check_counts[name] / num
        limit = max(tolerated + CHECK_SIGMAS * math.sqrt(tolerated * (1.0 - tolerated) / num), MIN_CHECK_SHARE)
        if share > limit:
            words = name.replace("_", " ")
            reason = f"share of inputs with check '{words}' {share:.3f} > {limit:.3f}"
            return _Finding(Kind.DATA_QUALITY, reason, {"check": name, "share": share, "limit": limit})
    return None


def _raw_moments(case: _Case) -> tuple[Array, Array, Array, Array]:
    """Channel means and standard deviations over positions in input units: window's, then normal's."""
    mu_C, scale_C = case.baseline.channel_mean_C, case.baseline.channel_scale_C

    def moments(z_C: Array, v_C: Array) -> tuple[Array, Array]:
        return mu_C + scale_C * z_C, scale_C * np.sqrt(np.maximum(v_C - z_C**2, 0.0))

    now = moments(case.summary.channel_means_C, case.summary.channel_squares_C)
    normal = moments(case.baseline.normal_channels_3C[0], case.baseline.normal_channels_3C[1])
    return *now, *normal


def _find_gain(case: _Case) -> _Finding | None:
    """A forgotten or repeated normalisation: the inputs' spread changes by orders of magnitude."""
    _, spread_C, _, normal_C = _raw_moments(case)
    used_C = normal_C > 1e-9 * (1.0 + np.abs(case.baseline.channel_mean_C))
    if not used_C.any():
        return None
    gain = float(np.median(spread_C[used_C] / normal_C[used_C]))
    if GAIN_RANGE[0] <= gain <= GAIN_RANGE[1]:
        return None
    reason = f"spread of input values is {gain:.4g} of normal, outside [{GAIN_RANGE[0]:g}, {GAIN_RANGE[1]:g}]"
    return _Finding(Kind.DATA_QUALITY, reason, {"check": "gain", "gain": gain})


def _find_swap(case: _Case) -> _Finding | None:
    """Channels in another order: some permutation brings their means back, nothing else does."""
    num_channels = case.baseline.num_channels
    if not 2 <= num_channels <= MAX_PRODUCT_CHANNELS:
        return None
    mean_C, spread_C, normal_mean_C, normal_spread_C = _raw_moments(case)
    num = case.summary.count
    inflation = 1.0 + num * (1.5 / case.baseline.normal_count + CHANNEL_TOLERANCE / 4.0)
    weights_CC = case.baseline.channel_whitening_CC / case.baseline.channel_scale_C[:, None]

    def off_by(order: tuple[int, ...]) -> float:
        index = list(order)
        gap_C = (mean_C[index] - normal_mean_C) @ weights_CC
        spread_gap_C = np.log(np.maximum(spread_C[index], 1e-12) / np.maximum(normal_spread_C, 1e-12))
        return float(num * (gap_C @ gap_C + spread_gap_C @ spread_gap_C) / inflation)

    same = tuple(range(num_channels))
    as_is = off_by(same)
    best = min((order for order in itertools.permutations(same) if order != same), key=off_by)
    left = off_by(best)
    if as_is < SWAP_MIN_DISTANCE or left > SWAP_MAX_RATIO * as_is:
        return None
    reason = (
        f"input channels fit normal in the order {list(best)}: distance {left:.1f} <= {SWAP_MAX_RATIO} x {as_is:.1f}"
    )
    return _Finding(Kind.DATA_QUALITY, reason, {"check": "swapped_channels", "order": str(list(best))})


def _find_replica(case: _Case) -> _Finding | None:
    """One replica strayed and the others, on the same traffic, did not (the monitor saw to that)."""
    if not case.alarm.scope.startswith("replica:") or case.fleet_size < 2:
        return None
    reason = f"only {case.alarm.scope} of {case.fleet_size} strayed: {_inequality(case.alarm)}"
    return _Finding(Kind.REPLICA_FAULT, reason, {})


def _find_too_few(case: _Case) -> _Finding | None:
    if case.summary.num_valid >= MIN_INSTANCES:
        return None
    reason = f"valid instances {case.summary.num_valid} < {MIN_INSTANCES}: too few to tell"
    return _Finding(Kind.UNKNOWN, reason, {})


def _find_nothing(case: _Case) -> _Finding | None:
    """A false alarm, or a drift that only a part of the traffic shows."""
    p = min(feature_p_value(case.baseline, case.summary), channel_p_value(case.baseline, case.summary))
    if p <= NORMAL_P:
        return None
    reason = f"no shift left in {case.summary.count} instances: p {p:.3f} > {NORMAL_P}"
    if case.alarm.scope == "global":
        return _Finding(Kind.NONE, reason, {})
    return _Finding(Kind.UNKNOWN, f"{case.alarm.scope} raised the alarm alone; {reason}", {})


def _find_priors(case: _Case) -> _Finding | None:
    """Class shares alone: the reference, reweighted by class, leaves no residual shift."""
    baseline, summary = case.baseline, case.summary
    prior_K = baseline.confusion_KK.sum(axis=0)
    now_K = priors_from_shares(baseline.confusion_KK, summary.class_shares_K)
    change = 0.5 * float(np.abs(now_K - prior_K).sum())
    weight = float((now_K / np.maximum(prior_K, 1e-12)).max())
    if change < PRIOR_MIN_CHANGE or weight > PRIOR_MAX_WEIGHT or not np.isfinite(baseline.accuracy):
        return None
    per_class_K = np.maximum(prior_K * baseline.reference_count, 1.0)
    effective = 1.0 / float((now_K**2 / per_class_K).sum())
    num, row = summary.num_valid, scale_index(summary.num_valid)
    expected_M = now_K @ baseline.class_means_KM
    residual = distance_statistic(summary.feature_mean_M, expected_M, num, max(int(effective), 1), TOLERANCE)
    p = p_value(residual, baseline.null_quantiles_SQ[row], float(baseline.null_tails_S[row]))
    left, before = _prior_gaps(baseline, summary, now_K, per_class_K)
    # Not rejected is not the same as fits: few reference rows of a class forgive any residual, so it is measured too.
    if p < PRIOR_RESIDUAL_P or left > PRIOR_MAX_RESIDUAL * max(before, 0.0):
        return None
    reason = f"class shares alone explain the shift (change {change:.2f}): residual p {p:.3f} >= {PRIOR_RESIDUAL_P}"
    priors = {f"prior_{k}": float(value) for k, value in enumerate(now_K)}
    return _Finding(Kind.PRIOR_SHIFT, reason, {"residual_p": p, "residual": left, "shift": before, **priors})


def _prior_gaps(baseline: Baseline, summary: Summary, now_K: Array, per_class_K: Array) -> tuple[float, float]:
    """Squared distance of the window's feature mean to the reweighted reference, and to normal; both less chance.

    A feature vector has length sqrt(F / 2), so a class whose mean is mu spreads F / 2 - |mu|^2 about it.
    """
    length = len(baseline.normal_mean_M) / 2.0
    class_spread_K = (length - (baseline.class_means_KM**2).sum(axis=1)) * per_class_K / np.maximum(per_class_K - 1, 1)
    by_chance = float(
        (now_K * class_spread_K).sum() / summary.num_valid + (now_K**2 * class_spread_K / per_class_K).sum()
    )
    left = float(((summary.feature_mean_M - now_K @ baseline.class_means_KM) ** 2).sum()) - by_chance
    spread = length - float((baseline.normal_mean_M**2).sum())
    before = float(((summary.feature_mean_M - baseline.normal_mean_M) ** 2).sum())
    return left, before - spread * (1.0 / summary.num_valid + 1.0 / baseline.normal_count)


def _weigh_harm(case: _Case, loss: float) -> _Finding:
    limit = case.settings.harm_threshold
    if not math.isfinite(loss):
        return _Finding(Kind.UNKNOWN, "the loss of accuracy could not be estimated", {})
    if loss < limit:
        return _Finding(Kind.COVARIATE_BENIGN, f"inputs changed, estimated loss {loss:.3f} < {limit:.3f}", {})
    reason = f"inputs changed ({_inequality(case.alarm)}), estimated loss {loss:.3f} >= {limit:.3f}"
    return _Finding(Kind.COVARIATE_HARMFUL, reason, {})


def _inequality(alarm: Alarm) -> str:
    return f"statistic {alarm.statistic:.3g} >= threshold {alarm.threshold:.3g}"
