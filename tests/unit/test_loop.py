"""The whole loop in one process: a real replica, the real controller, real trials; only Ray is absent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tiny
from orchestrator.controller import Controller
from orchestrator.drift.baseline import Baseline, load_baseline
from orchestrator.journal import Journal, verify_journal
from orchestrator.keys import load_keys
from orchestrator.messages import Report, Target
from orchestrator.models import fetch_model, load_published_spec, publish_model
from orchestrator.ports import Ports
from orchestrator.registry import write_stable
from orchestrator.settings import HealSettings, ServiceConfig
from orchestrator.snapshots import Snapshots
from orchestrator.spec import load_spec
from orchestrator.state import State
from orchestrator.storage import Storage, open_storage
from serve_app.healable import Healable
from tuning.base_model import build_module
from tuning.inprocess import InProcessRunner
from tuning.prepare import prepare_base

SETTINGS = HealSettings(
    mode="auto", num_trials=2, trial_epochs=1, buffer_instances=600, buffer_wait_s=60.0, bake_s=0.2, heartbeat_s=0.05
)


class Edges:
    """Baselines and stable.json of a storage, measured in this thread."""

    def __init__(self, storage: Storage, base: str) -> None:
        self.storage, self.base = storage, base

    def load(self, digest: str) -> Baseline | None:
        return load_baseline(self.storage, digest, self.base)

    def prepare_base(self) -> None:
        prepare_base(self.storage, self.base, device="cpu")

    def write(self, generation: int, digest: str) -> None:
        write_stable(self.storage, self.base, generation, digest)


class Loop:
    """A controller, one replica that reports to it, and the traffic."""

    def __init__(self, model: Path, folder: Path, settings: HealSettings = SETTINGS) -> None:
        self.storage = open_storage(folder / "storage")
        self.keys = load_keys("loop")
        spec = load_spec(model)
        self.base = publish_model(self.storage, spec)
        self.config = ServiceConfig("loop", self.storage.uri, self.base, settings)
        self.restart()
        self.controller.step()  # measures the baseline
        home = fetch_model(self.storage, self.base)
        self.replica = Healable(
            build_module(home, load_published_spec(home)),
            spec=load_published_spec(home),
            storage=self.storage.uri,
            service="loop",
            base=self.base,
            connect=lambda config: self,
            **settings.to_dict(),
        )
        self.seed = 10
        self.labelled = False  # whether each answer gets its true label

    def restart(self) -> None:
        edges = Edges(self.storage, self.base)
        ports = Ports(
            InProcessRunner(self.storage, self.keys),
            Journal(self.storage, self.keys),
            edges,
            edges,
            Snapshots(self.storage, self.base),
        )
        self.controller = Controller(self.config, ports, time.time, self.keys.feedback_key)

    def heartbeat(self, report: Report, timeout_s: float) -> Target:
        return self.controller.receive(report)

    def send(self, drift: bool) -> float:
        """One request and one pass; the share answered right."""
        self.seed += 1
        images, labels = tiny.make(16, self.seed, drift)
        answer = self.replica.infer(images)
        if self.labelled:
            token = self.replica.token(answer)
            self.replica.feedback([(token, row, int(label)) for row, label in enumerate(labels)])
        self.controller.step()
        return float((np.asarray(answer.logits).argmax(1) == labels).mean())

    def run(self, drift: bool, until: Callable[[State], bool], timeout_s: float = 120.0) -> list[float]:
        """Send traffic until the state is as wanted; the share answered right of each request."""
        shares, end_s = [], time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            shares.append(self.send(drift))
            if until(self.controller.current):
                return shares
        raise AssertionError(f"it did not come; {self.controller.state()}")


@pytest.fixture
def loop(tiny_model: Path, tmp_path: Path) -> Iterator[Loop]:
    made = Loop(tiny_model, tmp_path)
    yield made
    made.replica.close()


def test_drift_heals_survives_a_restart_in_every_phase_and_the_old_world_restores_the_base(loop: Loop) -> None:
    assert np.mean([loop.send(drift=False) for _ in range(40)]) > 0.95
    assert loop.controller.current.phase == "watching"

    shares: list[float] = []
    for phase in ("diagnosing", "searching", "gating", "canary", "rolling", "baking"):
        shares += loop.run(True, lambda s, phase=phase: s.phase == phase or s.last_verdict is not None)
        assert loop.controller.current.last_verdict is None, loop.controller.current.last_verdict
        loop.restart()  # replays its journal; the replica never notices
    loop.run(True, lambda s: s.last_verdict is not None)
    state = loop.controller.current
    assert state.last_verdict is not None
    assert state.last_verdict["verdict"] == "healed", state.last_verdict
    assert state.stable != "base"
    assert np.mean(shares[:5]) < 0.8

    assert np.mean([loop.send(drift=True) for _ in range(20)]) > 0.9
    assert loop.replica.current.digest == state.stable

    loop.run(False, lambda s: s.stable == "base")
    assert verify_journal(loop.storage, loop.keys.public_key).problems == []


def test_labels_on_what_two_versions_answer_differently_promote_a_canary(tiny_model: Path, tmp_path: Path) -> None:
    patient = replace(
        SETTINGS,
        labels="none",
        buffer_instances=1500,
        compare_share=1.0,
        canary_instances=1_000_000,
        canary_max_s=1000.0,
    )
    loop = Loop(tiny_model, tmp_path, patient)
    try:
        for _ in range(40):
            loop.send(drift=False)
        assert loop.controller.current.phase == "watching", loop.controller.current
        loop.run(True, lambda s: s.phase == "canary" or s.last_verdict is not None)
        assert loop.controller.current.last_verdict is None, loop.controller.current.last_verdict
        loop.labelled = True
        loop.run(True, lambda s: s.last_verdict is not None)
        verdict, records = loop.controller.current.last_verdict, loop.controller.events()
        assert verdict is not None
        assert (verdict["verdict"], verdict["provisional"]) == ("healed", False), verdict
        confirmed = next(r["body"] for r in records if r["event"] == "confirmed")
        assert confirmed["wins"] >= 9
        shown = loop.controller.state()["comparison"]
        assert shown["outcome"] == "better"
        assert loop.replica.current.digest == confirmed["digest"]
    finally:
        loop.replica.close()
