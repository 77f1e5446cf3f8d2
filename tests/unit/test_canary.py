"""The bet on labelled disagreements: honest under no difference, quick under one, and one budget for life."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.canary import MAX_DECIDED, Bet, PairedTest, evidence, level

counts = st.integers(0, 60)


@given(counts, counts)
def test_the_evidence_is_the_mean_of_the_bets_over_all_better_versions(wins, losses):
    steps = 20_000
    grid = [0.5 + 0.5 * (i + 0.5) / steps for i in range(steps)]
    mean = math.fsum((2 * p) ** wins * (2 * (1 - p)) ** losses for p in grid) / steps
    assert evidence(wins, losses) == pytest.approx(mean, rel=1e-3)


@given(counts, counts)
def test_no_label_changes_the_evidence_on_average_for_the_worse_when_versions_are_alike(wins, losses):
    after = 0.5 * evidence(wins + 1, losses) + 0.5 * evidence(wins, losses + 1)
    assert after == pytest.approx(evidence(wins, losses), rel=1e-9)  # a martingale at p = 1/2 ...
    worse = 0.4 * evidence(wins + 1, losses) + 0.6 * evidence(wins, losses + 1)
    assert worse <= evidence(wins, losses) * (1 + 1e-9)  # ... and it falls below


def test_many_labels_neither_overflow_nor_wait():
    assert evidence(MAX_DECIDED, 0) > 1e290
    assert evidence(0, MAX_DECIDED) == pytest.approx(2.0 / (2 * (MAX_DECIDED + 1)), rel=1e-3)
    assert PairedTest("a", "base", 0.01, wins=MAX_DECIDED).full


def test_counts_below_zero_are_refused():
    with pytest.raises(ValueError, match="-1"):
        evidence(-1, 3)


def play(p, alpha, labels, rng):
    wins = losses = 0
    for _ in range(labels):
        if rng.random() < p:
            wins += 1
        else:
            losses += 1
        outcome = PairedTest("a", "base", alpha, wins, losses).outcome
        if outcome is not Bet.UNDECIDED:
            return outcome, wins + losses
    return Bet.UNDECIDED, labels


def test_a_version_that_wins_three_of_four_is_told_in_some_forty_labels():
    rng = random.Random(3)
    played = [play(0.75, 0.01, 400, rng) for _ in range(300)]
    assert sum(outcome is Bet.BETTER for outcome, _ in played) >= 295
    assert sorted(labels for _, labels in played)[150] <= 60


def test_a_version_no_better_is_hardly_ever_called_better_and_one_that_is_worse_is_caught():
    rng = random.Random(4)
    alike = [play(0.5, 0.05, 200, rng)[0] for _ in range(400)]
    assert alike.count(Bet.BETTER) <= 32  # 20 expected at most; 32 is three standard deviations
    worse = [play(0.25, 0.01, 400, rng)[0] for _ in range(200)]
    assert worse.count(Bet.WORSE) >= 195
    assert worse.count(Bet.BETTER) == 0


def test_the_error_budget_of_a_life_is_finite_and_gains_win_some_of_it_back():
    assert level(0.01, 1, 0) == 0.01
    assert level(0.01, 10, 9) == pytest.approx(0.001)
    assert level(0.01, 10, 0) == pytest.approx(0.0001)
    assert sum(level(0.01, n, 0) for n in range(1, 10_000)) < 0.01 * math.pi**2 / 6


def test_the_words_carry_the_inequality():
    assert PairedTest("a", "base", 0.01).inequality() == (
        "0 wins, 0 losses in labelled disagreements: evidence of gain 1 < 100"
    )
    assert ">= 100" in PairedTest("a", "base", 0.01, wins=30, losses=3).inequality()
    assert "harm" in PairedTest("a", "base", 0.01, wins=1, losses=20).inequality()
