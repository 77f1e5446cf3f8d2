"""Which replica strayed alone, judged on all that each of them saw."""

from dataclasses import replace

import numpy as np
from mixture import World, window

from orchestrator.drift.culprit import blame
from orchestrator.messages import Alarm

WORLD = World(5)
BASELINE = WORLD.baseline(3000)
ALARM = Alarm("global", "base", 1e6, 6e4, 0.0, 100.0, 256)


def parts(*shifts, num=300):
    return {f"replica:r{i}": window(BASELINE, WORLD.sample(num, shift=shift)) for i, shift in enumerate(shifts)}


def test_the_one_replica_that_strayed_is_blamed():
    assert blame(BASELINE, ALARM, parts(0.0, 0.8, 0.0)).scope == "replica:r1"


def test_answers_that_are_not_finite_are_blamed_on_the_replica_that_gives_them():
    bad = WORLD.sample(300)
    seen = parts(0.0, 0.0) | {"replica:r2": window(BASELINE, replace(bad, logits_NK=bad.logits_NK * np.nan))}
    assert blame(BASELINE, ALARM, seen).scope == "replica:r2"


def test_a_replica_is_not_blamed_for_what_the_others_see_as_well():
    assert blame(BASELINE, replace(ALARM, scope="replica:r1"), parts(0.8, 0.8, 0.8)).scope == "global"
    assert blame(BASELINE, replace(ALARM, scope="replica:r1"), parts(0.0, 0.8, 0.8)).scope == "global"


def test_nobody_is_blamed_on_few_instances_and_a_fleet_of_one_stays_as_it_is():
    assert blame(BASELINE, ALARM, parts(0.0, 0.8, num=40)).scope == "global"
    assert blame(BASELINE, ALARM, parts(0.8)).scope == "global"


def test_the_scope_of_a_segment_is_left_alone():
    alarm = replace(ALARM, scope="segment:north")
    assert blame(BASELINE, alarm, parts(0.0, 0.8, 0.0)).scope == "segment:north"
