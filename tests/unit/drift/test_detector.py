"""The promise of the sequential test: rare false alarms on fresh references, early true ones."""

import dataclasses
import pickle

import numpy as np
import pytest
from mixture import World, window

from orchestrator.drift import evidence as ev
from orchestrator.drift.detector import Detector
from orchestrator.drift.levels import PLAIN_FIRST, SHARES, Levels
from orchestrator.drift.null import SCALES, SURVIVAL_Q, critical_value, gaussian_table, p_value
from orchestrator.drift.sample import rows_of
from orchestrator.drift.statistics import CHECKS

THRESHOLD = 2e6  # of the global scope at the default setting


def absorb(detector, w):
    return detector.absorb(ev.evidence_of(detector.baseline, w), w.first_s, w.last_s)


def feed(detector, sample, start_s=0.0, num=32):
    """The first `absorb` in windows of `num` that alarms, counted in instances; None where none does."""
    for i in range(0, len(sample.logits_NK), num):
        if absorb(detector, window(detector.baseline, rows_of(sample, slice(i, i + num)), start_s + i)):
            return i + num
    return None


@pytest.mark.parametrize("threshold", [200.0, 2000.0, THRESHOLD])
def test_levels_spent_on_the_tests_sum_up_to_one_false_alarm_per_threshold(threshold):
    levels = Levels(World(0).baseline(300), threshold)
    spent = {
        (part, scale): levels.level(part, scale) / levels.stride(scale)
        for part in SHARES
        for scale in range(len(SCALES))
        if levels.is_tested(part, scale)
    }
    assert sum(spent.values()) == pytest.approx(1.0 / threshold)


def test_small_windows_are_tested_where_alarms_may_be_frequent():
    world = World(1)
    assert Levels(world.baseline(300), THRESHOLD).first == PLAIN_FIRST
    assert Levels(world.baseline(300), 4000.0).first == 0
    delays = []
    for _ in range(5):
        detector = Detector(world.baseline(600), 4000.0)
        feed(detector, world.sample(400), num=8)
        delays.append(feed(detector, world.sample(64, shift=2.0), 1e3, num=8))
    assert sorted(delays)[2] <= 16


@pytest.mark.parametrize("num_reference", [100, 1500])
def test_mean_instances_between_false_alarms_keep_their_promise_on_fresh_references(num_reference):
    """Fresh world, reference and stream each time."""
    arl, alarms, instances = 20_000, 0, 0
    for seed in range(6):
        world = World(seed)
        detector = Detector(world.baseline(num_reference), arl)
        sample = world.sample(32 * 384)
        for i in range(0, len(sample.logits_NK), 32):
            if absorb(detector, window(detector.baseline, rows_of(sample, slice(i, i + 32)), float(i))):
                alarms, detector = alarms + 1, Detector(detector.baseline, arl)
        instances += len(sample.logits_NK)
    assert instances / max(alarms, 1) >= arl


def test_bursts_of_one_class_raise_no_alarm():
    world = World(5)
    detector = Detector(world.baseline(), THRESHOLD)
    sample = world.sample(8000)
    order = np.argsort(sample.labels_N, kind="stable").reshape(4, 25, -1)  # runs of some 80 of one class
    assert feed(detector, rows_of(sample, order.transpose(1, 0, 2).ravel())) is None


def test_a_severe_shift_alarms_within_128_instances_and_the_onset_is_dated():
    for seed in range(3):
        world = World(seed)
        detector = Detector(world.baseline(600), THRESHOLD)
        assert feed(detector, world.sample(500 + 5 * seed), num=5) is None
        onset_s = 500.0 + 5 * seed  # out of step with the detector's merging
        assert feed(detector, world.sample(130, shift=1.0), onset_s, num=5) <= 128
        assert abs(detector.onset_s - onset_s) <= 40


def test_a_mild_shift_is_seen_by_a_longer_window():
    world = World(4)
    detector = Detector(world.baseline(3000), THRESHOLD)
    feed(detector, world.sample(3200))
    found = feed(detector, world.sample(8000, shift=0.12), 1e5)
    assert 32 < found <= 4096


