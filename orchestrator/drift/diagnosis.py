"""Which kind of drift is it, and does it harm? A decision list, from the most special cause to the most general.

One broken replica first, then broken inputs (they imitate covariate drift in embedding space), then a mere change of
class shares, then covariate drift by its estimated loss. Whatever does not fit is `unknown`. Concept drift is what
nothing but labels show: without them it looks like nothing. Called by the controller; pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from orchestrator.drift.baseline import Baseline
from orchestrator.drift.breaks import (
    find_bad_values,
    find_gain,
    find_missing_channel,
    find_structure,
    find_swap,
    find_turned,
)
from orchestrator.drift.case import Case, Finding
from orchestrator.drift.estimate import LossEstimate, estimate_accuracies, estimate_loss
from orchestrator.drift.evidence import checks_p, classes_p, evidence_of, inputs_p, outputs_p
from orchestrator.drift.nature import find_unnatural
from orchestrator.drift.priors import find_priors
from orchestrator.drift.statistics import CHECKS, read
from orchestrator.messages import Alarm, Diagnosis, Kind, Window
from orchestrator.settings import HealSettings

MIN_FRESH = 128  # instances after the alarm, or of the later half
MIN_UNKNOWN = 512  # instances from which what has no name is called unknown: more of them may show its name
MIN_INSTANCES = 32  # valid ones, to tell one kind of drift from another
PASSED_P = 0.005  # p-values of the later half all above this: what raised the alarm is over
MIN_LATER_SHARE = 0.4  # of the instances since the onset; with fewer, traffic thinned out and they say too little
NORMAL_P = 0.05  # all p-values above this: the alarm was false
DISPERSION = 4.0  # of class counts, in those of independent traffic
SUSPICIOUS_GROWTH = 3.0  # a source that strays and sends this many times its former share of the traffic floods
HARM_SIGMAS = 2.0  # standard errors by which the estimated loss must clear the threshold, on either side
# Total variation of the shares of predicted classes, beyond chance. A model that calls most of its inputs one class may
# do so with all the confidence it ever had: no estimate from confidence sees that, and answers that moved this far did
# not stay right.
MAX_BENIGN_CHANGE = 0.3


def diagnose(
    baseline: Baseline,
    window: Window,
    alarm: Alarm,
    fleet_size: int,
    settings: HealSettings,
    growth: float = float("nan"),
    labels_say_harm: bool = False,
    final: bool = True,
    fresh: Window | None = None,
    latest: Window | None = None,
) -> Diagnosis | None:
    """Tell the kind of drift from the merged window since the onset.

    Args:
        baseline: of the alarm's digest.
        window: everything under that digest since the onset; with a replica or segment scope, best only its part.
        alarm: what the sequential test raised.
        fleet_size: replicas that are alive.
        settings: `harm_threshold` separates benign from harmful.
        growth: how many times its former share of the traffic the alarm's segment sends now; nan where unknown.
        labels_say_harm: true labels show more errors than the reference's.
        final: False while more instances can be waited for.
        fresh: what came after the alarm, of the same scope. The onset is an estimate, and a few whole images hide a
            break that is exact; so breaks are looked for in this as soon as it holds MIN_FRESH instances.
        latest: the later half of the window, of the same scope: where it shows nothing any more, the shift has passed.

    Returns:
        Kind, a reason in one sentence with its inequality, and evidence as plain numbers and words. `none` when the
        longer window shows nothing any more. None when more instances are needed to tell drift from none, or harm
        from no harm.

    Raises:
        ValueError: the window's vector does not fit the baseline's layout.
    """
    summary = read(baseline.layout, window)
    evidence = evidence_of(baseline, window)
    case = Case(baseline, summary, evidence, alarm, fleet_size, settings, growth, labels_say_harm)
    loss = estimate_loss(baseline, summary)
    late, end = _on(case, fresh), _on(case, latest)
    finding = None if end is case else _find_passed(case, end)
    finding = finding or next(
        (found for rule in RULES if (found := rule(late if rule in BREAKS else case)) is not None), None
    )
    finding = finding or find_unnatural(late)
    # A mixture of before and after looks like nothing known.
    mixed = late is case or late.summary.count < MIN_UNKNOWN
    if finding is not None and finding.kind is Kind.UNKNOWN and mixed and not final:
        return None
    finding = finding or _weigh_harm(case, loss, final)
    if finding is None or (finding.kind is Kind.NONE and not final):
        return None
    known_loss = loss.loss if math.isfinite(loss.loss) else 0.0
    figures = _evidence(case, loss) | finding.evidence
    return Diagnosis(finding.kind, finding.reason, window.count, known_loss, figures)


def diagnose_failures(alarm: Alarm) -> Diagnosis:
    """Requests fail, on one replica or on all: no matter of drift, and nothing to wait for."""
    kind = Kind.REPLICA_FAULT if alarm.scope.startswith("replica:") else Kind.OUTAGE
    reason = f"{alarm.scope}: share of failed requests {alarm.statistic:.3f} >= {alarm.threshold:.3f}"
    return Diagnosis(kind, reason, alarm.instances, 0.0, {"scope": alarm.scope, "failed_share": alarm.statistic})


def _evidence(case: Case, loss: LossEstimate) -> dict[str, Any]:
    baseline, summary = case.baseline, case.summary
    estimates = estimate_accuracies(baseline, summary)
    numbers = {
        "outputs_p": outputs_p(baseline, case.evidence),
        "inputs_p": inputs_p(baseline, case.evidence),
        "classes_p": classes_p(baseline, case.evidence.classes_K, DISPERSION),
        "class_share_change": _class_share_change(case),
        **{f"{name}_share": summary.check_counts[name] / max(summary.count, 1) for name in CHECKS},
        **{f"accuracy_{name}": value for name, value in estimates.items() if math.isfinite(value)},
        **({"loss_standard_error": loss.standard_error} if math.isfinite(loss.standard_error) else {}),
        **({"growth": case.growth} if math.isfinite(case.growth) else {}),
    }
    return {"scope": case.alarm.scope, "returned": case.alarm.returned, **{k: float(v) for k, v in numbers.items()}}


def _class_share_change(case: Case) -> float:
    """Total variation between the shares of predicted classes now and in normal traffic, 0..1; chance included."""
    return 0.5 * float(np.abs(case.summary.class_shares_K - case.baseline.class_shares_K).sum())


def _change_by_chance(case: Case) -> float:
    """What `_class_share_change` is on average where nothing changed, in traffic of dispersion DISPERSION."""
    p_K = case.baseline.class_shares_K
    variance_K = p_K * (1.0 - p_K) * DISPERSION / max(case.summary.num_valid, 1)
    return 0.5 * float(np.sqrt(2.0 * variance_K / np.pi).sum())


def _on(case: Case, window: Window | None) -> Case:
    """The case seen on a part of its window; the case itself where that part is small."""
    if window is None or window.count < MIN_FRESH:
        return case
    baseline = case.baseline
    return replace(case, summary=read(baseline.layout, window), evidence=evidence_of(baseline, window))


def _find_passed(case: Case, end: Case) -> Finding | None:
    """What raised the alarm is over: the later half of what came since shows nothing. There is nothing to learn."""
    num = end.summary.count
    if num < MIN_LATER_SHARE * case.summary.count or case.labels_say_harm:
        return None
    classes = classes_p(end.baseline, end.evidence.classes_K, DISPERSION)
    p = min(end.shift_p, classes, checks_p(end.baseline, end.evidence))
    if p <= PASSED_P:
        return None
    return Finding(Kind.NONE, f"it has passed: no shift in the latest {num} instances: p {p:.3f} > {PASSED_P}", {})


def _find_replica(case: Case) -> Finding | None:
    """One replica strayed and the others, on the same traffic, did not (the monitor saw to that)."""
    if not case.alarm.scope.startswith("replica:") or case.fleet_size < 2:
        return None
    reason = f"only {case.alarm.scope} of {case.fleet_size} strayed: {_inequality(case.alarm)}"
    return Finding(Kind.REPLICA_FAULT, reason, {})


def _find_flood(case: Case) -> Finding | None:
    """One source strayed and sends far more than it used to: a flood must not become the normal."""
    if not case.alarm.scope.startswith("segment:") or not case.growth >= SUSPICIOUS_GROWTH:
        return None
    reason = f"only {case.alarm.scope} strayed, and sends {case.growth:.1f} >= {SUSPICIOUS_GROWTH:g} times its share"
    return Finding(Kind.SUSPICIOUS_SOURCE, reason, {})


def _find_too_few(case: Case) -> Finding | None:
    if case.summary.num_valid >= MIN_INSTANCES:
        return None
    reason = f"valid instances {case.summary.num_valid} < {MIN_INSTANCES}: too few to tell"
    return Finding(Kind.UNKNOWN, reason, {})


def _find_nothing(case: Case) -> Finding | None:
    """A false alarm, a drift that only a part of the traffic shows, or one that only labels show."""
    p = min(case.shift_p, classes_p(case.baseline, case.evidence.classes_K, DISPERSION))
    if p <= NORMAL_P:
        return None
    if case.labels_say_harm:
        reason = f"labels show more errors although inputs and outputs look as they did: p {p:.3f} > {NORMAL_P}"
        return Finding(Kind.CONCEPT, reason, {})
    reason = f"no shift left in {case.summary.count} instances: p {p:.3f} > {NORMAL_P}"
    if case.alarm.scope == "global":
        return Finding(Kind.NONE, reason, {})
    return Finding(Kind.UNKNOWN, f"{case.alarm.scope} raised the alarm alone; {reason}", {})


BREAKS: tuple[Callable[[Case], Finding | None], ...] = (
    find_bad_values,
    find_missing_channel,
    find_gain,
    find_structure,
    find_swap,
    find_turned,
)
RULES: tuple[Callable[[Case], Finding | None], ...] = (
    _find_replica,
    _find_flood,
    *BREAKS,
    _find_too_few,
    _find_nothing,
    find_priors,
)


def _weigh_harm(case: Case, loss: LossEstimate, final: bool) -> Finding | None:
    limit, margin = case.settings.harm_threshold, HARM_SIGMAS * loss.standard_error
    if not math.isfinite(loss.loss):
        return Finding(Kind.UNKNOWN, "the loss of accuracy could not be estimated", {})
    if case.labels_say_harm:
        return Finding(Kind.COVARIATE_HARMFUL, "inputs changed, and labels show more errors than on the reference", {})
    words = f"estimated loss {loss.loss:.3f} +- {loss.standard_error:.3f}"
    if loss.loss - margin >= limit:
        reason = f"inputs changed ({_inequality(case.alarm)}), {words} >= {limit:.3f}"
        return Finding(Kind.COVARIATE_HARMFUL, reason, {})
    moved, classes = (
        _class_share_change(case) - _change_by_chance(case),
        classes_p(case.baseline, case.evidence.classes_K, DISPERSION),
    )
    if moved > MAX_BENIGN_CHANGE and classes <= PASSED_P:
        reason = f"inputs changed, and predicted classes moved by {moved:.2f} > {MAX_BENIGN_CHANGE} for all its {words}"
        return Finding(Kind.COVARIATE_HARMFUL, reason, {})
    if loss.loss + margin < limit:
        return Finding(Kind.COVARIATE_BENIGN, f"inputs changed, {words} < {limit:.3f}", {})
    if not final:
        return None
    return Finding(Kind.COVARIATE_BENIGN, f"inputs changed, {words} is not clearly >= {limit:.3f}", {})


def _inequality(alarm: Alarm) -> str:
    return f"statistic {alarm.statistic:.3g} >= threshold {alarm.threshold:.3g}"
