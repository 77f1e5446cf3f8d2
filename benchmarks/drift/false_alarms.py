"""False alarms per million instances: reference and stream drawn afresh each run, counted at the default setting.

Every run draws a commissioning reference, keeps the 80% that the product fits a baseline on (the report part stays
out) and streams clean traffic from the same generator past the monitor. Runs differ in their reference, so they are the
clusters of the interval.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.cifar10 import CLEAN, NUM_CHANNELS, REFERENCE
from benchmarks.drift.features import Features
from benchmarks.drift.generator import Generator
from benchmarks.drift.intervals import rate_per_million
from benchmarks.drift.streams import Heard, listen, monitor_of, windows_of
from orchestrator.drift.baseline import Baseline, fit_baseline
from orchestrator.drift.sample import Sample, rows_of
from orchestrator.messages import Window

REFERENCE_INSTANCES, FIT_SHARE = 5_000, 0.8
STREAM_INSTANCES = 100_000
NUM_REPLICAS = 2
TRAFFICS = ("independent", "bursts", "cycle")
PIECE = 16_384  # instances drawn at once

_generators: dict[Path, Generator] = {}


def generator_of(path: Path) -> Generator:
    """The generator fitted to the real reference and clean traffic; one per process."""
    if path not in _generators:
        _generators[path] = Generator(Features(path).sample(REFERENCE))
    return _generators[path]


def drawn_baseline_and_fit(generator: Generator, traffic: str, rng: np.random.Generator) -> tuple[Baseline, Sample]:
    """A fresh commissioning reference: its fit and gate parts, and the baseline fitted on them."""
    labels_N = generator.reference_labels(traffic, REFERENCE_INSTANCES, rng)
    fit_N = np.sort(rng.permutation(len(labels_N))[: int(FIT_SHARE * len(labels_N))])
    fit = generator.draw(labels_N[fit_N], rng)
    return fit_baseline("bench", "base", fit, None, None, NUM_CHANNELS), fit


def run_once(seed: int, path: Path, traffic: str, arl_instances: int, instances: int) -> Heard:
    """One reference, one stream."""
    generator, rng = generator_of(path), np.random.default_rng([seed, TRAFFICS.index(traffic)])
    baseline, _ = drawn_baseline_and_fit(generator, traffic, rng)
    monitor = monitor_of(baseline, arl_instances)
    labels_N = generator.labels(traffic)(instances, rng)

    def stream() -> Iterator[Window]:
        for start in range(0, instances, PIECE):
            yield from windows_of(baseline, generator.draw(labels_N[start : start + PIECE], rng), float(start))

    return listen(monitor, stream(), NUM_REPLICAS)


def measure(path: Path, traffic: str, arl_instances: int, runs: int, workers: int, out: Path) -> None:
    """All runs of one kind of traffic; prints the rate with its interval and keeps the counts as JSON."""
    start_s = time.perf_counter()
    job = partial(run_once, path=path, traffic=traffic, arl_instances=arl_instances, instances=STREAM_INSTANCES)
    with ProcessPoolExecutor(workers) as pool:
        heard = list(pool.map(job, range(runs)))
    alarms = [len(h.alarms_at) for h in heard]
    rate, low, high = rate_per_million(alarms, STREAM_INSTANCES)
    scopes = sorted({scope for h in heard for scope in h.scopes})
    print(
        f"{traffic:12s} arl {arl_instances:,}: {sum(alarms)} alarms in {runs} runs of {STREAM_INSTANCES:,}; "
        f"{rate:.2f} per million, 95% interval [{low:.2f}, {high:.2f}] clustered by reference; "
        f"worst run {max(alarms)}; scopes {', '.join(scopes) or 'none'}; {time.perf_counter() - start_s:.0f} s",
        flush=True,
    )
    kept = {"alarms": alarms, "rate": rate, "interval": [low, high], "arl_instances": arl_instances}
    (out / f"false-alarms-{traffic}-{arl_instances}.json").write_text(json.dumps(kept))


def measure_real(features: Features, arl_instances: int, seeds: int = 20) -> None:
    """Real clean traffic against the real reference: in its own order, then in `seeds` random ones."""
    baseline, clean = features.baseline, features.sample(CLEAN)
    alarms, highest = [], 0.0
    for seed in range(-1, seeds):
        num = len(clean.logits_NK)
        order = np.arange(num) if seed < 0 else np.random.default_rng(seed).permutation(num)
        monitor = monitor_of(baseline, arl_instances)
        alarms.append(len(listen(monitor, windows_of(baseline, rows_of(clean, order)), NUM_REPLICAS).alarms_at))
        highest = max(highest, *(s["level"] for s in monitor.statistic()["scopes"].values()))
    print(
        f"real clean traffic, {num:,} instances: {alarms[0]} alarms in its own order, "
        f"{sum(alarms[1:])} in {seeds} random orders; highest level at an end {highest:.2f} of 1"
    )
