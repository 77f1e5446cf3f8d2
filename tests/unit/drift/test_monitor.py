"""The fleet's monitor: one sticky alarm, its scope, the way back, restarts."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
from mixture import NUM_CHANNELS, World, window

from orchestrator.drift.baseline import fit_baseline
from orchestrator.drift.monitor import Monitor
from orchestrator.errors import IntegrityError

WORLD = World(7)
BASELINE = WORLD.baseline(1500)


def fresh():
    monitor = Monitor(1_000_000)
    monitor.set_baseline(BASELINE)
    return monitor


def feed(monitor, num, tags=("r0", "r1"), start_s=0.0, segment="", broken=(), **sample):
    """`num` windows of 16, replica by replica; `broken` names replicas whose traffic alone is shifted."""
    for i in range(num):
        tag = tags[i % len(tags)]
        shift = {"shift": 1.0} if tag in broken or segment in broken else sample
        monitor.absorb(tag, window(BASELINE, WORLD.sample(16, **shift), start_s + 16.0 * i, segment))


def test_normal_traffic_raises_no_alarm():
    monitor = fresh()
    feed(monitor, 100)
    assert monitor.alarm() is None
    assert monitor.ignored == 0


def test_a_shift_of_all_traffic_raises_a_sticky_global_alarm_until_reset():
    monitor = fresh()
    feed(monitor, 20)
    feed(monitor, 8, start_s=1000.0, shift=1.0)
    alarm = monitor.alarm()
    assert alarm.scope == "global"
    assert alarm.statistic >= alarm.threshold  # of whichever test crossed first
    assert alarm.raised_s - 1000.0 <= 128
    feed(monitor, 10, start_s=2000.0)
    assert monitor.alarm() == alarm
    monitor.reset("base")
    assert monitor.alarm() is None


def test_one_broken_replica_of_four_is_named():
    monitor = fresh()
    feed(monitor, 40, tags=("a", "b", "c", "d"), broken=("c",))
    alarm = monitor.alarm()
    assert alarm is not None
    assert monitor.attribute(alarm).scope == "replica:c"


def test_a_drift_that_all_replicas_see_is_blamed_on_none():
    monitor = fresh()
    feed(monitor, 40, tags=("a", "b", "c", "d"), shift=0.5)
    assert monitor.attribute(monitor.alarm()).scope == "global"


def test_one_drifted_segment_is_named():
    monitor = fresh()
    for i in range(16):
        for site in ("north", "south"):
            feed(monitor, 2, start_s=64.0 * i, segment=site, broken=("south",))
    assert monitor.attribute(monitor.alarm()).scope == "segment:south"


def test_sites_and_replicas_with_a_class_mix_of_their_own_raise_no_alarm():
    monitor = fresh()
    mixes = {"zoo": [0.5, 0.5, 0.0, 0.0], "road": [0.0, 0.0, 0.5, 0.5]}
    for i in range(160):
        for number, (site, priors) in enumerate(mixes.items()):
            feed(monitor, 1, tags=(f"r{number}",), start_s=32.0 * i + 16.0 * number, segment=site, priors=priors)
    assert monitor.alarm() is None


def test_the_growth_of_a_source_is_its_share_now_in_its_share_before():
    monitor = fresh()
    for i in range(20):
        for site in ("north", "south"):
            feed(monitor, 1, start_s=32.0 * i, segment=site)
    for i in range(12):
        feed(monitor, 3, start_s=5000.0 + 64.0 * i, segment="south", broken=("south",))
        feed(monitor, 1, start_s=5048.0 + 64.0 * i, segment="north")
    alarm = monitor.attribute(monitor.alarm())
    assert alarm.scope == "segment:south"
    assert monitor.growth(alarm) == pytest.approx(1.5, abs=0.15)  # 75% of the traffic where it was 50%
    assert math.isnan(monitor.growth(replace(alarm, scope="global")))


def test_windows_without_a_baseline_or_of_another_base_are_counted_and_ignored():
    monitor = fresh()
    w = window(BASELINE, WORLD.sample(16))
    for odd in (replace(w, digest="unknown"), replace(w, base="other"), replace(w, sums=w.sums[:-1])):
        monitor.absorb("r0", odd)
    assert monitor.ignored == 3
    assert monitor.since(0.0, "unknown") is None


def test_since_merges_what_began_at_the_onset_or_later():
    monitor = fresh()
    feed(monitor, 10)
    assert monitor.since(32.0, "base").count == 8 * 16
    assert monitor.since(32.0, "base", "replica:r1").count == 4 * 16
    assert monitor.since(1e9, "base") is None


def test_after_a_reset_only_the_named_digest_is_tested():
    monitor = fresh()
    monitor.reset("another")
    feed(monitor, 20, shift=1.0)
    assert monitor.alarm() is None
    assert monitor.since(0.0, "base").count == 320


def test_the_return_of_the_old_world_under_an_adapter_is_told_from_a_new_drift():
    adapter = fit_baseline("b" * 8, "a1", WORLD.sample(800), WORLD.sample(800, shift=0.6), BASELINE, NUM_CHANNELS)
    for sample, returned in (({}, True), ({"shift": 2.0}, False)):
        monitor = Monitor(1_000_000)
        monitor.set_baseline(adapter)
        for i in range(12):
            monitor.absorb("r0", window(adapter, WORLD.sample(32, shift=0.6), 32.0 * i))
        assert monitor.alarm() is None
        for i in range(4):
            monitor.absorb("r0", window(adapter, WORLD.sample(32, **sample), 1000 + 32.0 * i))
        assert monitor.alarm().returned is returned


def test_a_snapshot_keeps_the_alarm_and_the_evidence():
    monitor, twin, unaware = fresh(), fresh(), fresh()
    feed(monitor, 20, shift=0.12)  # nothing that a fresh monitor would alarm at soon
    assert monitor.alarm() is None
    twin.restore(monitor.snapshot())
    before = {name: s["statistic"] for name, s in monitor.statistic()["scopes"].items()}
    windows = [window(BASELINE, WORLD.sample(32, shift=0.12), 2000.0 + 32 * i) for i in range(400)]
    for w in windows:
        for each in (monitor, twin, unaware):
            if each.alarm() is None:
                each.absorb("r0", w)
    assert before
    assert twin.alarm().raised_s == monitor.alarm().raised_s <= unaware.alarm().raised_s
    twin.restore(monitor.snapshot())
    assert twin.alarm() == monitor.alarm()
    with pytest.raises(IntegrityError, match="npz"):
        twin.restore(b"nothing")


def test_a_changed_baseline_starts_its_tests_anew_and_an_equal_one_does_not():
    monitor = fresh()
    feed(monitor, 10)
    monitor.set_baseline(replace(BASELINE))
    assert monitor.since(0.0, "base") is not None
    monitor.set_baseline(WORLD.baseline(500))
    assert monitor.since(0.0, "base") is None


def test_the_page_sees_every_scope_with_its_level():
    monitor = fresh()
    feed(monitor, 10)
    shown = monitor.statistic()
    assert set(shown["scopes"]) == {"global", "replica:r0", "replica:r1"}
    assert all(0 <= s["level"] < 1 for s in shown["scopes"].values())


def test_the_rate_of_false_alarms_must_be_positive():
    with pytest.raises(ValueError, match="arl_instances must be >= 1"):
        Monitor(0)


@pytest.mark.parametrize("spoil", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b[:200] + b"x" + b[201:]])
def test_a_spoilt_snapshot_is_refused_by_name_and_changes_nothing(spoil):
    monitor = fresh()
    feed(monitor, 40, shift=1.0)
    before = monitor.statistic()
    with pytest.raises(IntegrityError, match="npz"):
        monitor.restore(spoil(monitor.snapshot()))
    assert monitor.statistic() == before


def test_a_snapshot_of_another_version_is_refused_by_name():
    monitor = fresh()
    buffer = io.BytesIO()
    np.savez(
        buffer, meta=np.frombuffer(b'{"detectors": [], "watched": null, "alarm": {"odd": 1}, "ignored": 0}', np.uint8)
    )
    with pytest.raises(IntegrityError, match="npz"):
        monitor.restore(buffer.getvalue())
