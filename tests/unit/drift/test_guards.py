"""Guard metrics of a version that is being rolled out."""

from dataclasses import replace

import numpy as np
from mixture import World, window

from orchestrator.guards import anomaly

WORLD = World(5)
BASELINE = WORLD.baseline(2000)


def broken(sample, share):
    logits_NK = np.where((np.arange(len(sample.logits_NK)) < share * len(sample.logits_NK))[:, None], np.nan, 1.0)
    return replace(sample, logits_NK=sample.logits_NK * logits_NK)


def test_answers_as_they_should_be_raise_no_guard_and_too_few_say_nothing():
    assert anomaly(BASELINE, window(BASELINE, WORLD.sample(128)), None, 64) == ""
    assert anomaly(BASELINE, window(BASELINE, broken(WORLD.sample(32), 1.0)), None, 64) == ""


def test_answers_of_one_class_are_a_collapse():
    sample = WORLD.sample(128)
    sample.logits_NK[:, 2] += 1e3
    assert "class 2 share 1.000" in anomaly(BASELINE, window(BASELINE, sample), None, 64)


def test_answers_that_are_not_finite_are_held_against_a_version_unless_the_old_one_gives_them_too():
    now = window(BASELINE, broken(WORLD.sample(128), 0.1))
    assert "not finite: share 0.102 > 0.010" in anomaly(BASELINE, now, None, 64)
    old = window(BASELINE, broken(WORLD.sample(128), 0.1))
    assert anomaly(BASELINE, now, (BASELINE, old), 64) == ""
    assert "not finite" in anomaly(BASELINE, window(BASELINE, broken(WORLD.sample(128), 1.0)), (BASELINE, old), 64)
