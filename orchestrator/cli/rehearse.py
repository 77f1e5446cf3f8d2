"""`heal rehearse`: what would have happened? Recorded traffic, the real controller, a virtual clock, no Ray.

Every decision is made by the code that makes it live; only the edges differ (`ports`). Past the file's end its rows
come again, so that a canary has something to serve; they are neither stored nor tested for drift anew.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.cli.inputs import accuracy, reference_parts
from orchestrator.cli.replay import VirtualReplica
from orchestrator.cli.report import build_report
from orchestrator.controller import Controller
from orchestrator.datasets import NO_LABEL, Dataset, read_dataset
from orchestrator.drift.baseline import Baseline, load_baseline
from orchestrator.errors import SpecError
from orchestrator.journal import Journal
from orchestrator.keys import ROLES, ServiceKeys
from orchestrator.messages import BASE, Mode, Phase, TrialResult, Verdict
from orchestrator.models import fetch_model, load_published_spec, publish_model
from orchestrator.ports import Ports
from orchestrator.registry import write_stable
from orchestrator.settings import WINDOW_INSTANCES, HealSettings, ServiceConfig
from orchestrator.snapshots import Snapshots
from orchestrator.spec import ModelSpec, load_spec
from orchestrator.storage import Storage, open_storage
from tuning.base_model import build_module, resolve_device
from tuning.inprocess import InProcessRunner
from tuning.prepare import prepare_base

START_S = 1_700_000_000.0  # virtual seconds since the epoch at the file's first row
ROWS_PER_S = 64.0  # virtual pace: a window of 32 in half a second, as with live heartbeats
MAX_IDLE_PASSES = 4000  # passes without traffic: more than every timeout of an episode but approval
SERVING = (Phase.CANARY, Phase.ROLLING, Phase.BAKING)


@dataclass
class RehearsalOptions:
    """What the command line may set."""

    labels: str = "none"
    storage: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RehearsalInputs:
    """Files of a rehearsal, read and checked. `traffic.labels` is None when labels may not be read."""

    spec: ModelSpec
    traffic: Dataset
    evaluation: Dataset | None
    report: Dataset


def rehearsal_inputs(model: Path, traffic: Path, evaluation: Path | None, labels: str) -> RehearsalInputs:
    """Read the files; with `labels` none the traffic's label column is not touched.

    Raises:
        SpecError, DataError: a file does not fit; the message names it.
    """
    spec = load_spec(model)
    return RehearsalInputs(
        spec=spec,
        traffic=read_dataset(traffic, spec, with_labels=labels not in ("none", "0")),
        evaluation=read_dataset(evaluation, spec) if evaluation else None,
        report=reference_parts(spec)["report"],
    )


class _Baselines:
    """Measured in this process, at once."""

    def __init__(self, storage: Storage, base: str) -> None:
        self._storage, self._base = storage, base

    def load(self, digest: str) -> Baseline | None:
        return load_baseline(self._storage, digest, self._base)

    def prepare_base(self) -> None:
        prepare_base(self._storage, self._base)


class _Stable:
    def __init__(self, storage: Storage, base: str) -> None:
        self._storage, self._base = storage, base

    def write(self, generation: int, digest: str) -> None:
        write_stable(self._storage, self._base, generation, digest)


class Rehearsal:
    """One run.

    Args:
        inputs: model and data.
        options: of the command line.
        on_rows: told how many rows were fed, for a progress bar.
        on_trial: told each trial's result.
    """

    def __init__(
        self,
        inputs: RehearsalInputs,
        options: RehearsalOptions,
        on_rows: Callable[[int], None] = lambda _: None,
        on_trial: Callable[[TrialResult], None] = lambda _: None,
    ) -> None:
        self._inputs, self._on_rows = inputs, on_rows
        self.storage = _fresh_storage(options.storage)
        self.base = base = publish_model(self.storage, inputs.spec)
        folder = fetch_model(self.storage, base)
        spec = load_published_spec(folder)
        device = resolve_device("auto")
        module = build_module(folder, spec).to(device)
        prepare_base(self.storage, base)
        self._now_s = START_S
        settings = HealSettings.from_dict({"mode": Mode.AUTO, "labels": options.labels} | options.settings)
        keys = _passing_keys()
        ports = Ports(
            runner=InProcessRunner(self.storage, keys, on_trial),
            records=Journal(self.storage, keys),
            baselines=_Baselines(self.storage, base),
            stable=_Stable(self.storage, base),
            snapshots=Snapshots(self.storage, base),
        )
        config = ServiceConfig("rehearsal", self.storage.uri, base, settings, START_S)
        self._controller = Controller(config, ports, lambda: self._now_s)
        self._replica = VirtualReplica(module, spec, self.storage, base, device, lambda: self._now_s)
        self._labels = _told(inputs.traffic, options.labels, settings.seed)
        self._wall: dict[str, float] = {}
        self._alarm_after: int | None = None

    def run(self) -> dict[str, Any]:
        """Feed the file, let the episode end, measure; the report."""
        start_s = time.time()
        self._beat()
        for first in range(0, len(self._inputs.traffic), WINDOW_INSTANCES):
            self._feed(first, keep=True)
            if self._closed():
                break
        self._replica.flush()
        self._controller.traffic_ended = True
        self._let_end()
        return self._report(start_s)

    def answers(self, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Classes (N,) that are answered now, and those of the base."""
        predict = self._replica.predict
        return predict(inputs), predict(inputs, BASE)

    def _let_end(self) -> None:
        place = 0
        for idle in range(MAX_IDLE_PASSES):
            state = self._controller.current
            if self._closed() or (idle > 2 and state.episode is None):
                return
            if state.phase in SERVING:
                self._feed(place % len(self._inputs.traffic), keep=False)
                place += WINDOW_INSTANCES
            else:
                self._now_s += WINDOW_INSTANCES / ROWS_PER_S
                self._beat()

    def _closed(self) -> bool:
        return self._controller.current.episode is None and self._controller.current.last_verdict is not None

    def _feed(self, first: int, keep: bool) -> None:
        rows = slice(first, first + WINDOW_INSTANCES)
        inputs = self._inputs.traffic.inputs[rows]
        self._now_s += len(inputs) / ROWS_PER_S
        labels = self._labels[rows] if keep else np.full(len(inputs), NO_LABEL)
        self._replica.answer(inputs, labels, keep)
        self._on_rows(len(inputs) if keep else 0)
        self._beat()

    def _beat(self) -> None:
        """One heartbeat, one pass; a search that starts in it must find the traffic on the storage."""
        self._replica.apply(self._controller.receive(self._replica.report()))
        if self._controller.current.phase in (Phase.DIAGNOSING, Phase.SEARCHING):
            self._replica.flush()
        self._controller.step()
        episode, now_s = self._controller.current.episode, time.time()
        if episode is not None and self._alarm_after is None:
            self._alarm_after = min(self._replica.instances, len(self._inputs.traffic))
            self._wall["alarm"] = now_s
        self._wall.setdefault(self._controller.current.phase.value, now_s)

    def _report(self, start_s: float) -> dict[str, Any]:
        records = self._controller.episodes()
        record = dict(records[0]) if records else None
        if record is not None:  # the virtual clock says nothing about time: the clock on the wall does
            entered = {phase: self._wall[phase] for phase in record["phase_entered"] if phase in self._wall}
            alarm = (record["alarm"] or {}) | {"raised_s": self._wall.get("alarm")}
            record |= {"phase_entered": entered, "alarm": alarm, "closed_s": time.time()}
        return build_report(
            record,
            accuracy=self._accuracies(),
            alarm_after=self._alarm_after,
            onset_s=start_s,
            seeds={"service": self._controller.settings.seed},
            fallback=(Verdict.ERROR, f"no verdict in {MAX_IDLE_PASSES} passes") if records else _NO_DRIFT,
        )

    def _accuracies(self) -> dict[str, float | None]:
        measured: dict[str, float | None] = {}
        for name, data in (("clean", self._inputs.report), ("traffic", self._inputs.evaluation)):
            if data is not None:
                measured[f"{name}_before"] = accuracy(self._replica.predict(data.inputs, BASE), data.labels)
                measured[f"{name}_after"] = accuracy(self._replica.predict(data.inputs), data.labels)
        return measured


