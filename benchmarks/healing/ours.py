"""The product's own search on a scene: the trials, the choice and the gate, and what each truly gains.

Trials, choice and gate are called as the in-process runner calls them; the true accuracies come from eval rows that
none of them sees.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.healing.buffers import Scene, World
from benchmarks.healing.results import AUTHORS, OURS, Base, Result, marks
from orchestrator.datasets import Dataset
from orchestrator.gate import decide
from orchestrator.messages import Analysis
from orchestrator.settings import HealSettings
from tuning.adapter import merged_twin
from tuning.finish import measure, save_candidate
from tuning.scoring import choose_runner_up, choose_winner, predict
from tuning.sequential import run_trials
from tuning.workbench import Workbench


@dataclass
class Outcome:
    """A scene's figures. Accuracies on eval rows, 0..1.

    Attributes:
        drifted, clean: `base` and each trial's, by its name.
        right: a character per row of the eval file under the drift, see `results.marks`.
        chosen: name of the winner; empty when none was worth it.
        gate: successful, failed, inconclusive, error; empty without a winner.
    """

    scene: Scene
    drifted: dict[str, float] = field(default_factory=dict)
    clean: dict[str, float] = field(default_factory=dict)
    right: dict[str, str] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    chosen: str = ""
    gate: str = ""
    message: str = ""

    def plain(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return asdict(self)


def search(scene: Scene, world: World, bench: Workbench) -> Outcome:
    """Runs the search and the gate on a scene."""
    started_s = time.time()
    found = Outcome(scene)
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
    found.seconds["total"] = time.time() - started_s
    if winner is None:
        return found
    second = choose_runner_up([result for result, _ in trials], base_score, winner)
    for choice in filter(None, (winner, second)):
        exported = next(e for r, e in trials if r is choice)
        assert exported is not None
        digest = save_candidate(world.storage, bench, choice, exported, None)
        decision = decide(measure(world.storage, world.request, digest), world.request.kind, HealSettings())
        before = f"; before it {found.chosen}: {found.message}" if found.chosen else ""
        found.chosen, found.gate = names[choice.trial_id], decision.analysis.value
        found.message = decision.message + before
        if decision.analysis is not Analysis.FAILED:
            break
    found.seconds["total"] = time.time() - started_s
    return found


def rolled(found: Outcome) -> str:
    """What is served in the end: the chosen trial where the gate let it pass, else the base."""
    return found.chosen if found.gate == Analysis.SUCCESSFUL.value else "base"


def as_result(found: Outcome, base: Base) -> Result:
    """What is served in the end, beside the peers' figures; `base` is the base's on the same rows."""
    served = rolled(found)
    return Result(
        scene=found.scene,
        method=OURS,
        setting=AUTHORS,
        base=base,
        drifted=found.drifted[served],
        clean=found.clean[served],
        online=None,
        right=found.right[served],
        score=found.scores.get(served),
        seconds=found.seconds.get("total", 0.0),
    )


def _score(found: Outcome, name: str, bench: Workbench, module: nn.Module, world: World) -> None:
    right = correct(module, bench.device, world.evaluation)
    found.drifted[name] = float(right.mean())
    found.right[name] = marks(right, world.evaluation_rows, len(world.clean))
    found.clean[name] = float(correct(module, bench.device, world.clean).mean())


def correct(module: nn.Module, device: torch.device, dataset: Dataset) -> np.ndarray:
    """Which rows of a labelled dataset a module is right about, bool (N,)."""
    assert dataset.labels is not None
    return np.asarray(predict(module, dataset.inputs, device).argmax(axis=1) == dataset.labels)
