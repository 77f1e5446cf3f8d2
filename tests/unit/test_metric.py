"""The declared metric as a specification: each reads the same way, and two models are compared exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.metric import metric_name, score, sign_test, swap_test

NAMES = ("cat", "dog", "bird")
LABELS = np.array([0, 0, 0, 0, 1, 1, 2])
ANSWERS = np.array([0, 0, 0, 1, 1, 0, 2])
_classes = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40)


def test_accuracy_is_the_share_of_right_answers() -> None:
    assert score("accuracy", NAMES, LABELS, ANSWERS) == pytest.approx(5 / 7)


def test_balanced_accuracy_is_the_mean_recall_of_the_classes_at_hand() -> None:
    assert score("balanced_accuracy", NAMES, LABELS, ANSWERS) == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)
    assert score("balanced_accuracy", NAMES, LABELS[:6], ANSWERS[:6]) == pytest.approx((3 / 4 + 1 / 2) / 2)


def test_f1_counts_one_class_alone() -> None:
    assert score("f1:dog", NAMES, LABELS, ANSWERS) == pytest.approx(2 * 1 / (2 * 1 + 1 + 1))
    assert np.isnan(score("f1:bird", NAMES, LABELS[:6], ANSWERS[:6]))


def test_a_dear_mistake_weighs_more_and_an_unnamed_one_costs_one() -> None:
    costs = {"cost": {"cat": {"dog": 5.0}}}  # of the wrong answers to a cat: 5 and 1, 3 on average
    worst = (4 * 3 + 2 * 1 + 1 * 1) / 7
    assert score(costs, NAMES, LABELS, ANSWERS) == pytest.approx(1 - (5 + 1) / 7 / worst)
    free = {"cost": {"cat": {"dog": 0.0, "bird": 0.0}}}
    assert np.isnan(score(free, NAMES, LABELS[:4], ANSWERS[:4]))


@given(_classes)
def test_a_table_of_equal_costs_is_the_accuracy(pairs: list[tuple[int, int]]) -> None:
    labels, answers = np.array(pairs).T
    for costs in ({}, {a: {b: 1.0 for b in NAMES if b != a} for a in NAMES}):
        assert score({"cost": costs}, NAMES, labels, answers) == pytest.approx(
            score("accuracy", NAMES, labels, answers)
        )


@given(_classes)
def test_no_score_is_above_one_and_a_perfect_answer_has_it(pairs: list[tuple[int, int]]) -> None:
    labels, answers = np.array(pairs).T
    for metric in ("accuracy", "balanced_accuracy", f"f1:{NAMES[labels[0]]}", {"cost": {"cat": {"dog": 9.0}}}):
        assert score(metric, NAMES, labels, answers) <= 1.0
        assert score(metric, NAMES, labels, labels) == pytest.approx(1.0)


def test_no_rows_have_no_score() -> None:
    none = np.empty(0, np.int64)
    assert all(np.isnan(score(m, NAMES, none, none)) for m in ("accuracy", "balanced_accuracy", "f1:cat", {"cost": {}}))


def test_metrics_have_names_that_fit_a_message() -> None:
    assert [metric_name(m) for m in ("f1:cat", {"cost": {}})] == ["f1:cat", "cost"]


def test_the_sign_test_is_exact() -> None:
    assert sign_test(0, 0) == 1.0
    assert sign_test(5, 0) == pytest.approx(1 / 32)
    assert sign_test(4, 1) == pytest.approx(6 / 32)
    assert 0.0 <= sign_test(3000, 1000) < 1e-9


def test_the_swap_test_agrees_with_the_sign_test_on_accuracy() -> None:
    labels = np.zeros(60, np.int64)
    base, candidate = np.zeros(60, np.int64), np.zeros(60, np.int64)
    base[:14], candidate[14:19] = 1, 1  # 14 wins, 5 losses
    gain, harm = swap_test("accuracy", NAMES, labels, base, candidate, seed=0)
    assert gain == pytest.approx(sign_test(14, 5), abs=0.015)
    assert harm == pytest.approx(sign_test(5, 14), abs=0.015)


def test_the_swap_test_sees_a_metric_fall_while_accuracy_rises() -> None:
    labels = np.repeat([0, 1], [300, 20])
    base, candidate = labels.copy(), labels.copy()
    base[:40] = 1  # 40 cats called dogs
    candidate[300:315] = 0  # 15 of 20 dogs lost
    assert score("accuracy", NAMES, labels, candidate) > score("accuracy", NAMES, labels, base)
    gain, harm = swap_test("balanced_accuracy", NAMES, labels, base, candidate, seed=0)
    assert harm < 0.01
    assert gain > 0.9


def test_models_that_never_differ_prove_nothing() -> None:
    assert swap_test("balanced_accuracy", NAMES, LABELS, ANSWERS, ANSWERS, seed=0) == (1.0, 1.0)
