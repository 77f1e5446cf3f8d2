"""A service without replicas: the real controller on a virtual clock, fed reports, watched until it has decided.

The same as `heal rehearse` does, with windows out of samples in place of a model: every decision is the controller's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.drift.streams import window_of
from orchestrator.controller import Controller
from orchestrator.drift.baseline import Baseline
from orchestrator.drift.sample import Sample
from orchestrator.messages import (
    BASE,
    GateEvidence,
    LabelArrived,
    Mode,
    Phase,
    Report,
    SearchRequest,
    SearchStatus,
)
from orchestrator.ports import Ports
from orchestrator.settings import WINDOW_INSTANCES, HealSettings, ServiceConfig
from orchestrator.state import NO_SEARCH

START_S = 1_700_000_000.0
ROWS_PER_S = 64.0  # the pace of a rehearsal
LABELS_LATE = 8  # ticks until the labels of a window come in
NO_ALARM = "no alarm"


@dataclass(frozen=True)
class Tick:
    """One window of one replica, and how its requests fared."""

    tag: str
    sample: Sample  # WINDOW_INSTANCES rows; none when every request fails
    segment: str = ""
    drifted: bool = False
    failed: int = 0
    labels_N: np.ndarray | None = None  # true labels that will come in late


@dataclass(frozen=True)
class Outcome:
    """What the service said of one episode."""

    kind: str  # or NO_ALARM
    reason: str
    searched: bool
    alarm_after: int  # drifted instances until the alarm; 0: before the first one, -1: none
    decided_after: int
    estimated_loss: float


class _Nothing:
    """Ports that keep nothing and find nothing; searches are noted and never end."""

    def __init__(self, baseline: Baseline) -> None:
        self.baseline = baseline
        self.searches: list[SearchRequest] = []
        self.seq = 0

    def launch(self, request: SearchRequest) -> None:
        self.searches.append(request)

    def status(self, _: str) -> SearchStatus:
        return NO_SEARCH

    def cancel(self, _: str) -> None: ...

    def measure(self, *_: Any) -> None: ...

    def evidence(self, *_: Any) -> GateEvidence | None:
        return None

    def append(self, *_: Any, **__: Any) -> int:
        self.seq += 1
        return self.seq

    def replay(self) -> dict[str, Any] | None:
        return None

    def entries(self, after: int = -1) -> list[Any]:
        return []

    def prepare_base(self) -> None: ...

    def write(self, *_: Any) -> None: ...

    def save(self, _: bytes) -> None: ...


class _Baselines(_Nothing):
    def load(self, digest: str) -> Baseline | None:
        return self.baseline if digest == BASE else None


class _Snapshots(_Nothing):
    def load(self) -> bytes | None:
        return None


def decide(baseline: Baseline, ticks: Iterable[Tick], settings: HealSettings | None = None) -> Outcome:
    """Feed a stream until the first episode is decided: closed with a verdict, or a search asked for.

    Args:
        baseline: of the base.
        ticks: windows in time, drifted ones marked.
        settings: of the service, mode auto.
    """
    edges = _Nothing(baseline)
    ports = Ports(edges, edges, _Baselines(baseline), edges, _Snapshots(baseline))
    settings = settings or HealSettings(mode=Mode.AUTO)
    fed = _Fed(baseline)
    config = ServiceConfig("bench", "memory:", baseline.base, settings, START_S)
    controller = Controller(config, ports, lambda: fed.now_s)
    controller.step()  # fetches the baseline
    alarm_after, last = -1, None
    for tick in ticks:
        fed.now_s += WINDOW_INSTANCES / ROWS_PER_S
        controller.receive(fed.report(tick))
        controller.step()
        alarm_after, last = _watch(controller, edges, fed, alarm_after)
        if last is not None:
            return last
    controller.traffic_ended = True
    while controller.current.phase is not Phase.WATCHING:
        controller.step()
        alarm_after, last = _watch(controller, edges, fed, alarm_after)
        if last is not None:
            return last
    return Outcome(NO_ALARM, "", False, -1, fed.drifted, 0.0)


def _watch(controller: Controller, edges: _Nothing, fed: _Fed, alarm_after: int) -> tuple[int, Outcome | None]:
    state = controller.current
    if alarm_after < 0 and state.episodes_opened:
        alarm_after = fed.drifted
    if state.episode is None and state.last_verdict is None:
        return alarm_after, None
    record = controller.episodes()[-1]
    searched = bool(edges.searches) or state.phase is Phase.SEARCHING
    if state.episode is not None and not searched:
        return alarm_after, None
    diagnosis = record["diagnosis"] or {"kind": "undecided", "reason": record["reason"], "estimated_loss": 0.0}
    loss = float(diagnosis["estimated_loss"])
    return alarm_after, Outcome(diagnosis["kind"], diagnosis["reason"], searched, alarm_after, fed.drifted, loss)


class _Fed:
    """Turns ticks into reports and counts them."""

    def __init__(self, baseline: Baseline) -> None:
        self.now_s = START_S
        self.drifted = 0
        self._baseline = baseline
        self._counts: dict[str, Report] = {}
        self._late: list[tuple[LabelArrived, ...]] = []
        self._instances = 0

    def report(self, tick: Tick) -> Report:
        """The next report of the tick's replica."""
        num = len(tick.sample.logits_NK)
        self.drifted += (num + tick.failed) if tick.drifted else 0
        first_s = self.now_s - (WINDOW_INSTANCES - 1) / ROWS_PER_S
        windows = (window_of(self._baseline, tick.sample, first_s, tick.segment, 1.0 / ROWS_PER_S),) if num else ()
        last = self._counts.get(tick.tag) or Report(tick.tag, "i", 0, self._baseline.base, 0, BASE, (BASE,))
        self._late.append(self._labels(tick))
        fresh = replace(
            last,
            sequence=last.sequence + 1,
            windows=windows,
            labels=self._late.pop(0) if len(self._late) > LABELS_LATE else (),
            requests=last.requests + num + tick.failed,
            instances=last.instances + num,
            errors=last.errors + tick.failed,
            sent_s=self.now_s,
        )
        self._counts[tick.tag] = fresh
        return fresh

    def _labels(self, tick: Tick) -> tuple[LabelArrived, ...]:
        if tick.labels_N is None:
            return ()
        found = []
        for label, said in zip(tick.labels_N.tolist(), tick.sample.logits_NK.argmax(axis=1).tolist(), strict=True):
            self._instances += 1
            found.append(LabelArrived(f"x{self._instances}", BASE, said, label, self.now_s))
        return tuple(found)
