"""One trial: an adapter that learns epoch by epoch from an episode's workbench, and knows its own best state.

The same object runs under Ray Tune (`search`) and in a rehearsal (`inprocess`). No Ray in here.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load, load_file, save_file

from orchestrator.errors import AdapterError
from orchestrator.messages import Placement, TrialConfig, TrialResult
from orchestrator.storage import Storage
from tuning.adapter import attach
from tuning.base_model import computes_bfloat16
from tuning.objective import (
    INFORMATION_BESIDE,
    NO_TRAINING,
    SUPERVISED,
    choose_objective,
    recompute_statistics,
    replay_loss,
    statistics_layers,
    traffic_loss,
    use_batch_statistics,
)
from tuning.workbench import Workbench

BATCH = 64
WARMUP = 0.1  # share of the steps in which the learning rate rises; it falls as a cosine in the others
TABLE_ROUNDS = 8  # passes over a table that count as one epoch: its rows cost next to nothing
MIN_BATCH = 8  # smaller last batches are dropped: their statistics are noise
MAX_GRADIENT = 1.0  # norm, per step
Exported = tuple[dict[str, Any], dict[str, np.ndarray]]

_CURRENT, _BEST, _META = "current.safetensors", "adapter_model.safetensors", "trial.json"


class TrialRun:
    """A trial in progress.

    Args:
        bench: the episode's data and base; the base is not touched.
        config: what to try.
        trial_id: names it in results.
        deadline_s: seconds since the epoch; training ends there, in the middle of an epoch if need be.

    Raises:
        AdapterError: the model has no layer for this placement.
    """

    def __init__(self, bench: Workbench, config: TrialConfig, trial_id: str, deadline_s: float = float("inf")) -> None:
        self.bench = bench
        self.config = config
        self.trial_id = trial_id
        self.deadline_s = deadline_s
        self.epoch = 0
        self.seconds = 0.0
        self._epochs = max(1, config.epochs)
        self._rng = np.random.default_rng(config.seed)
        torch.manual_seed(config.seed)  # dropout, where a model has it
        self.handle = attach(copy.deepcopy(bench.module), config)
        self._layers = statistics_layers(self.handle.module, self.handle.targets.saved)
        train = bench.parts["train"]
        trained = config.epochs > 0 and self.handle.num_parameters > 0
        self.objective = (
            choose_objective(train.num_labelled, len(train), config.replay_weight) if trained else NO_TRAINING
        )
        self._optimizer = torch.optim.AdamW(self.handle.parameters(), config.learning_rate) if trained else None
        if trained:
            _ = bench.look, bench.views  # found once per process; not to be taken for an epoch's time
        self._best: dict[str, float] = {"score": float("-inf")}
        self._best_export: Exported = self.handle.export()

    @property
    def done(self) -> bool:
        """True when no epoch is left, or no time."""
        return self.epoch >= (self._epochs if self._optimizer else 1) or time.time() >= self.deadline_s

    def step(self) -> dict[str, Any]:
        """One epoch (an untrained adapter has one, in which it is set), then the score.

        A score costs passes over several parts, so it is taken at ASHA's rungs (1, 2, 4, ... epochs) and at the end.

        Returns:
            `score` of the best epoch scored so far and the figures beside it, `epoch`, `seconds`, `done`.
        """
        start = time.monotonic()
        inputs = self.bench.parts["train"].inputs
        if self.epoch == 0:
            recompute_statistics(self.handle.module, self._layers, inputs, self.bench.device)
            if self.config.placement is Placement.LOGIT_CORRECTION:
                self.handle.shift_bias(self.bench.logit_offset())
        if self._optimizer is not None:
            self._train_epoch(self._optimizer)
        self.epoch += 1
        self._plan_for_the_deadline(self.seconds + time.monotonic() - start)
        if self.done or self.epoch.bit_count() == 1:
            self._keep_if_better(inputs)
        self.seconds += time.monotonic() - start
        return {**self._best, "epoch": self.epoch, "seconds": self.seconds, "done": self.done}

    def _plan_for_the_deadline(self, seconds: float) -> None:
        """Fewer epochs where not all fit: the learning rate must have fallen by the end, or the end is not the best."""
        left = (self.deadline_s - time.time()) * self.epoch / max(seconds, 1e-3)
        if self.epoch + left < self._epochs:
            self._epochs = max(self.epoch, self.epoch + int(left))

    def _keep_if_better(self, inputs: np.ndarray) -> None:
        if self._optimizer is not None:
            recompute_statistics(self.handle.module, self._layers, inputs, self.bench.device)
        figures = self.bench.score(self.handle.module, self._layers)
        if figures["score"] > self._best["score"]:
            self._best = {**figures, "reference_accuracy": self.bench.reference_accuracy(self.handle.module)}
            self._best_export = self.handle.export()

    def _train_epoch(self, optimizer: torch.optim.Optimizer) -> None:
        module, device, train = self.handle.module, self.bench.device, self.bench.parts["train"]
        use_batch_statistics(module, self._layers)
        batches = list(self._batches())
        weight = self.config.replay_weight
        for number, rows in enumerate(batches):
            if time.time() >= self.deadline_s:
                break
            self._set_rate(optimizer, (self.epoch + number / len(batches)) / self._epochs)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=computes_bfloat16(device)):
                inputs = self.bench.views.draw(train.inputs[rows], self._rng)
                logits = module(torch.from_numpy(np.ascontiguousarray(inputs)).to(device))
                labels = torch.from_numpy(train.labels[rows]).to(device)
                information, share = INFORMATION_BESIDE if weight else 1.0, train.num_labelled / len(train)
                loss = traffic_loss(self.objective, logits, labels, information, share)
                if weight and len(self.bench.replay.inputs):
                    loss = loss + weight * self._replay()
            if not torch.isfinite(loss):
                raise AdapterError(f"trial {self.trial_id}: the loss is not finite; use a smaller learning rate")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.handle.parameters(), MAX_GRADIENT)
            optimizer.step()
        module.eval()

    def _set_rate(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
        """`progress` 0..1 through the epochs; the rate depends on nothing else, so a resumed trial goes on with it."""
        falling = 0.5 * (1 + math.cos(math.pi * max(0.0, progress - WARMUP) / (1 - WARMUP)))
        for group in optimizer.param_groups:
            group["lr"] = self.config.learning_rate * max(min(progress / WARMUP, falling), 0.01)

    def _batches(self) -> Iterator[np.ndarray]:
        """Row numbers of the train part, shuffled; few labels are spread so that every batch has some."""
        train = self.bench.parts["train"]
        known = np.flatnonzero(train.labels >= 0)
        rounds = TABLE_ROUNDS if self.bench.layout == "F" else 1
        chosen = known if self.objective == SUPERVISED else np.arange(len(train))
        order = np.concatenate([self._rng.permutation(chosen) for _ in range(rounds)])
        size = min(BATCH, len(order))
        extra = min(BATCH // 4, len(known)) if self.objective != SUPERVISED else 0
        for start in range(0, len(order), max(size, 1)):
            rows = order[start : start + size]
            if len(rows) >= min(MIN_BATCH, len(order)) and len(rows) > 1:
                yield np.concatenate([rows, self._rng.choice(known, extra, replace=False)]) if extra else rows

    def _replay(self) -> torch.Tensor:
        """Loss on labelled reference rows as the traffic would show them, in a pass of their own."""
        replay, device = self.bench.replay, self.bench.device
        rows = self._rng.integers(0, len(replay.inputs), BATCH)
        assert replay.labels is not None
        known = self.bench.views.draw(replay.inputs[rows], self._rng)
        with torch.no_grad():
            taught = self.bench.module(torch.from_numpy(np.ascontiguousarray(known)).to(device))
        inputs = self.bench.in_the_mix(known, self._rng)
        logits = self.handle.module(torch.from_numpy(np.ascontiguousarray(inputs)).to(device))
        return replay_loss(logits, torch.from_numpy(replay.labels[rows]).to(device), taught)

    def result(self, status: str = "finished", error: str = "") -> TrialResult:
        """What the trial measured, at its best epoch."""
        nan = float("nan")
        score = self._best["score"]
        return TrialResult(
            trial_id=self.trial_id,
            config=self.config,
            status=status,
            score=score if np.isfinite(score) else nan,
            objective=self.objective,
            epochs=self.epoch,
            reference_accuracy=self._best.get("reference_accuracy", nan),
            labelled_accuracy=self._best.get("labelled_accuracy", nan),
            seconds=self.seconds,
            parameters=self.handle.num_parameters,
            error=error,
        )

    def export(self) -> Exported:
        """PEFT config and tensors of the best epoch."""
        return self._best_export

    def save(self, folder: Path) -> None:
        """Writes a checkpoint: the best adapter in PEFT's format, the current tensors, the trial's figures."""
        config, tensors = self._best_export
        save_file(tensors, folder / _BEST)
        save_file(self.handle.export()[1], folder / _CURRENT)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        meta = {"config": asdict(self.config), "epoch": self.epoch, "seconds": self.seconds, "best": self._best}
        (folder / _META).write_text(json.dumps(meta))

    def load(self, folder: Path) -> None:
        """Continues from a checkpoint of the same configuration; the optimizer starts afresh.

        Raises:
            AdapterError: the checkpoint is another configuration's.
        """
        meta = json.loads((folder / _META).read_text())
        if meta["config"] != json.loads(json.dumps(asdict(self.config))):
            raise AdapterError(f"checkpoint must be of trial {self.config}; got {meta['config']}")
        self.handle.load(load_file(folder / _CURRENT))
        self._best_export = (json.loads((folder / "adapter_config.json").read_text()), load_file(folder / _BEST))
        self._best, self.epoch, self.seconds = meta["best"], int(meta["epoch"]), float(meta["seconds"])


def read_checkpoint(storage: Storage, prefix: str) -> Exported:
    """The best adapter in a checkpoint that `TrialRun.save` wrote, by its key prefix on the storage.

    Raises:
        NotFound: it was removed.
    """
    config = json.loads(storage.get(f"{prefix}/adapter_config.json"))
    return config, load(storage.get(f"{prefix}/{_BEST}"))
