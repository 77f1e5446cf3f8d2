"""What the centre costs: many replicas, one report a second each, merged and tested without Ray.

Reports go through the table of replicas that counts each once, then into the monitor, as `Controller.receive` does it.
Some are sent twice, some late, some never: what was counted must say so.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.cifar10 import REFERENCE
from benchmarks.drift.false_alarms import drawn_baseline_and_fit
from benchmarks.drift.features import Features
from benchmarks.drift.generator import Generator
from benchmarks.drift.streams import monitor_of, windows_of
from orchestrator.fleet import Fleet
from orchestrator.messages import Report, Window

REPEATED, LATE, LOST = 0.02, 0.01, 0.01  # shares of the reports
TARGET_SHARE = 0.20
POOL_INSTANCES = 65_536  # clean ones that the reports' windows are picked from


@dataclass(frozen=True)
class Sent:
    """Deliveries in order, as (second, report), and what is in them."""

    deliveries: list[tuple[int, Report]]
    repeated: int
    late: int
    lost: int
    counted: int  # instances that must be counted, each once


def reports(windows: list[Window], num_replicas: int, seconds: int, seed: int) -> Sent:
    """A report a second from each replica; a late one arrives again after the next, as a slow heartbeat's does."""
    rng = np.random.default_rng(seed)
    deliveries: list[tuple[int, Report]] = []
    repeated = late = lost = counted = 0
    for second in range(seconds):
        for number in range(num_replicas):
            window = replace(windows[rng.integers(len(windows))], first_s=float(second), last_s=second + 1.0)
            report = Report(
                f"replica-{number}", f"process-{number}", second, window.base, 0, "base", ("base",), (window,)
            )
            kind = rng.random()
            last = second == seconds - 1  # a loss shows only when a later report arrives
            if kind < LOST and second > 0 and not last:
                lost += 1
                continue
            counted += window.count
            deliveries.append((second, report))
            if kind < LOST + LATE and not last:
                late += 1
                deliveries.append((second + 2, report))
            elif kind < LOST + LATE + REPEATED:
                repeated += 1
                deliveries.append((second, report))
    deliveries.sort(key=lambda pair: pair[0])
    return Sent(deliveries, repeated, late, lost, counted)


def measure(features: Features, num_replicas: int, seconds: int, arl_instances: int, seed: int = 0) -> None:
    """Deliver all reports as fast as they go; prints the share of one core and the counts beside what was sent."""
    generator, rng = Generator(features.sample(REFERENCE)), np.random.default_rng(seed)
    baseline, _ = drawn_baseline_and_fit(generator, "independent", rng)  # of the world that the windows come from
    windows = list(windows_of(baseline, generator.draw(generator.independent(POOL_INSTANCES, rng), rng)))
    sent = reports(windows, num_replicas, seconds, seed)
    monitor, fleet = monitor_of(baseline, arl_instances), Fleet()
    counted = alarms = 0
    started_s = time.process_time()
    for second, report in sent.deliveries:
        if fleet.admit(report, float(second)):
            for window in report.windows:
                monitor.absorb(report.replica_tag, window)
                counted += window.count
        if monitor.alarm() is not None:
            alarms += 1
            monitor.reset("base")
    spent_s = time.process_time() - started_s
    share = spent_s / seconds
    print(
        f"centre: {num_replicas:,} replicas, a report of one window a second, {seconds} s: {spent_s:.2f} CPU s, "
        f"{1e6 * spent_s / len(sent.deliveries):.0f} us a report, "
        f"{share:.1%} of one core (target <= {TARGET_SHARE:.0%})"
    )
    print(
        f"  repeated {sent.repeated} + late {sent.late} sent, {fleet.repeated} refused; lost {sent.lost} sent, "
        f"{fleet.lost_reports()} reported; instances {sent.counted:,} sent once, {counted:,} counted; alarms {alarms}"
    )
    right = fleet.repeated == sent.repeated + sent.late and fleet.lost_reports() == sent.lost
    print(f"  counts {'right' if right and counted == sent.counted else 'WRONG'}")
