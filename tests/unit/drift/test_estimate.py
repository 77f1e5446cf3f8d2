"""Estimates without labels: right under covariate and prior shift, bounded always."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mixture import World, window

from orchestrator.drift.estimate import (
    em_priors,
    estimate_accuracies,
    estimate_loss,
    priors_from_shares,
    split_mixture,
)
from orchestrator.drift.sample import rows_of
from orchestrator.drift.statistics import probabilities, read

WORLD = World(13)
BASELINE = WORLD.baseline(3000)


def summary_of(sample):
    return read(BASELINE.layout, window(BASELINE, sample))


def test_estimates_on_normal_traffic_are_the_reference_accuracy():
    estimates = estimate_accuracies(BASELINE, summary_of(WORLD.sample(2000)))
    for value in estimates.values():
        assert value == pytest.approx(BASELINE.accuracy, abs=0.03)
    assert estimate_loss(BASELINE, summary_of(WORLD.sample(2000))).loss < 0.02


def test_estimates_fall_where_accuracy_falls():
    losses = [estimate_loss(BASELINE, summary_of(WORLD.sample(2000, shift=s))).loss for s in (0.0, 0.5, 1.0)]
    assert losses == sorted(losses)
    assert losses[2] > 0.05


def test_nothing_is_estimated_from_no_instance():
    none = summary_of(rows_of(WORLD.sample(2), slice(0, 0)))
    assert np.isnan(estimate_loss(BASELINE, none).loss)
    assert all(np.isnan(v) for v in estimate_accuracies(BASELINE, none).values())


@pytest.mark.parametrize("priors", [[0.7, 0.1, 0.1, 0.1], [0.4, 0.4, 0.2, 0.0]])
def test_both_estimators_find_the_priors_of_a_prior_shift(priors):
    sample = WORLD.sample(3000, priors=priors)
    by_em = em_priors(probabilities(sample.logits_NK, BASELINE.temperature), np.full(4, 0.25))
    by_shares = priors_from_shares(BASELINE.confusion_KK, summary_of(sample).class_shares_K)
    assert by_em == pytest.approx(priors, abs=0.04)
    assert by_shares == pytest.approx(priors, abs=0.04)


@settings(max_examples=30)
@given(arrays(np.float64, (12, 3), elements=st.floats(-20, 20)))
def test_em_priors_are_a_distribution(logits_NK):
    priors_K = em_priors(probabilities(logits_NK), np.array([0.5, 0.3, 0.2]))
    assert priors_K.sum() == pytest.approx(1.0)
    assert (priors_K >= 0).all()


def test_em_priors_refuses_no_rows_and_other_widths():
    with pytest.raises(ValueError, match="N >= 1, 3"):
        em_priors(np.zeros((0, 3)), np.ones(3))
    with pytest.raises(ValueError, match=r"got \(2, 4\)"):
        em_priors(np.zeros((2, 4)), np.ones(3))


@pytest.mark.parametrize(("share", "low", "high"), [(1.0, 0.85, 1.0), (0.5, 0.4, 0.7), (0.0, 0.0, 0.1)])
def test_reference_share_is_the_part_of_traffic_that_looks_like_the_reference(share, low, high):
    reference_ND = WORLD.sample(1500).embedding_ND
    old_ND = WORLD.sample(int(800 * share)).embedding_ND
    new_ND = WORLD.sample(800 - len(old_ND)).embedding_ND + 4.0
    assert low <= split_mixture(reference_ND, np.concatenate([old_ND, new_ND])).share <= high


def test_reference_share_refuses_too_few_rows_and_other_widths():
    with pytest.raises(ValueError, match=">= 20 rows"):
        split_mixture(np.zeros((30, 3)), np.zeros((19, 3)))
    with pytest.raises(ValueError, match="equal widths"):
        split_mixture(np.zeros((30, 3)), np.zeros((30, 4)))


def test_reference_share_accepts_constant_features():
    assert split_mixture(np.ones((30, 3)), np.ones((30, 3))).share == pytest.approx(1.0)
