"""Ours beside other detectors: the same streams, each tuned to the same mean time between false alarms.

Each peer runs in an environment of its own (made here, never a dependency of the project). A peer gives a statistic
after each instance; its threshold is the one that alarms once in TARGET clean instances, found on references and
streams drawn from the generator. ADWIN is tuned by its delta, ours by its setting. Peers see every instance at once,
ours learns of a drift when a window closes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.cifar10 import CLEAN, DRIFTS
from benchmarks.drift.features import PERCENTS, Features, set_name
from benchmarks.drift.intervals import mean_time_interval
from benchmarks.drift.peer_cases import (
    CLEAN_INSTANCES,
    CLEAN_REFERENCES,
    LEAD_INSTANCES,
    MAX_INSTANCES,
    Case,
    Drifting,
    clean_case,
    columns,
)
from orchestrator.settings import WINDOW_INSTANCES

TARGET, TOLERATED = 2_000, 0.2
WORKER = Path(__file__).with_name("peer_worker.py")
# Instances a window: a window closes at 32, or after the second in which a quiet replica answers 8 or 4.
OURS = {"ours-32": WINDOW_INSTANCES, "ours-8": 8, "ours-4": 4}
BLEND_SEEDS = {100: 1.0, 50: 1.0, 25: 0.4}  # part of the seeds used: a mild drift takes long


@dataclass(frozen=True)
class Peer:
    """One peer: the requirement to install, what it is shown, its window."""

    name: str
    requirement: str
    feature: str
    window: int
    environment: str
    share: float = 1.0  # of the references and seeds it is measured on: a slow one gets fewer

    @property
    def kind(self) -> str:
        """The worker's name for it."""
        return self.name.partition("-")[0]


PEERS = (
    Peer("mmd-64", "alibi-detect[torch]", "embedding", 64, "alibi"),
    Peer("mmd-32", "alibi-detect[torch]", "embedding", 32, "alibi"),
    Peer("lsdd-64", "alibi-detect[torch]", "embedding", 64, "alibi"),
    Peer("cvm-64", "alibi-detect[torch]", "confidence", 64, "alibi"),
    Peer("ks-64", "river scipy", "probabilities", 64, "river"),
    Peer("frouros-64", "frouros", "embedding", 64, "frouros", share=0.25),
    Peer("adwin", "river", "confidence", 1, "river"),
)


@dataclass(frozen=True)
class Result:
    """What one detector did: delays by set, the clean rate it was tuned to, its cost."""

    threshold: float
    mean_time: tuple[float, float, float]
    delays: dict[str, list[int]]
    us_per_instance: float


def python_of(peer: Peer, out: Path) -> Path:
    """The interpreter of a peer's environment, made if it is not there; SystemExit says why it could not be."""
    folder = out / "venvs" / peer.environment
    python = folder / "bin" / "python"
    if not (folder / "done").exists():
        uv = str(Path(sys.executable).with_name("uv"))
        made = subprocess.run([uv, "venv", "--clear", "-q", "-p", sys.executable, str(folder)], check=False)
        env = {**os.environ, "VIRTUAL_ENV": str(folder.resolve())}
        command = [uv, "pip", "install", "-q", *peer.requirement.split()]
        found = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if made.returncode or found.returncode:
            raise SystemExit(f"{peer.name} could not be installed: {found.stderr.strip()[-400:]}")
        (folder / "done").touch()
    return python


def run_worker(peer: Peer, out: Path, given: dict[str, NDArray], *flags: str) -> dict[str, NDArray]:
    """One pass of the worker over streams."""
    source, target = out / f"peer-{peer.name}-in.npz", out / f"peer-{peer.name}-out.npz"
    np.savez(source, **given)  # type: ignore[arg-type]
    command = [str(python_of(peer, out)), str(WORKER), peer.kind, str(peer.window), str(source), str(target), *flags]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"{peer.name} failed: {found.stderr.strip()[-600:]}")
    with np.load(target) as stored:
        return {name: stored[name] for name in stored.files}


def clean_streams(peer: Peer, cases: list[Case]) -> dict[str, NDArray]:
    """The worker's input for tuning: each reference followed by its stream."""
    rows, references, index, start = [], [], [], 0
    for case in cases:
        for sample in (case.reference, case.stream):
            rows.append(columns(peer.feature, case.baseline, sample))
        middle, end = start + len(rows[-2]), start + len(rows[-2]) + len(rows[-1])
        references.append((start, middle))
        index.append(np.arange(middle, end))
        start = end
    return {
        "rows_NX": np.concatenate(rows),
        "references": np.array(references),
        "index_ST": np.array(index),
        "reference_S": np.arange(len(cases)),
        "onset_S": np.full(len(cases), -1),
    }


def drifting_streams(peer: Peer, drifting: Drifting, jobs: list[tuple[str, int]]) -> dict[str, NDArray]:
    """The worker's input for delays: real reference, clean rows and the sets' rows, stacked."""
    names = [CLEAN, *dict.fromkeys(name for name, _ in jobs)]
    parts = [columns(peer.feature, drifting.baseline, s) for s in (drifting.reference, *map(drifting.sample, names))]
    starts = dict(zip(names, np.cumsum([len(p) for p in parts])[:-1], strict=True))
    index_ST = np.full((len(jobs), LEAD_INSTANCES + 32 + MAX_INSTANCES), -1)
    onset_S = np.zeros(len(jobs), np.int64)
    for s, (name, seed) in enumerate(jobs):
        before, after, onset_S[s] = drifting.rows(seed)
        rows = np.concatenate([starts[CLEAN] + before, starts[name] + after])
        index_ST[s, : len(rows)] = rows
    return {
        "rows_NX": np.concatenate(parts),
        "references": np.array([(0, len(parts[0]))]),
        "index_ST": index_ST,
        "reference_S": np.zeros(len(jobs), np.int64),
        "onset_S": onset_S,
    }


