"""One trial as Ray Tune sees it: a thin shell around `TrialRun`.

A class of its own (not a function, not wrapped by `with_resources`), so that the Ray dashboard shows what a trial is.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune import PlacementGroupFactory
from ray.tune.experiment import Trial

from orchestrator.messages import Placement, SearchRequest, TrialConfig, TrialResult
from orchestrator.storage import open_storage
from tuning.records import decode_request, decode_trial, plain
from tuning.spare import TrialResources
from tuning.trainable import TrialRun
from tuning.workbench import load_workbench

NO_SCORE = -1.0  # stands for nan, which a scheduler cannot rank


def param_space(
    request: SearchRequest, configs: list[TrialConfig], resources: TrialResources, deadline_s: float
) -> dict[str, Any]:
    """Tune's parameter space: the configurations in order, beside what is the same for all."""
    return {
        "trial": tune.grid_search([asdict(c) for c in configs]),
        "request": asdict(request),
        "resources": {"CPU": resources.num_cpus, "GPU": resources.num_gpus},
        "deadline_s": deadline_s,
    }


def read_config(config: dict[str, Any]) -> TrialConfig:
    """The TrialConfig in a trial's parameters."""
    values = dict(config["trial"])
    return TrialConfig(**{**values, "placement": Placement(values["placement"])})


def trial_name(trial: Trial) -> str:
    """`e7-early-r8-lr0.0005-ab12c_00003`: what and where, then Tune's own id."""
    return f"{_words(trial.config)}-{trial.trial_id}"


def _words(config: dict[str, Any]) -> str:
    found = read_config(config)
    parts = [config["request"]["episode"], found.placement.value]
    parts += [f"r{found.adapter_rank}"] if found.adapter_rank else []
    parts += [f"lr{found.learning_rate:g}"] if found.learning_rate else []
    return "-".join(parts)


class HealTrial(tune.Trainable):
    """Adapter trial; one Tune iteration is one epoch."""

    _run: TrialRun | None = None

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> PlacementGroupFactory:
        """What the spare plan gave each trial."""
        return PlacementGroupFactory([{k: v for k, v in config["resources"].items() if v}])

    def setup(self, config: dict[str, Any]) -> None:
        """Loads the episode's data and base (once per process) and attaches the adapter."""
        if not config["resources"]["GPU"]:
            torch.set_num_threads(1)
        request = decode_request(config["request"])
        bench = load_workbench(open_storage(request.storage), request)
        self._run = TrialRun(bench, read_config(config), self.trial_id, config["deadline_s"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial in the same process."""
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """One epoch; `outcome` carries the TrialResult so far as JSON."""
        assert self._run is not None
        figures = self._run.step()
        score = figures["score"] if figures["score"] == figures["score"] else NO_SCORE
        outcome = json.dumps(plain(asdict(self._run.result())))
        return {"score": score, "epoch": figures["epoch"], "done": figures["done"], "outcome": outcome}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Adapter tensors as safetensors, the rest as JSON: nothing here is unpickled by us."""
        assert self._run is not None
        self._run.save(Path(checkpoint_dir))

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Continues from `save_checkpoint`'s folder."""
        assert self._run is not None
        self._run.load(Path(checkpoint))

    def __repr__(self) -> str:
        """Shown in the dashboard and in log lines; Ray asks once per process, which runs many trials of one episode."""
        config = getattr(self, "config", None)
        return f"HealTrial({config['request']['episode']})" if config else "HealTrial"


def read_outcome(result: dict[str, Any]) -> TrialResult:
    """The TrialResult in a Tune result."""
    return decode_trial(json.loads(result["outcome"]))
