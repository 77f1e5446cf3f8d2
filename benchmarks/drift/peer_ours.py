"""Our monitor in the comparison: tuned by its setting, timed on the same rows as the peers."""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.drift.intervals import mean_time_interval
from benchmarks.drift.peer_cases import CLEAN_INSTANCES, Case, Drifting
from benchmarks.drift.peers import Result, tune
from benchmarks.drift.streams import joined, monitor_of, windows_of
from orchestrator.drift.baseline import Baseline
from orchestrator.drift.monitor import Monitor
from orchestrator.drift.sample import Sample, rows_of
from orchestrator.messages import Window

LEAST_ARL, MOST_ARL = 1, 64_000


@dataclass
class Cost:
    """CPU seconds of the parts, and the instances they were spent on."""

    reduction_s: float = 0.0  # in numpy, as a rehearsal does it; a replica's probe: `python -m benchmarks.drift probe`
    monitor_s: float = 0.0
    instances: int = 0


def measure_ours(
    cases: list[Case], drifting: Drifting, jobs: list[tuple[str, int]], target: int, num: int
) -> tuple[Result, str]:
    """Tune `arl_instances`, then time every stream; and a note on its cost.

    Args:
        cases: clean streams to tune on.
        drifting: the drifting ones.
        jobs: (set, seed) of each stream to time.
        target: mean instances between false alarms.
        num: instances a window: WINDOW_INSTANCES, or what a quiet replica answers in a second.
    """
    clean = [(case.baseline, list(windows_of(case.baseline, case.stream, num=num))) for case in cases]

    def count(minus_log: float) -> list[int]:
        return [_alarms(baseline, windows, round(math.exp(minus_log))) for baseline, windows in clean]

    instances = len(cases) * CLEAN_INSTANCES
    setting = round(math.exp(tune(count, math.log(LEAST_ARL), math.log(MOST_ARL), 8, instances)))
    achieved = mean_time_interval(count(math.log(setting)), [CLEAN_INSTANCES] * len(cases))
    print(f"ours: setting arl_instances={setting:,} gives {achieved[0]:,.0f} instances between false alarms")
    delays: dict[str, list[int]] = {}
    cost = Cost()
    for name, seed in jobs:
        stream, onset = _stream(drifting, name, seed)
        monitor = monitor_of(drifting.baseline, setting)
        delays.setdefault(name, []).append(_delay(monitor, windows_of(drifting.baseline, stream, num=num), onset, cost))
    reduction, monitoring = (1e6 * seconds / cost.instances for seconds in (cost.reduction_s, cost.monitor_s))
    size = len(pickle.dumps(clean[0][1][0], protocol=5))
    note = f"of them {monitoring:.1f} the monitor's, the rest the reduction's; {size:,} bytes a window of {num}"
    return Result(float(setting), achieved, delays, reduction + monitoring), note


def _alarms(baseline: Baseline, windows: list[Window], arl_instances: int) -> int:
    """Alarms of one clean stream; one replica, so that its test and the global one see the same."""
    monitor, count = monitor_of(baseline, arl_instances), 0
    for window in windows:
        monitor.absorb("r0", window)
        if monitor.alarm() is not None:
            count += 1
            monitor.reset(window.digest)
    return count


def _stream(drifting: Drifting, name: str, seed: int) -> tuple[Sample, int]:
    before, after, onset = drifting.rows(seed)
    clean, drifted = drifting.clean, drifting.sample(name)
    return joined(rows_of(clean, before), rows_of(drifted, after)), onset


def _delay(monitor: Monitor, windows: Iterator[Window], onset: int, cost: Cost) -> int:
    """Instances since the onset until the window that raised the alarm was closed, -1: missed."""
    absorbed = 0
    before_s = time.process_time()
    for window in windows:
        reduced_s = time.process_time()
        monitor.absorb("r0", window)
        absorbed += window.count
        cost.reduction_s += reduced_s - before_s
        before_s = time.process_time()
        cost.monitor_s += before_s - reduced_s
        cost.instances += window.count
        if monitor.alarm() is None:
            continue
        if absorbed > onset:
            return absorbed - onset
        monitor.reset(window.digest)
    return -1
