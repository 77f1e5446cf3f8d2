"""Which replica or segment strayed alone, judged on all that each of them saw since the onset."""

from dataclasses import replace

import numpy as np
import pytest
from mixture import World, window

from orchestrator.drift.monitor import Monitor
from orchestrator.messages import Alarm

WORLD = World(5)
BASELINE = WORLD.baseline(3000)
ALARM = Alarm("replica:r1", "base", 1e6, 6e4, 0.0, 100.0, 256)


def scope_of(samples, segments=None):
    """What is blamed when replica (or segment) i saw sample i."""
    monitor = Monitor(1_000_000)
    monitor.set_baseline(BASELINE)
    for i, sample in enumerate(samples):
        tag = "r0" if segments else f"r{i}"
        monitor.absorb(tag, window(BASELINE, sample, 0.0, segments[i] if segments else ""))
    return monitor.attribute(ALARM).scope


def shifted(*shifts, num=300):
    return [WORLD.sample(num, shift=shift) for shift in shifts]


@pytest.mark.parametrize("shift", [0.3, 0.8])
def test_the_one_that_strayed_is_blamed(shift):
    assert scope_of(shifted(0.0, shift, 0.0)) == "replica:r1"
    assert scope_of(shifted(0.0, shift, 0.0), ["north", "south", ""]) == "segment:south"


def test_answers_that_are_not_finite_are_blamed_on_the_replica_that_gives_them():
    bad = WORLD.sample(300)
    assert scope_of([*shifted(0.0, 0.0), replace(bad, logits_NK=bad.logits_NK * np.nan)]) == "replica:r2"


def test_nobody_is_blamed_for_what_others_see_as_well():
    assert scope_of(shifted(0.8, 0.8, 0.8)) == "global"
    assert scope_of(shifted(0.0, 0.8, 0.8)) == "global"


def test_nobody_is_blamed_on_few_instances_or_alone():
    assert scope_of(shifted(0.0, 0.8, num=40)) == "global"
    assert scope_of(shifted(0.8)) == "global"


def test_one_replica_of_fifty_is_found():
    samples = shifted(*[0.0] * 50, num=64)
    samples[17] = WORLD.sample(64, shift=1.0)
    assert scope_of(samples) == "replica:r17"
