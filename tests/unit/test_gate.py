"""The gate as a specification: every check, its inequality in words, and what labels may outrank."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from good_evidence import GOOD
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.gate import clean_loss, decide, labels_needed
from orchestrator.messages import Analysis, GateDecision, GateEvidence, Kind
from orchestrator.settings import HealSettings

SETTINGS = HealSettings()


def judged(
    kind: Kind = Kind.COVARIATE_HARMFUL, settings: HealSettings = SETTINGS, base: GateEvidence = GOOD, **changes: Any
) -> GateDecision:
    return decide(replace(base, **changes), kind, settings)


def test_good_evidence_without_labels_is_successful_and_provisional() -> None:
    decision = judged()
    assert decision.analysis is Analysis.SUCCESSFUL
    assert decision.provisional
    assert all(passed for _, _, _, passed in decision.checks)


def test_clean_loss_is_weighted_by_the_share_of_traffic_that_looks_like_the_reference() -> None:
    assert clean_loss(GOOD) == pytest.approx(0.01)
    assert judged(reference_candidate=0.70, reference_share=0.0).analysis is Analysis.SUCCESSFUL
    decision = judged(reference_candidate=0.818, reference_share=0.5)
    assert decision.analysis is Analysis.FAILED
    assert decision.message == "clean loss 0.041 > max_clean_loss 0.030"


def test_a_loss_equal_to_the_limit_passes_whatever_floats_say() -> None:
    assert judged(reference_candidate=0.87, reference_share=1.0).analysis is Analysis.SUCCESSFUL


def test_the_unweighted_cap_is_a_policy_that_is_off_by_default() -> None:
    capped = HealSettings(max_unweighted_clean_loss=0.10)
    assert judged(reference_candidate=0.70, reference_share=0.0, settings=capped).message == (
        "unweighted clean loss 0.200 > max_unweighted_clean_loss 0.100"
    )


def test_a_residual_shift_that_does_not_fall_fails() -> None:
    decision = judged(shift_candidate=12.0)
    assert (decision.analysis, decision.message) == (Analysis.FAILED, "residual shift 12.000 >= base 12.000")


def test_a_prior_shift_needs_no_fall_of_the_residual_shift() -> None:
    unmeasured = float("nan")
    assert judged(Kind.PRIOR_SHIFT, shift_candidate=unmeasured, shift_base=unmeasured).analysis is Analysis.SUCCESSFUL


def test_predictions_that_collapse_into_one_class_fail() -> None:
    decision = judged(marginal_max=0.81, marginal_distance=0.7)
    assert (decision.analysis, decision.message) == (Analysis.FAILED, "top class share 0.810 > limit 0.500")


def test_a_reference_that_is_mostly_one_class_is_no_collapse() -> None:
    assert judged(marginal_max=0.93, marginal_distance=0.02).analysis is Analysis.SUCCESSFUL


def test_a_lost_class_fails_unless_the_priors_shifted() -> None:
    assert "classes lost 1.000 > limit 0.000" in judged(classes_lost=1).message
    assert judged(Kind.PRIOR_SHIFT, classes_lost=1, marginal_max=0.9).analysis is Analysis.SUCCESSFUL
    assert judged(Kind.PRIOR_SHIFT, marginal_max=0.96).analysis is Analysis.FAILED


def test_an_estimate_vetoes_only_beyond_its_slack() -> None:
    assert judged(estimate_candidate=0.535).analysis is Analysis.SUCCESSFUL
    decision = judged(estimate_candidate=0.52)
    assert decision.message == "estimated accuracy 0.520 < base - 0.020 = 0.530"


def test_every_failed_check_is_in_the_message() -> None:
    message = judged(estimate_candidate=0.1, shift_candidate=20.0).message
    assert "residual shift" in message
    assert "; estimated accuracy" in message


def test_labels_that_show_harm_fail() -> None:
    decision = judged(labelled=60, labelled_wins=2, labelled_losses=12)
    assert decision.analysis is Analysis.FAILED
    assert "only under the candidate 2 < only under the base 12 (p 0.006 < 0.050)" in decision.message


def test_labels_that_prove_a_gain_confirm_and_outrank_the_proxies() -> None:
    decision = judged(labelled=60, labelled_wins=12, labelled_losses=2, shift_candidate=20.0, estimate_candidate=0.1)
    assert decision.analysis is Analysis.SUCCESSFUL
    assert not decision.provisional


def test_labels_never_outrank_the_clean_loss() -> None:
    decision = judged(labelled_wins=50, labelled_losses=0, reference_candidate=0.5, reference_share=1.0)
    assert decision.analysis is Analysis.FAILED


def test_labels_that_decide_nothing_yet_leave_it_provisional() -> None:
    assert judged(labelled=10, labelled_wins=3, labelled_losses=1).provisional


def test_an_error_or_a_missing_figure_is_an_error_not_a_failure() -> None:
    assert judged(error="out of memory").message == "could not measure: out of memory"
    decision = judged(reference_candidate=float("nan"), shift_base=float("inf"))
    assert decision.analysis is Analysis.ERROR
    assert decision.message == "could not measure: reference_candidate, shift_base is not a number"


def test_too_few_instances_are_inconclusive() -> None:
    decision = judged(instances=31)
    assert (decision.analysis, decision.message) == (Analysis.INCONCLUSIVE, "held-out instances 31 < 32")


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_no_success_ever_costs_more_than_the_limit(base: float, candidate: float, share: float) -> None:
    decision = judged(reference_base=base, reference_candidate=candidate, reference_share=share)
    if decision.analysis is Analysis.SUCCESSFUL:
        assert (base - candidate) * share <= SETTINGS.max_clean_loss + 1e-6


def test_a_proxy_that_refuses_says_whose_labels_would_decide() -> None:
    seen = {"disagreements": 60, "decisive": ("i7", "i3", "i9", "i1")}
    near = judged(shift_candidate=12.5, estimate_candidate=GOOD.estimate_base + 0.09, **seen)
    assert near.message.endswith("(of i7, i3, i9, ...) would decide")
    gain, share = 0.09, 60 / GOOD.instances
    assert labels_needed(replace(GOOD, estimate_candidate=GOOD.estimate_base + gain, **seen)) == math.ceil(
        2.487**2 / (gain / share) ** 2
    )
    assert labels_needed(replace(GOOD, disagreements=0)) == 0
    assert "would decide" not in judged(shift_candidate=12.5, labelled=4, labelled_wins=2, **seen).message


def test_what_no_label_can_excuse_asks_for_none() -> None:
    message = judged(reference_candidate=0.5, shift_candidate=12.5, disagreements=60, decisive=("i7",)).message
    assert "clean loss" in message
    assert "would decide" not in message
