"""True labels: rare false alarms at the tolerated error, early true ones above it."""

import numpy as np
import pytest

from orchestrator.drift.labels import LabelTest, tolerated_error


def test_the_tolerated_error_is_the_references_with_its_doubt_and_the_harmless_loss():
    assert tolerated_error(0.9, 10_000, 0.01) == pytest.approx(0.1 + 2 * 0.003 + 0.01)
    assert tolerated_error(1.0, 100, 0.0) > 0.0
    assert tolerated_error(0.0, 10, 1.0) < 1.0


def test_labels_at_the_tolerated_error_alarm_no_more_often_than_promised():
    rng, threshold, alarms, num = np.random.default_rng(0), 500.0, 0, 60_000
    test = LabelTest(0.12, threshold)
    for wrong in rng.random(num) < 0.12:
        if test.absorb(bool(wrong), 0.0):
            alarms, test = alarms + 1, LabelTest(0.12, threshold)
    assert num / max(alarms, 1) >= threshold


@pytest.mark.parametrize(("error", "most"), [(0.3, 400), (0.6, 60)])
def test_more_errors_alarm_soon_and_the_onset_is_dated(error, most):
    rng = np.random.default_rng(1)
    test = LabelTest(0.12, 1e6)
    for i in range(500):
        assert not test.absorb(bool(rng.random() < 0.1), float(i))
    for i in range(most):
        if test.absorb(bool(rng.random() < error), 500.0 + i):
            break
    else:
        pytest.fail(f"no alarm within {most} labels")
    assert abs(test.onset_s - 500.0) <= 60
    assert test.errors <= test.labels
