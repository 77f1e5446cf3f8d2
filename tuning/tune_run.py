"""One Ray Tune run over a search space: ASHA, reused actors, stopped by a flag. Called by the search actor alone."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler

from orchestrator.messages import SearchRequest, TrialConfig, TrialResult
from orchestrator.storage import open_storage
from tuning.progress import Progress
from tuning.spare import TrialResources
from tuning.tune_trial import HealTrial, param_space, read_config, read_outcome, trial_name

OVERTIME_S = 10.0  # trials end by themselves at the deadline; what is still there this long after it is stopped

_live: dict[str, Progress] = {}  # by episode: Tune pickles callbacks and stoppers, so they look their state up here


class _Watch(tune.Callback):
    """Tells `Progress` what Tune's trials do."""

    def __init__(self, episode: str) -> None:
        self._episode = episode

    def _saw(self, trial: Any, status: str) -> None:
        progress = _live[self._episode]
        if trial.last_result and "outcome" in trial.last_result:
            result = replace(read_outcome(trial.last_result), trial_id=trial.trial_id, status=status)
        else:
            error = str(trial.get_error() or "") if status == "failed" else ""
            result = TrialResult(trial.trial_id, read_config(trial.config), status, error=error[-500:])
        progress.saw(result)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._saw(trial, "running")

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        progress = _live[self._episode]
        outcome = replace(read_outcome(result), trial_id=trial.trial_id, status="running")
        if not progress.cold_start_s:
            progress.cold_start_s = max(0.0, time.time() - outcome.seconds)  # a time; made a duration at the end
        progress.saw(outcome)

    def on_checkpoint(self, iteration: int, trials: list[Any], trial: Any, checkpoint: Any, **_: Any) -> None:
        marker = f"/trials/{self._episode}/"
        inside = str(checkpoint.path).rpartition(marker)[2]
        progress = _live[self._episode]
        known = next((r for r in progress.results() if r.trial_id == trial.trial_id), None)
        if known is not None:
            progress.saw(known, f"trials/{self._episode}/{inside}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        finished = bool(trial.last_result and trial.last_result.get("done"))
        self._saw(trial, "finished" if finished else "stopped")
        _live[self._episode].write()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._saw(trial, "failed")
        _live[self._episode].write()


class _Stop(tune.Stopper):
    """Ends all trials when the search is cancelled or out of time, also those that still wait for resources."""

    def __init__(self, episode: str) -> None:
        self._episode = episode

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        progress = _live[self._episode]
        return progress.cancelled or time.time() > progress.deadline_s + OVERTIME_S


def fit(request: SearchRequest, configs: list[TrialConfig], resources: TrialResources, progress: Progress) -> None:
    """One Tune run over `configs`; results arrive in `progress`. Blocks until it ended."""
    storage = open_storage(request.storage)
    _live[request.episode] = progress
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new reporter prints tables even at verbose=0
    # A crashed trial is not retried: that would read Tune's own pickled metadata back.
    tuner = tune.Tuner(
        HealTrial,
        param_space=param_space(request, configs, resources, progress.deadline_s),
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            scheduler=ASHAScheduler(max_t=max(1, request.epochs), grace_period=1, reduction_factor=2),
            num_samples=1,
            max_concurrent_trials=resources.max_concurrent,
            reuse_actors=True,
            trial_name_creator=trial_name,
            trial_dirname_creator=trial_name,
        ),
        run_config=tune.RunConfig(
            name=request.episode,
            storage_path=f"{storage.uri}/trials",
            stop=_Stop(request.episode),
            callbacks=[_Watch(request.episode)],
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1),
            failure_config=tune.FailureConfig(max_failures=0),
            verbose=0,
        ),
    )
    tuner.fit()
