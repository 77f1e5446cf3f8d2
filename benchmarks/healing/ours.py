"""The product's own search on a scene: the trials, the choice and the gate, and what each truly gains.

Trials, choice and gate are called as the in-process runner calls them; the true accuracies come from eval rows that
none of them sees.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.healing.buffers import Limits, Scene, World, build
from orchestrator.datasets import Dataset
from orchestrator.gate import decide
from orchestrator.messages import Analysis
from orchestrator.settings import HealSettings
from tuning.adapter import merged_twin
from tuning.finish import measure, register_winner
from tuning.scoring import choose_winner, predict
from tuning.sequential import run_trials
from tuning.workbench import Workbench, load_workbench


@dataclass
class Outcome:
    """A scene's figures. Accuracies on eval rows, 0..1.

    Attributes:
        drifted, clean: `base` and each trial's, by its name.
        chosen: name of the winner; empty when none was worth it.
        gate: successful, failed, inconclusive, error; empty without a winner.
    """

    scene: Scene
    drifted: dict[str, float] = field(default_factory=dict)
    clean: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    chosen: str = ""
    gate: str = ""
    message: str = ""

    def plain(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return asdict(self)


def run_scene(job: tuple[Path, Path, Scene, Limits]) -> Outcome:
    """A scene in a process of one thread: data folder, output folder, scene, limits. Keeps the outcome as JSON."""
    data, out, scene, limits = job
    torch.set_num_threads(1)
    name = "-".join((scene.drift, scene.stream, scene.labels, str(scene.seed)))
    outcome = search(scene, build(data, out / f"storage-{name}", scene, limits))
    (out / f"{name}.json").write_text(json.dumps(outcome.plain()))
    return outcome


def search(scene: Scene, world: World) -> Outcome:
    """Runs the search and the gate on a scene."""
    started_s = time.time()
    found = Outcome(scene)
    bench = load_workbench(world.storage, world.request, keep=False)
    base_score = bench.score(bench.module, [])["score"]
    _score(found, "base", bench, bench.module, world)
    found.scores["base"] = base_score
    trials = run_trials(bench, bench.configurations(), started_s + world.request.budget_s)
    names = {}
    for result, exported in trials:
        config = result.config
        name = f"{config.placement} r{config.adapter_rank} {config.learning_rate:g} x{config.replay_weight:g}"
        names[result.trial_id] = name
        found.scores[name], found.seconds[name] = result.score, result.seconds
        if exported is not None:
            _score(found, name, bench, merged_twin(bench.module, *exported), world)
    winner = choose_winner([result for result, _ in trials], base_score)
    if winner is None:
        return found
    found.chosen = names[winner.trial_id]
    exported = next(e for r, e in trials if r is winner)
    assert exported is not None
    digest = register_winner(world.storage, bench, winner, exported, None)
    decision = decide(measure(world.storage, world.request, digest), world.request.kind, HealSettings())
    found.gate, found.message = decision.analysis.value, decision.message
    found.seconds["total"] = time.time() - started_s
    return found


def rolled(found: Outcome) -> str:
    """What is served in the end: the chosen trial where the gate let it pass, else the base."""
    return found.chosen if found.gate == Analysis.SUCCESSFUL.value else "base"


def _score(found: Outcome, name: str, bench: Workbench, module: nn.Module, world: World) -> None:
    found.drifted[name] = accuracy(module, bench, world.evaluation)
    found.clean[name] = accuracy(module, bench, world.clean)


def accuracy(module: nn.Module, bench: Workbench, dataset: Dataset) -> float:
    """Of a module on a labelled dataset, 0..1."""
    assert dataset.labels is not None
    return float(np.mean(predict(module, dataset.inputs, bench.device).argmax(axis=1) == dataset.labels))
