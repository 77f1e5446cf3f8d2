"""Promote or refuse: the gate's verdict on a candidate, from figures measured on data that trained neither side. Pure.

Called by `healing` when a search has a winner. Each check is one inequality; the message carries those that failed.
*Failed* is measured and bad, *Inconclusive* is measured on too little, *Error* is could not measure.

That an adapter must gain more than its uncertainty is asked before: a winner whose score does not beat the untouched
base's by WINNER_MARGIN (`tuning.scoring`) never comes here. The gate asks what it costs, whom, and how sure that is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from orchestrator.gate_groups import ESTIMATE_SLACK, ROUNDING, SIGNIFICANCE, Check, class_checks, segment_checks
from orchestrator.messages import Analysis, GateDecision, GateEvidence, Kind
from orchestrator.metric import Z_95, sign_test
from orchestrator.settings import HealSettings

MIN_INSTANCES = 32  # below this a class share has a standard error of 9 points: no evidence either way
# Collapse: one class takes most of the answers AND the answers are far from the reference's. Both, because a
# reference may itself be 93% one class (fraud), and total variation bounds how far that class can have grown.
MAX_TOP_SHARE = 0.5
MAX_DISTANCE = 0.3
# A prior shift is a change of exactly these marginals, so only an answer that has become all but constant is refused,
# and a class that left the traffic is no loss.
MAX_TOP_SHARE_PRIOR_SHIFT = 0.95

POWER_Z = 0.842  # a chance of 80% to see what is there
LEAST_EDGE = 0.1  # of wins over losses that anybody would label for: 619 labels

PROXIES = ("residual shift", "estimated accuracy", "accuracy at least")  # checks that give way to a gain by labels

_MEASURED = (
    "reference_base",
    "reference_candidate",
    "reference_share",
    "marginal_max",
    "marginal_distance",
    "estimate_base",
    "estimate_candidate",
)


def decide(evidence: GateEvidence, kind: Kind, settings: HealSettings) -> GateDecision:
    """Whether a candidate may be released.

    Checks, in the order of contract 3.6: loss on the reference on the declared metric, weighted by the share of live
    traffic that still looks like it; the same unweighted, if capped; residual shift; collapse; label-free estimate and
    how sure it is; labels; then every class and every segment by itself.
    Labels that prove a gain on the declared metric (accuracy: exact one-sided sign test over the instances where base
    and candidate disagree; else a swap test) outrank the residual shift and the estimates, which are proxies; they
    never outrank the clean loss, nor a class or a segment that got worse while the mean rose. Without such proof a
    success is provisional.

    Args:
        evidence: what was measured; NaN in a figure that a check needs counts as not measured.
        kind: what the drift was diagnosed as.
        settings: limits.
    """
    error = _why_unmeasured(evidence, kind)
    if error:
        return GateDecision(Analysis.ERROR, error, provisional=False)
    if evidence.instances < MIN_INSTANCES:
        message = f"held-out instances {evidence.instances} < {MIN_INSTANCES}"
        return GateDecision(Analysis.INCONCLUSIVE, message, provisional=False)
    proven = _p_gain(evidence) < SIGNIFICANCE
    results = tuple(_checks(evidence, kind, settings, proven))
    checks = tuple(check for check, _ in results)
    failed = [(check[0], words) for check, words in results if not check[3]]
    if failed:
        message = "; ".join(words for _, words in failed)
        if all(name in PROXIES for name, _ in failed):
            message += _what_would_help(evidence)
        return GateDecision(Analysis.FAILED, message, provisional=False, checks=checks)
    passed = ", ".join(f"{name} {value:.3f} (limit {limit:.3f})" for name, value, limit, _ in checks)
    return GateDecision(Analysis.SUCCESSFUL, passed, provisional=not proven, checks=checks)


def labels_needed(evidence: GateEvidence) -> int:
    """Labels that would most likely decide, of instances on which both models disagree; 0 where they never do.

    A sign test at SIGNIFICANCE sees, four times in five, a gain as large as the estimates say.
    """
    if not evidence.disagreements:
        return 0
    gain = abs(evidence.estimate_candidate - evidence.estimate_base)
    edge = min(1.0, max(gain * evidence.instances / evidence.disagreements, LEAST_EDGE))  # wins less losses, per label
    return math.ceil((Z_95 + POWER_Z) ** 2 / edge**2)


def _what_would_help(evidence: GateEvidence) -> str:
    """Which labels to give; nothing where the traffic has some."""
    num = labels_needed(evidence)
    if evidence.labelled or not num:
        return ""
    first = f" (of {', '.join(evidence.decisive[:3])}, ...)" if evidence.decisive else ""
    return f". About {num} labels of instances that base and candidate answer differently{first} would decide"


def unweighted_loss(evidence: GateEvidence) -> float:
    """Score lost on the reference, on the declared metric; accuracy where the evidence is older than that."""
    if evidence.metric == "accuracy":
        return evidence.reference_base - evidence.reference_candidate
    return evidence.metric_base - evidence.metric_candidate


def clean_loss(evidence: GateEvidence) -> float:
    """Score lost on the reference, weighted by the share of live traffic that looks like it."""
    return unweighted_loss(evidence) * evidence.reference_share


def _p_gain(evidence: GateEvidence) -> float:
    if evidence.metric == "accuracy":
        return sign_test(evidence.labelled_wins, evidence.labelled_losses)
    return evidence.labelled_p_gain if evidence.labelled else 1.0


def _checks(evidence: GateEvidence, kind: Kind, settings: HealSettings, proven: bool) -> Iterator[tuple[Check, str]]:
    """Each check with the inequality that says why it failed."""
    of_metric = "" if evidence.metric == "accuracy" else f" of {evidence.metric}"
    yield _at_most(f"clean loss{of_metric}", clean_loss(evidence), "max_clean_loss", settings.max_clean_loss)
    if settings.max_unweighted_clean_loss is not None:
        name, loss = f"unweighted clean loss{of_metric}", unweighted_loss(evidence)
        yield _at_most(name, loss, "max_unweighted_clean_loss", settings.max_unweighted_clean_loss)
    if kind is not Kind.PRIOR_SHIFT and not proven:
        value, limit = float(evidence.shift_candidate), float(evidence.shift_base)
        yield ("residual shift", value, limit, value < limit), f"residual shift {value:.3f} >= base {limit:.3f}"
    yield from _collapse_checks(evidence, kind)
    if not proven:
        value, limit = float(evidence.estimate_candidate), float(evidence.estimate_base) - ESTIMATE_SLACK
        words = f"estimated accuracy {value:.3f} < base - {ESTIMATE_SLACK:.3f} = {limit:.3f}"
        yield ("estimated accuracy", value, limit, value >= limit), words
        if math.isfinite(evidence.estimate_bound):
            yield _bound_check(evidence, kind)
    if evidence.labelled:
        yield _labels_check(evidence)
    yield from class_checks(evidence, kind)
    yield from segment_checks(evidence, kind, unweighted_loss(evidence), settings.max_clean_loss)


def _bound_check(evidence: GateEvidence, kind: Kind) -> tuple[Check, str]:
    """The lower bound of the new accuracy; it refuses only where labelled rows with the traffic's look confirm a fall.

    Where they do not, its limit is 0: an estimate's width alone is no evidence of harm. Under a concept drift those
    rows' labels are of the old world, and confirm nothing.
    """
    highest = evidence.look_change + Z_95 * evidence.look_change_error
    limit = float(evidence.estimate_base) if highest < 0.0 and kind is not Kind.CONCEPT else 0.0
    value = float(evidence.estimate_bound)
    words = (
        f"accuracy at least {value:.3f} < base {limit:.3f}, and on labelled rows with the traffic's look "
        f"{evidence.look_change:+.3f} ({highest:+.3f} at best)"
    )
    return ("accuracy at least", value, limit, value >= limit), words


def _labels_check(evidence: GateEvidence) -> tuple[Check, str]:
    """Whether true labels show harm on the declared metric."""
    if evidence.metric != "accuracy":
        p = evidence.labelled_p_harm
        words = (
            f"labels: {evidence.metric} {evidence.labelled_metric_candidate:.3f} < base "
            f"{evidence.labelled_metric_base:.3f} (p {p:.3f} < {SIGNIFICANCE:.3f})"
        )
    else:
        p = sign_test(evidence.labelled_losses, evidence.labelled_wins)
        words = (
            f"labels: right only under the candidate {evidence.labelled_wins} < only under the base "
            f"{evidence.labelled_losses} (p {p:.3f} < {SIGNIFICANCE:.3f})"
        )
    return ("p of harm by labels", p, SIGNIFICANCE, p >= SIGNIFICANCE), words


def _collapse_checks(evidence: GateEvidence, kind: Kind) -> Iterator[tuple[Check, str]]:
    if kind is Kind.PRIOR_SHIFT:
        yield _at_most("top class share", evidence.marginal_max, "limit", MAX_TOP_SHARE_PRIOR_SHIFT)
        return
    limit = MAX_TOP_SHARE if evidence.marginal_distance > MAX_DISTANCE else 1.0
    yield _at_most("top class share", evidence.marginal_max, "limit", limit)
    yield _at_most("classes lost", evidence.classes_lost, "limit", 0)


def _at_most(name: str, value: float, limit_name: str, limit: float) -> tuple[Check, str]:
    words = f"{name} {value:.3f} > {limit_name} {limit:.3f}"
    return (name, float(value), float(limit), value <= limit + ROUNDING), words


def _why_unmeasured(evidence: GateEvidence, kind: Kind) -> str:
    if evidence.error:
        return f"could not measure: {evidence.error}"
    needed = _MEASURED if kind is Kind.PRIOR_SHIFT else (*_MEASURED, "shift_base", "shift_candidate")
    if evidence.metric != "accuracy":
        needed = (*needed, "metric_base", "metric_candidate")
    missing = [name for name in needed if not math.isfinite(getattr(evidence, name))]
    return f"could not measure: {', '.join(missing)} is not a number" if missing else ""
