"""One scene in a process of one thread: our search, the peers, or both. Spawned processes import it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.healing.buffers import Limits, Scene, build
from benchmarks.healing.ours import Outcome, as_result, search
from benchmarks.healing.peer_run import load, measure_base, run_peers
from benchmarks.healing.results import OURS, Result


@dataclass(frozen=True)
class Job:
    """A scene to run: the shared data's folder, where outcomes go, what to run and within which limits."""

    data: Path
    out: Path
    scene: Scene
    limits: Limits
    methods: Sequence[str]
    tune: bool = False


@dataclass(frozen=True)
class Found:
    """A scene's outcome of our own search, if it ran, and a result of every method."""

    scene: Scene
    outcome: Outcome | None
    results: list[Result]


def run_scene(job: Job) -> Found:
    """Runs a scene; keeps every outcome as JSON, `NAME.json` of ours and `NAME.METHOD.SETTING.json` of each result."""
    torch.set_num_threads(1)
    scene = job.scene
    name = "-".join((scene.drift, scene.stream, scene.labels, str(scene.seed)))
    world = build(job.data, job.out / f"storage-{name}", scene, job.limits)
    bench = load(world)
    base = measure_base(bench, world)
    outcome, results = None, []
    if OURS in job.methods:
        outcome = search(scene, world, bench)
        (job.out / f"{name}.json").write_text(json.dumps(outcome.plain()))
        results.append(_keep(as_result(outcome, base), name, job.out))
    for result in run_peers(scene, world, [m for m in job.methods if m != OURS], job.tune, bench, base):
        results.append(_keep(result, name, job.out))
    return Found(scene, outcome, results)


def _keep(result: Result, name: str, out: Path) -> Result:
    (out / f"{name}.{result.method}.{result.setting}.json").write_text(json.dumps(result.plain()))
    online = "" if result.online is None else f" online {result.online:.3f} (base {result.base.stream:.3f})"
    print(
        f"    {name} {result.method} {result.setting}: drifted {result.drifted:.3f} (base {result.base.drifted:.3f})"
        f" clean {result.clean:.3f}{online} {result.seconds:.0f} s",
        flush=True,
    )
    return result
