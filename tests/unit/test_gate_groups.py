"""The gate on classes, segments and the declared metric: who may not pay for a gain of the whole, in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import good_evidence
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.gate import decide
from orchestrator.messages import Analysis, Compared, GateDecision, GateEvidence, Kind, SegmentEstimate
from orchestrator.settings import HealSettings
from orchestrator.state import from_plain, to_plain

GOOD = replace(
    good_evidence.GOOD,
    metric_base=0.90,
    metric_candidate=0.86,
    look_instances=500,
    look_base=0.56,
    look_change=0.18,
    look_change_error=0.02,
    estimate_bound=0.70,
    num_classes=10,
    classes=(Compared("deer", 50, 0.60, 0.62, 6, 5, 0.6, 0.7),),
)
LOST = Compared("cat", 20, 0.63, 0.20, 1, 10, f1_base=0.55, f1_candidate=0.30)


def judged(kind: Kind = Kind.COVARIATE_HARMFUL, base: GateEvidence = GOOD, **changes: Any) -> GateDecision:
    return decide(replace(base, **changes), kind, HealSettings())


def test_evidence_of_every_kind_that_is_good_passes() -> None:
    decision = judged(segments=(SegmentEstimate("a", 200, 0.1, 0.02, 0.05), SegmentEstimate("b", 200, 0.2, 0.02, 0.1)))
    assert decision.analysis is Analysis.SUCCESSFUL
    assert [name for name, *_ in decision.checks][-4:] == [
        "accuracy at least",
        "p of harm to class deer with the traffic's look",
        "clean loss in segment b",
        "estimated gain at best in segment a",
    ]


def test_a_class_that_fell_significantly_and_by_much_is_named_with_its_inequality() -> None:
    decision = judged(num_classes=2, classes=(LOST,))
    assert decision.analysis is Analysis.FAILED
    assert decision.message == (
        "class cat with the traffic's look: recall under the candidate 0.20 < under the base 0.63 "
        "(losses 10 > wins 1, p 0.0059 < 0.025)"
    )


def test_the_more_classes_are_compared_the_more_evidence_each_needs() -> None:
    assert judged(num_classes=10, classes=(LOST,)).analysis is Analysis.SUCCESSFUL
    assert judged(num_classes=10, classes=(replace(LOST, losses=12),)).analysis is Analysis.FAILED


def test_a_fall_within_the_margin_passes_however_sure() -> None:
    small = Compared("cat", 4000, 0.60, 0.56, 10, 170, 0.6, 0.55)
    assert judged(classes=(small,)).analysis is Analysis.SUCCESSFUL


def test_a_class_that_the_base_answered_to_everything_may_be_answered_less() -> None:
    frog = Compared("frog", 107, 0.98, 0.85, 0, 14, f1_base=0.52, f1_candidate=0.86)  # measured, Gaussian noise
    assert judged(classes=(frog,)).analysis is Analysis.SUCCESSFUL


def test_true_labels_of_a_class_outrank_its_rows_with_the_look() -> None:
    fine = Compared("cat", 20, 0.5, 0.7, 5, 1, 0.5, 0.7)
    labels = {"labelled": 200, "labelled_wins": 20, "labelled_losses": 5, "num_labelled_classes": 10}
    looks = {"num_classes": 1, "classes": (LOST,)}
    assert judged(**labels, **looks, labelled_classes=(fine,)).analysis is Analysis.SUCCESSFUL
    few = replace(fine, instances=19)
    assert judged(**labels, **looks, labelled_classes=(few,)).analysis is Analysis.FAILED


def test_labels_that_prove_a_gain_do_not_outrank_a_class_that_was_lost() -> None:
    labels = {"labelled": 300, "labelled_wins": 60, "labelled_losses": 12, "num_labelled_classes": 2}
    decision = judged(**labels, labelled_classes=(LOST,))
    assert decision.analysis is Analysis.FAILED
    assert decision.message.startswith("class cat in labelled traffic: recall under the candidate 0.20")


def test_recalls_must_move_under_a_prior_shift_and_old_labels_say_nothing_under_a_concept_drift() -> None:
    assert judged(Kind.PRIOR_SHIFT, num_classes=1, classes=(LOST,)).analysis is Analysis.SUCCESSFUL
    assert judged(Kind.CONCEPT, num_classes=1, classes=(LOST,)).analysis is Analysis.SUCCESSFUL
    assert judged(Kind.CONCEPT, num_labelled_classes=1, labelled_classes=(LOST,)).analysis is Analysis.FAILED


def test_a_segment_that_labels_prove_worse_is_named() -> None:
    rows = (Compared("north", 40, 0.8, 0.5, 1, 13), Compared("south", 200, 0.4, 0.7, 70, 10))
    decision = judged(labelled=240, labelled_wins=71, labelled_losses=23, labelled_segments=rows)
    assert decision.message == (
        "segment north: right only under the candidate 1 < only under the base 13 of 40 labels (p 0.00092 < 0.025)"
    )


def test_a_segment_whose_world_did_not_change_pays_the_whole_clean_loss() -> None:
    segments = (SegmentEstimate("north", 40, share=0.92), SegmentEstimate("south", 300, share=0.05))
    decision = judged(segments=segments)
    assert decision.message == "clean loss in segment north 0.037 > max_clean_loss 0.030 (share 0.92 and more)"


def test_an_estimate_vetoes_in_a_segment_only_where_its_best_falls_beyond_the_slack() -> None:
    sure, unsure = SegmentEstimate("a", 100, -0.10, 0.02), SegmentEstimate("a", 32, -0.10, 0.06)
    other = SegmentEstimate("b", 300, 0.20, 0.01)
    assert judged(segments=(unsure, other)).analysis is Analysis.SUCCESSFUL
    decision = judged(segments=(sure, other))
    assert decision.message == ("segment a: estimated accuracy -0.100, at best -0.061 < -0.020 (100 instances)")
    fine = (Compared("a", 20, 0.5, 0.6, 3, 1),)
    assert judged(segments=(sure, other), labelled_segments=fine).analysis is Analysis.SUCCESSFUL
    assert judged(Kind.CONCEPT, segments=(sure, other)).analysis is Analysis.SUCCESSFUL


def test_the_bound_refuses_only_where_labelled_rows_confirm_a_fall() -> None:
    assert judged(estimate_bound=0.40).analysis is Analysis.SUCCESSFUL
    decision = judged(estimate_bound=0.40, look_change=-0.06, look_change_error=0.02)
    assert decision.message == (
        "accuracy at least 0.400 < base 0.550, and on labelled rows with the traffic's look -0.060 (-0.027 at best)"
    )
    assert judged(estimate_bound=0.56, look_change=-0.06, look_change_error=0.02).analysis is Analysis.SUCCESSFUL
    assert judged(estimate_bound=float("nan")).analysis is Analysis.SUCCESSFUL


def test_the_clean_loss_is_on_the_declared_metric() -> None:
    metric = {"metric": "f1:cat", "metric_base": 0.80, "metric_candidate": 0.60}
    assert judged(**metric).message == "clean loss of f1:cat 0.050 > max_clean_loss 0.030"
    spared = judged(**{**metric, "metric_candidate": 0.79}, reference_candidate=0.5)
    assert spared.analysis is Analysis.SUCCESSFUL
    unknown = judged(**{**metric, "metric_base": float("nan")})
    assert (unknown.analysis, unknown.message) == (
        Analysis.ERROR,
        "could not measure: metric_base is not a number",
    )


def test_labels_prove_gain_and_harm_on_the_declared_metric() -> None:
    labels = {"metric": "balanced_accuracy", "labelled": 200, "labelled_wins": 40, "labelled_losses": 2}
    figures = {"labelled_metric_base": 0.7, "labelled_metric_candidate": 0.6}
    harmed = judged(**labels, **figures, labelled_p_gain=1.0, labelled_p_harm=0.002)
    assert harmed.message == "labels: balanced_accuracy 0.600 < base 0.700 (p 0.002 < 0.050)"
    proven = judged(**labels, labelled_p_gain=0.01, labelled_p_harm=0.99)
    assert (proven.analysis, proven.provisional) == (Analysis.SUCCESSFUL, False)
    assert judged(**labels, labelled_p_gain=0.2, labelled_p_harm=0.8).provisional


def test_evidence_without_the_new_figures_is_judged_as_before() -> None:
    old = replace(
        GOOD, metric_base=float("nan"), metric_candidate=float("nan"), estimate_bound=float("nan"), classes=()
    )
    assert [name for name, *_ in judged(base=old).checks] == [
        "clean loss",
        "residual shift",
        "top class share",
        "classes lost",
        "estimated accuracy",
    ]


def test_evidence_survives_the_journal() -> None:
    evidence = replace(GOOD, segments=(SegmentEstimate("a", 3),), labelled_classes=(LOST,), labelled_segments=(LOST,))
    assert repr(from_plain(GateEvidence, to_plain(evidence))) == repr(evidence)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 50))
def test_no_class_is_refused_that_won_as_often_as_it_lost(wins: int, losses: int, num: int) -> None:
    base, candidate = 0.5, 0.5 + (wins - losses) / 200
    row = Compared("cat", 200, base, candidate, wins, losses, 0.5, 0.4)
    if judged(num_classes=num, classes=(row,)).analysis is Analysis.FAILED:
        assert losses > wins
        assert losses - wins > 0.05 * 200