def test_class_shares_alone_alarm_although_each_class_is_as_it_was():
    world = World(6)
    detector = Detector(world.baseline(3000), THRESHOLD)
    feed(detector, world.sample(3200))
    assert feed(detector, world.sample(4000, priors=[0.6, 0.2, 0.1, 0.1]), 1e5) <= 2048
    summed = ev.Evidence(detector._blocks_LOV[3].sum(axis=0), detector.baseline)
    assert ev.outputs_p(detector.baseline, summed) > 1e-4


@pytest.mark.parametrize("name", CHECKS)
def test_each_input_check_alarms_by_itself(name):
    world = World(2)
    baseline = world.baseline(400)
    detector = Detector(baseline, THRESHOLD)
    at = baseline.layout.slices["checks"].start + CHECKS.index(name)
    for i in range(6):
        w = window(baseline, world.sample(32), 32.0 * i)
        sums = w.sums.copy()
        sums[at] = 20
        if absorb(detector, dataclasses.replace(w, sums=sums)):
            return
    pytest.fail(f"no alarm for {name}")


def test_brighter_inputs_alarm_even_where_the_embedding_is_normal():
    world = World(2)
    detector = Detector(world.baseline(), THRESHOLD)
    sample = world.sample(256)
    bright = dataclasses.replace(sample, channel_means_NC=sample.channel_means_NC + 30.0)
    assert feed(detector, bright) <= 128


def test_a_busy_scope_takes_larger_steps_rather_than_more():
    world = World(8)
    detector = Detector(world.baseline(), THRESHOLD)
    sample = world.sample(3200)
    for i in range(100):  # a hundred windows within a tenth of a second
        w = window(detector.baseline, rows_of(sample, slice(32 * i, 32 * i + 32)), 0.0)
        absorb(detector, dataclasses.replace(w, first_s=i / 1000, last_s=i / 1000))
    assert detector.instances == 3200
    assert detector._steps == 2


def test_a_window_without_valid_instances_is_no_evidence_of_a_shift():
    world = World(2)
    baseline = world.baseline(200)
    sample = world.sample(40)
    empty = dataclasses.replace(sample, embedding_ND=sample.embedding_ND * np.nan)
    found = ev.evidence_of(baseline, window(baseline, empty))
    assert ev.outputs_p(baseline, found) == 1.0
    assert ev.difference_p(baseline, found, found) == 1.0
    assert ev.checks_p(baseline, found) < 1e-6


def test_the_statistic_says_how_rare_the_oddest_window_is():
    table_T = gaussian_table(np.ones(9), np.random.default_rng(0))
    rng = np.random.default_rng(1)
    draws = (rng.standard_normal((20_000, 9)) ** 2).mean(axis=1)
    p = np.array([p_value(t, table_T) for t in draws])
    for limit in (0.5, 0.1, 0.01, 0.001):
        assert np.mean(p <= limit) == pytest.approx(limit, rel=0.25)
    assert p_value(0.0, table_T) == 1.0
    assert p_value(float(table_T[-2]), table_T) == pytest.approx(SURVIVAL_Q[-1])
    for level in (1e-9, 1e-3, 0.02, 0.4):
        assert p_value(critical_value(level, table_T), table_T) == pytest.approx(level)


def test_a_snapshot_continues_where_it_was_taken():
    world = World(3)
    detector = Detector(world.baseline(), 1e5)
    feed(detector, world.sample(320, shift=0.1))
    twin = Detector(detector.baseline, 1e5)
    twin.restore(pickle.loads(pickle.dumps(detector.snapshot())))
    more = world.sample(640, shift=0.1)
    feed(detector, more, 1e3)
    feed(twin, more, 1e3)
    assert twin.statistic == detector.statistic
    assert twin.instances == detector.instances
    assert not Detector(detector.baseline, 4000.0).restore(detector.snapshot())  # which has more scales


def test_a_threshold_must_be_positive():
    with pytest.raises(ValueError, match="must be > 0"):
        Detector(World(3).baseline(64), 0.0)
