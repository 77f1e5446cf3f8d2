"""Our monitor in the comparison: tuned by its setting, timed on the same rows as the peers."""

from __future__ import annotations

import math
import pickle
import time

from benchmarks.drift.intervals import mean_time_interval
from benchmarks.drift.peer_cases import CLEAN_INSTANCES, Case, Drifting
from benchmarks.drift.peers import Result, tune
from benchmarks.drift.streams import joined, monitor_of, windows_of
from orchestrator.drift.baseline import Baseline
from orchestrator.drift.sample import Sample, rows_of
from orchestrator.messages import Window
from orchestrator.settings import WINDOW_INSTANCES

LEAST_ARL, MOST_ARL = 1, 64_000


def measure_ours(cases: list[Case], drifting: Drifting, jobs: list[tuple[str, int]], target: int) -> tuple[Result, int]:
    """Tune `arl_instances`, then time every stream; and the pickled bytes of a window."""
    clean = [(case.baseline, list(windows_of(case.baseline, case.stream))) for case in cases]

    def count(minus_log: float) -> list[int]:
        return [_alarms(baseline, windows, round(math.exp(minus_log))) for baseline, windows in clean]

    instances = len(cases) * CLEAN_INSTANCES
    setting = round(math.exp(tune(count, math.log(LEAST_ARL), math.log(MOST_ARL), 8, instances)))
    achieved = mean_time_interval(count(math.log(setting)), [CLEAN_INSTANCES] * len(cases))
    print(f"ours: setting arl_instances={setting:,} gives {achieved[0]:,.0f} instances between false alarms")
    delays: dict[str, list[int]] = {}
    cpu_s, seen = 0.0, 0
    for name, seed in jobs:
        stream, onset = _stream(drifting, name, seed)
        monitor = monitor_of(drifting.baseline, setting)
        start_s = time.process_time()
        delay, absorbed = _delay(monitor, drifting.baseline, stream, onset)
        cpu_s += time.process_time() - start_s
        seen += absorbed
        delays.setdefault(name, []).append(delay)
    size = len(pickle.dumps(clean[0][1][0], protocol=5))
    return Result(float(setting), achieved, delays, 1e6 * cpu_s / seen), size


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


def _delay(monitor, baseline: Baseline, stream: Sample, onset: int) -> tuple[int, int]:  # type: ignore[no-untyped-def]
    """Instances since the onset until the window that raised the alarm was closed, -1: missed; and all absorbed.

    The cost counted is the reduction to windows (numpy here, the probe in the product) and the monitor's.
    """
    absorbed = 0
    for window in windows_of(baseline, stream):
        absorbed += WINDOW_INSTANCES
        monitor.absorb("r0", window)
        if monitor.alarm() is None:
            continue
        if absorbed > onset:
            return absorbed - onset, absorbed
        monitor.reset(window.digest)
    return -1, absorbed
