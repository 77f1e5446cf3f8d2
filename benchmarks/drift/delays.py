"""Detection delays on real features: every set and blend, one segment, one replica, a tenth of the traffic.

A stream is 2,000 clean instances, then drifted ones; delays count from the onset to the end of the window that raised
the alarm. Rows come in random order, all of them before any comes again. An alarm before the onset counts as false and
is cleared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.cifar10 import CLEAN, DRIFTS
from benchmarks.drift.features import PERCENTS, Features, set_name
from benchmarks.drift.streams import endless_rows, joined, monitor_of, window_of
from orchestrator.drift.baseline import Baseline
from orchestrator.drift.monitor import Monitor
from orchestrator.drift.sample import Sample, rows_of
from orchestrator.messages import Window
from orchestrator.settings import WINDOW_INSTANCES

CLEAN_INSTANCES = 2_016  # before the onset: whole windows
NUM_PARTS = 4  # replicas or segments of the partial scenarios
CAP = {"all": 4_000, "segment": 4_000, "replica": 4_000, "tenth": 12_000}  # own instances after which it is a miss
TENTH = 0.1
ATTRIBUTE_AFTER = 256  # own instances after the alarm when the controller asks again whom it concerns


@dataclass(frozen=True)
class Delay:
    """One stream's outcome. `delay` in own instances since the onset, -1 for a miss."""

    delay: int
    false_alarms: int
    named_at_once: bool = False
    named_later: bool = False


@dataclass(frozen=True)
class _Step:
    tag: str
    window: Window
    drifted: int  # own drifted-stream instances absorbed with this window, all instances for a tenth


def scenario(kind: str, baseline: Baseline, clean: Sample, drifted: Sample, seed: int) -> Iterator[_Step]:
    """The windows of one stream: `all`, `segment`, `replica` or `tenth`."""
    rng = np.random.default_rng([seed, *kind.encode()])
    num_steps = (CLEAN_INSTANCES + CAP[kind]) // WINDOW_INSTANCES
    parts = NUM_PARTS if kind in ("segment", "replica") else 1
    total = parts * num_steps * WINDOW_INSTANCES
    clean_rows = iter(endless_rows(len(clean.logits_NK), total, rng).reshape(-1, WINDOW_INSTANCES))
    drift_rows = endless_rows(len(drifted.logits_NK), CAP[kind] + WINDOW_INSTANCES, rng).reshape(-1, WINDOW_INSTANCES)
    time_s, cursor = 0.0, 0
    for step in range(num_steps):
        begun = step * WINDOW_INSTANCES >= CLEAN_INSTANCES
        for part in range(parts):
            sample, ours = rows_of(clean, next(clean_rows)), 0
            if begun and part == 0:
                ours = WINDOW_INSTANCES
                fresh = rows_of(drifted, drift_rows[cursor])
                sample = _mixed(sample, fresh, rng) if kind == "tenth" else fresh
                cursor += 1
            tag = f"r{part}" if kind == "replica" else f"r{step % 2}"
            segment = f"s{part}" if kind == "segment" else ""
            yield _Step(tag, window_of(baseline, sample, time_s, segment), ours)
            time_s += WINDOW_INSTANCES


def _mixed(clean: Sample, drifted: Sample, rng: np.random.Generator) -> Sample:
    """Each row is drifted with probability TENTH."""
    rows = np.where(rng.random(WINDOW_INSTANCES) < TENTH, WINDOW_INSTANCES, 0) + np.arange(WINDOW_INSTANCES)
    return rows_of(joined(clean, drifted), rows)


def follow(monitor: Monitor, steps: Iterator[_Step], cap: int, culprit: str) -> Delay:
    """Feed a stream until its alarm is raised and, for a culprit, can be attributed."""
    own, false_alarms, delay, at_once = 0, 0, -1, False
    for step in steps:
        own += step.drifted
        monitor.absorb(step.tag, step.window)
        alarm = monitor.alarm()
        if alarm is None:
            if own >= cap:
                break
            continue
        if own == 0:
            false_alarms += 1
            monitor.reset(step.window.digest)
            continue
        if delay < 0:
            delay, at_once = own, alarm.scope == culprit
            if not culprit or at_once:
                return Delay(delay, false_alarms, at_once, at_once)
        if monitor.attribute(alarm).scope == culprit:
            return Delay(delay, false_alarms, at_once, True)
        if own >= delay + ATTRIBUTE_AFTER:
            break
    return Delay(delay, false_alarms, at_once, False)


def run_once(job: tuple[str, str, int], path: Path, arl_instances: int) -> Delay:
    """One stream of one kind and set."""
    kind, name, seed = job
    features = _features(path)
    monitor = monitor_of(features.baseline, arl_instances)
    steps = scenario(kind, features.baseline, _sample(path, CLEAN), _sample(path, name), seed)
    culprit = {"segment": "segment:s0", "replica": "replica:r0"}.get(kind, "")
    return follow(monitor, steps, CAP[kind], culprit)


_cache: dict[tuple[Path, str], Features | Sample] = {}


def _features(path: Path) -> Features:
    if (path, "") not in _cache:
        _cache[path, ""] = Features(path)
    found = _cache[path, ""]
    assert isinstance(found, Features)
    return found


def _sample(path: Path, name: str) -> Sample:
    if (path, name) not in _cache:
        _cache[path, name] = _features(path).sample(name)
    found = _cache[path, name]
    assert isinstance(found, Sample)
    return found


def measure(path: Path, kind: str, percents: tuple[int, ...], arl_instances: int, seeds: int, workers: int) -> None:
    """All seeds of all sets of one kind; prints a row per set and keeps the delays as JSON."""
    features = Features(path)
    clean_accuracy = features.accuracy(CLEAN)
    jobs = [(kind, set_name(d, p), seed) for p in percents for d in DRIFTS for seed in range(seeds)]
    with ProcessPoolExecutor(workers) as pool:
        found = list(pool.map(partial(run_once, path=path, arl_instances=arl_instances), jobs, chunksize=10))
    by_set: dict[str, list[Delay]] = {}
    for (_, name, _), delay in zip(jobs, found, strict=True):
        by_set.setdefault(name, []).append(delay)
    print(f"{kind}: {seeds} seeds, arl {arl_instances:,}, delays in {'own ' if kind != 'all' else ''}instances")
    print(
        f"{'set':20s} {'lost':>5s} {'median':>7s} {'p95':>7s} {'missed':>7s} {'false':>6s} {'named':>6s} {'later':>6s}"
    )
    for name, delays in by_set.items():
        times = np.array([d.delay if d.delay >= 0 else np.inf for d in delays])
        median, p95 = np.quantile(times, [0.5, 0.95], method="higher")
        named = [np.mean([getattr(d, n) for d in delays]) for n in ("named_at_once", "named_later")]
        lost = 100 * (clean_accuracy - features.accuracy(name))
        print(
            f"{name:20s} {lost:5.1f} {median:7.0f} {p95:7.0f} {np.isinf(times).sum():7d} "
            f"{sum(d.false_alarms for d in delays):6d} {named[0]:6.2f} {named[1]:6.2f}",
            flush=True,
        )
    kept = {name: [vars(d) for d in delays] for name, delays in by_set.items()}
    (path.parent / f"delays-{kind}-{arl_instances}.json").write_text(json.dumps(kept))


KINDS: dict[str, tuple[int, ...]] = {"all": PERCENTS, "segment": (100,), "replica": (100,), "tenth": (100,)}
