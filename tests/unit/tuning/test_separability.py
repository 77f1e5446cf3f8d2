"""What anyone could reach at best, if one class stayed as it was."""

import numpy as np
import pytest

from tuning.separability import ceiling

RNG = np.random.default_rng(5)


def draw(num, normal_mean):
    """One telling column of three: 15% at N(-2.5, 0.8), the others at N(normal_mean, 1)."""
    labels = (RNG.random(num) < 0.15).astype(np.int64)
    rows = RNG.standard_normal((num, 3))
    rows[:, 1] = np.where(labels == 1, RNG.normal(-2.5, 0.8, num), RNG.normal(normal_mean, 1.0, num))
    return rows, labels


def test_classes_that_came_together_leave_a_constant_answer():
    reference, labels = draw(4000, 0.0)
    found = ceiling(reference, labels, draw(2000, -2.2)[0])
    assert found.unchanged == 1
    assert found.accuracy == pytest.approx(0.85, abs=0.02)  # Bayes accuracy in closed form: 0.850
    assert found.constant == pytest.approx(0.85, abs=0.02)


def test_an_unchanged_world_keeps_its_ceiling():
    reference, labels = draw(4000, 0.0)
    assert ceiling(reference, labels, draw(2000, 0.0)[0]).accuracy == pytest.approx(0.935, abs=0.07)


def test_where_every_class_left_there_is_no_ceiling_to_name():
    reference, labels = draw(4000, 0.0)
    assert ceiling(reference, labels, draw(2000, 0.0)[0] + 20.0) is None


def test_a_class_of_a_few_rows_is_not_asked():
    reference, labels = draw(4000, 0.0)
    labels = np.where(np.arange(4000) < 10, 1, 0)
    assert ceiling(reference[labels == 1], labels[labels == 1], draw(15, 0.0)[0]) is None
