"""Scores rank by expected accuracy, not by confidence; a winner must beat what costs nothing."""

import numpy as np
import pytest
import torch

from orchestrator.messages import Placement, TrialConfig, TrialResult
from tuning.scoring import (
    calibrate,
    choose_runner_up,
    choose_winner,
    covariate_score,
    logit_offset,
    match_temperature,
    prior_shift_score,
)
from tuning.scoring import corrected_posteriors as corrected

RNG = np.random.default_rng(0)
UNLABELLED = np.full(1000, -1)


def logits_of(accuracy, n=1000, k=4, scale=1.0, shares=None):
    """Calibrated-looking logits whose argmax is right with about `accuracy`, and the labels."""
    labels = RNG.choice(k, n, p=shares)
    strength = 5 * accuracy
    return (RNG.normal(size=(n, k)) + strength * np.eye(k)[labels]) * scale, labels


def result(placement, score, status="finished", parameters=0):
    return TrialResult("t", TrialConfig(placement), status, score=score, parameters=parameters)


def test_sharper_logits_alone_do_not_raise_the_score():
    even = np.full(4, 0.25)
    scores = []
    for scale in (1.0, 3.0):
        logits, labels = logits_of(0.6, scale=scale)
        temperature = match_temperature(logits, float((logits.argmax(1) == labels).mean()))
        scores.append(covariate_score(logits, temperature, UNLABELLED, even))
    assert scores[0] == pytest.approx(scores[1], abs=0.02)


def test_a_collapse_onto_one_class_is_held_against_a_trial():
    even = np.full(4, 0.25)
    collapsed = np.tile([9.0, 0, 0, 0], (1000, 1))
    spread, _ = logits_of(0.6)
    assert covariate_score(collapsed, 1.0, UNLABELLED, even) < covariate_score(spread, 1.0, UNLABELLED, even)


def test_many_labels_outweigh_the_estimate():
    even = np.full(4, 0.25)
    logits, labels = logits_of(0.6)
    wrong = (labels + 1) % 4
    assert covariate_score(logits, 1.0, labels, even) > 0.7
    assert covariate_score(logits, 1.0, wrong, even) < 0.2


def test_the_logit_correction_finds_the_new_class_shares():
    shares = np.array([0.7, 0.1, 0.1, 0.1])
    logits, labels = logits_of(0.5, n=4000, shares=shares)
    temperature = 1 / 2.5  # N(0, 1) noise around 2.5 e_k: the likelihood ratio is exp(2.5 x)
    offset, new = logit_offset(logits, temperature, np.full(4, 0.25))
    assert new == pytest.approx(shares, abs=0.06)
    assert ((logits + offset).argmax(1) == labels).mean() > (logits.argmax(1) == labels).mean() + 0.01
    posteriors = corrected(logits, temperature, np.full(4, 0.25), new)
    none = np.full(4000, -1)
    assert prior_shift_score(logits + offset, posteriors, none) > prior_shift_score(logits, posteriors, none)


def test_calibration_leaves_the_running_statistics_alone():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3)).eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    inputs = RNG.normal(3, 2, (200, 4)).astype(np.float32)
    temperature = calibrate(module, [module[0]], inputs, RNG.integers(0, 3, 200), torch.device("cpu"))
    assert temperature > 0
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert not module[0].training


def test_a_trained_trial_must_beat_recomputed_statistics():
    statistics = result(Placement.NORM_STATISTICS, 0.80)
    assert choose_winner([statistics, result(Placement.ALL, 0.801)], 0.6) is statistics
    better = result(Placement.ALL, 0.82, "stopped")
    assert choose_winner([statistics, better], 0.6) is better


def test_the_runner_up_is_of_another_placement_and_must_beat_the_base_too():
    statistics, everywhere = result(Placement.NORM_STATISTICS, 0.80), result(Placement.ALL, 0.85)
    trials = [statistics, everywhere, result(Placement.ALL, 0.84), result(Placement.NORM, 0.82)]
    assert choose_runner_up(trials, 0.6, everywhere) is trials[3]
    assert choose_runner_up(trials[:3], 0.6, everywhere) is statistics
    assert choose_runner_up(trials[:3], 0.81, everywhere) is None


def test_no_winner_when_the_base_is_as_good_or_everything_failed():
    assert choose_winner([result(Placement.NORM_STATISTICS, 0.805)], 0.80) is None
    assert choose_winner([result(Placement.ALL, float("nan")), result(Placement.NORM, 0.9, "failed")], 0.1) is None
    assert choose_winner([], 0.1) is None
