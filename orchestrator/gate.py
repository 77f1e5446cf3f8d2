"""Promote or refuse: the gate's verdict on a candidate, from figures measured on data that trained neither side. Pure.

Called by `healing` when a search has a winner. Each check is one inequality; the message carries those that failed.
*Failed* is measured and bad, *Inconclusive* is measured on too little, *Error* is could not measure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from orchestrator.messages import Analysis, GateDecision, GateEvidence, Kind
from orchestrator.settings import HealSettings

MIN_INSTANCES = 32  # below this a class share has a standard error of 9 points: no evidence either way
SIGNIFICANCE = 0.05  # one-sided, of the sign test on labelled disagreements
ROUNDING = 1e-9  # of the figures: 0.90 - 0.87 is no more than 0.03
ESTIMATE_SLACK = 0.02  # label-free estimates repeat to about this; only a fall beyond it is a veto
# Collapse: one class takes most of the answers AND the answers are far from the reference's. Both, because a
# reference may itself be 93% one class (fraud), and total variation bounds how far that class can have grown.
MAX_TOP_SHARE = 0.5
MAX_DISTANCE = 0.3
# A prior shift is a change of exactly these marginals, so only an answer that has become all but constant is refused,
# and a class that left the traffic is no loss.
MAX_TOP_SHARE_PRIOR_SHIFT = 0.95

Check = tuple[str, float, float, bool]  # name, value, limit, passed
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

    Checks, in the order of contract 3.6: reference accuracy lost, weighted by the share of live traffic that still
    looks like the reference; the same unweighted, if capped; residual shift; collapse; label-free estimate; labels.
    Labels that prove a gain (exact one-sided sign test over the instances where base and candidate disagree) outrank
    the residual shift and the estimate, which are proxies; they never outrank the clean loss. Without such proof a
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
    proven = sign_test(evidence.labelled_wins, evidence.labelled_losses) < SIGNIFICANCE
    results = tuple(_checks(evidence, kind, settings, proven))
    checks = tuple(check for check, _ in results)
    failed = "; ".join(words for check, words in results if not check[3])
    if failed:
        return GateDecision(Analysis.FAILED, failed, provisional=False, checks=checks)
    passed = ", ".join(f"{name} {value:.3f} (limit {limit:.3f})" for name, value, limit, _ in checks)
    return GateDecision(Analysis.SUCCESSFUL, passed, provisional=not proven, checks=checks)


def sign_test(wins: int, losses: int) -> float:
    """Exact one-sided p-value of at least this many wins if both sides were equally good; 1.0 without any trial."""
    trials = wins + losses
    if trials == 0:
        return 1.0
    return sum(math.comb(trials, k) for k in range(wins, trials + 1)) / (1 << trials)


def clean_loss(evidence: GateEvidence) -> float:
    """Accuracy lost on the reference, weighted by the share of live traffic that looks like it."""
    return (evidence.reference_base - evidence.reference_candidate) * evidence.reference_share


def _checks(evidence: GateEvidence, kind: Kind, settings: HealSettings, proven: bool) -> Iterator[tuple[Check, str]]:
    """Each check with the inequality that says why it failed."""
    yield _at_most("clean loss", clean_loss(evidence), "max_clean_loss", settings.max_clean_loss)
    if settings.max_unweighted_clean_loss is not None:
        loss = evidence.reference_base - evidence.reference_candidate
        yield _at_most("unweighted clean loss", loss, "max_unweighted_clean_loss", settings.max_unweighted_clean_loss)
    if kind is not Kind.PRIOR_SHIFT and not proven:
        value, limit = float(evidence.shift_candidate), float(evidence.shift_base)
        yield ("residual shift", value, limit, value < limit), f"residual shift {value:.3f} >= base {limit:.3f}"
    yield from _collapse_checks(evidence, kind)
    if not proven:
        value, limit = float(evidence.estimate_candidate), float(evidence.estimate_base) - ESTIMATE_SLACK
        words = f"estimated accuracy {value:.3f} < base - {ESTIMATE_SLACK:.3f} = {limit:.3f}"
        yield ("estimated accuracy", value, limit, value >= limit), words
    if evidence.labelled_wins + evidence.labelled_losses:
        p = sign_test(evidence.labelled_losses, evidence.labelled_wins)
        words = (
            f"labels: right only under the candidate {evidence.labelled_wins} < only under the base "
            f"{evidence.labelled_losses} (p {p:.3f} < {SIGNIFICANCE:.3f})"
        )
        yield ("p of harm by labels", p, SIGNIFICANCE, p >= SIGNIFICANCE), words


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
    missing = [name for name in needed if not math.isfinite(getattr(evidence, name))]
    return f"could not measure: {', '.join(missing)} is not a number" if missing else ""