def failed_rehearsal(reason: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The report of a rehearsal that broke off: verdict `error`, every key there."""
    seeds = {"service": settings.get("seed", 0)}
    return build_report(
        None, accuracy={}, alarm_after=None, onset_s=None, seeds=seeds, fallback=(Verdict.ERROR, reason)
    )


_NO_DRIFT = (Verdict.NO_DRIFT, "no alarm was raised")


def _fresh_storage(uri: str | None) -> Storage:
    """A storage without a past: a rehearsal must not write into a service's journal."""
    storage = open_storage(uri or tempfile.mkdtemp(prefix="heal-rehearsal-"))
    if storage.list("journal/"):
        raise SpecError(f"--storage of a rehearsal must hold no records yet; {storage.uri} has a journal; use another")
    return storage


def _passing_keys() -> ServiceKeys:
    """Keys for this run only: they sign, and nobody keeps them."""
    tokens = {role: secrets.token_urlsafe(24) for role in ROLES}
    return ServiceKeys("rehearsal", secrets.token_bytes(32), secrets.token_bytes(32), tokens)


def _told(traffic: Dataset, labels: str, seed: int) -> np.ndarray:
    """Labels that the service is told, by row: none, all, or those of N rows drawn by seed; -1 elsewhere."""
    told = np.full(len(traffic), NO_LABEL, dtype=np.int64)
    if traffic.labels is None:
        return told
    known = np.flatnonzero(traffic.labels != NO_LABEL)
    if labels != "all":
        known = np.random.default_rng(seed).permutation(known)[: int(labels)]
    told[known] = traffic.labels[known]
    return told