def alarms_above(series_ST: NDArray, threshold: float, window: int) -> list[int]:
    """Alarms per stream when each empties the window, which must fill again."""
    counts = []
    for series_T in series_ST:
        crossed, count, free = np.flatnonzero(series_T > threshold), 0, 0
        for t in crossed:
            if t >= free:
                count, free = count + 1, t + window
        counts.append(count)
    return counts


def tune(count: Callable[[float], list[int]], low: float, high: float, steps: int, instances: int) -> float:
    """The threshold between `low` and `high` that alarms once in TARGET instances, by bisection."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(count(middle)) > instances / TARGET else (low, middle)
    return high


def measure_peer(peer: Peer, out: Path, cases: list[Case], drifting: Drifting, jobs: list[tuple[str, int]]) -> Result:
    """Tune one peer, then time it."""
    given, instances = clean_streams(peer, cases), len(cases) * CLEAN_INSTANCES
    if peer.kind == "adwin":

        def count(threshold: float) -> list[int]:
            return [int(v) for v in run_worker(peer, out, given, f"--threshold={threshold}")["alarms_S"]]

        threshold = tune(count, -6.0, 12.0, 9, instances)
    else:
        series_ST = run_worker(peer, out, given, "--series")["series_ST"]
        np.savez(out / f"peer-{peer.name}-clean.npz", series_ST=series_ST)

        def count(threshold: float) -> list[int]:
            return alarms_above(series_ST, threshold, peer.window)

        threshold = tune(count, float(np.nanmedian(series_ST)), float(np.nanmax(series_ST)), 40, instances)
    achieved = mean_time_interval(count(threshold), [CLEAN_INSTANCES] * len(cases))
    found = run_worker(peer, out, drifting_streams(peer, drifting, jobs), f"--threshold={threshold}")
    by_set: dict[str, list[int]] = {}
    for (name, _), delay in zip(jobs, found["delay_S"], strict=True):
        by_set.setdefault(name, []).append(int(delay))
    return Result(threshold, achieved, by_set, 1e6 * float(found["cpu_s"]) / int(found["instances"]))


def jobs_of(seeds: int) -> list[tuple[str, int]]:
    """Every (set, seed) of the comparison."""
    return [
        (set_name(drift, percent), seed)
        for percent in PERCENTS
        for drift in DRIFTS
        for seed in range(max(int(seeds * BLEND_SEEDS[percent]), 1))
    ]


def print_result(name: str, result: Result, note: str) -> None:
    """Median, 95th percentile and misses per set, in one block."""
    mean, low, high = result.mean_time
    off = "" if abs(mean / TARGET - 1) <= TOLERATED else "  NOT within 20% of the target"
    print(f"{name}: mean time between false alarms {mean:,.0f} [{low:,.0f}, {high:,.0f}]{off}; ", end="")
    print(f"{result.us_per_instance:,.1f} us CPU an instance; {note}")
    for percent in PERCENTS:
        cells = []
        for drift in DRIFTS:
            times = np.array([d if d >= 0 else np.inf for d in result.delays[set_name(drift, percent)]])
            median, p95 = np.quantile(times, [0.5, 0.95], method="higher")
            missed = int(np.isinf(times).sum())
            cells.append(f"{median:.0f}/{p95:.0f}" + (f" ({missed} missed)" if missed else ""))
        print(f"  {percent:3d}%  " + "  ".join(f"{d} {c}" for d, c in zip(DRIFTS, cells, strict=True)), flush=True)


def measure(path: Path, out: Path, names: list[str], seeds: int) -> None:
    """Ours and the named peers; prints a block for each and keeps the delays as JSON."""
    from benchmarks.drift.peer_ours import measure_ours

    drifting, jobs = Drifting(Features(path)), jobs_of(seeds)
    cases = [clean_case(path, seed) for seed in range(CLEAN_REFERENCES)]
    print(f"{len(drifting.reference.logits_NK):,} reference rows; delays: median/95th percentile in instances")
    for name in (n for n in OURS if n in names):
        ours, note = measure_ours(cases, drifting, jobs, TARGET, OURS[name])
        print_result(name, ours, note)
        _keep(out, name, ours)
    for peer in (p for p in PEERS if p.name in names):
        started_s = time.perf_counter()
        try:
            fewer = cases[: max(int(peer.share * len(cases)), 1)]
            result = measure_peer(peer, out, fewer, drifting, jobs_of(max(int(peer.share * seeds), 1)))
        except SystemExit as error:
            print(f"{peer.name}: not measured: {error}", flush=True)
            continue
        size = columns(peer.feature, drifting.baseline, drifting.reference)[0].nbytes
        seconds = time.perf_counter() - started_s
        print_result(peer.name, result, f"{32 * size:,} bytes for 32 instances ({peer.feature}); {seconds:.0f} s")
        _keep(out, peer.name, result)


def _keep(out: Path, name: str, result: Result) -> None:
    (out / f"peer-{name}.json").write_text(json.dumps(vars(result)))
