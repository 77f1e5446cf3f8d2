"""Streams of windows for a monitor, out of samples; time is the number of the instance, in seconds, unless said.

Windows are reduced by `orchestrator.drift.statistics.summarise`, the oracle of the replicas' probe.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from orchestrator.drift.baseline import Baseline
from orchestrator.drift.monitor import Monitor
from orchestrator.drift.sample import Sample, rows_of
from orchestrator.drift.statistics import summarise
from orchestrator.messages import Window
from orchestrator.settings import WINDOW_INSTANCES


def window_of(baseline: Baseline, sample: Sample, first_s: float, segment: str = "", each_s: float = 1.0) -> Window:
    """One window of the whole sample, an instance every `each_s` seconds.

    Equal inputs have equal logits, which serve as their hashes: repeated inputs are counted.
    """
    num = len(sample.logits_NK)
    hashes_N = np.unique(sample.logits_NK, axis=0, return_inverse=True)[1].ravel()
    checks = replace(sample.checks(), hashes_N=hashes_N)
    sums = summarise(baseline, baseline.layout, sample.embedding_ND, sample.logits_NK, checks)
    return Window(baseline.base, baseline.digest, segment, num, first_s, first_s + (num - 1) * each_s, sums)


def windows_of(
    baseline: Baseline, sample: Sample, start_s: float = 0.0, segment: str = "", num: int = WINDOW_INSTANCES
) -> Iterator[Window]:
    """Windows of `num` in the order of the rows; a rest is left out."""
    for i in range(0, len(sample.logits_NK) - num + 1, num):
        yield window_of(baseline, rows_of(sample, slice(i, i + num)), start_s + i, segment)


def monitor_of(baseline: Baseline, arl_instances: int) -> Monitor:
    """A fresh monitor with one baseline."""
    monitor = Monitor(arl_instances)
    monitor.set_baseline(baseline)
    return monitor


def endless_rows(num_rows: int, num: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`num` row numbers in random order; after `num_rows` of them all come again in another order."""
    rounds = -(-num // num_rows)
    return np.concatenate([rng.permutation(num_rows) for _ in range(rounds)])[:num]


def joined(first: Sample, second: Sample) -> Sample:
    """The rows of one sample, then those of the other; columns that one of them lacks are left out."""
    pairs = {n: (getattr(first, n), getattr(second, n)) for n in vars(first)}
    return Sample(**{n: np.concatenate(pair) for n, pair in pairs.items() if all(v is not None for v in pair)})


@dataclass(frozen=True)
class Heard:
    """What a monitor said about one stream."""

    alarms_at: tuple[int, ...]  # instances of the stream absorbed when each alarm was raised
    scopes: tuple[str, ...]


def listen(monitor: Monitor, windows: Iterator[Window], num_replicas: int = 1) -> Heard:
    """Feed a stream, replicas in turn; every alarm is noted and cleared."""
    alarms_at, scopes, absorbed = [], [], 0
    for i, window in enumerate(windows):
        monitor.absorb(f"r{i % num_replicas}", window)
        absorbed += window.count
        alarm = monitor.alarm()
        if alarm is not None:
            alarms_at.append(absorbed)
            scopes.append(alarm.scope)
            monitor.reset(window.digest)
    return Heard(tuple(alarms_at), tuple(scopes))
