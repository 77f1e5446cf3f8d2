"""A healing loop under test, and the walk of a harmful drift through its phases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from orchestrator.healing import plan
from orchestrator.messages import (
    BASE,
    Alarm,
    Command,
    Diagnosis,
    GateEvidence,
    Kind,
    Mode,
    Phase,
    Placement,
    SearchStatus,
    TrialConfig,
    TrialResult,
    Verdict,
)
from orchestrator.rollout import target
from orchestrator.settings import HealSettings
from orchestrator.state import (
    Action,
    Observation,
    Record,
    ReplicaView,
    State,
)

TRIAL = TrialResult("t1", TrialConfig(Placement.NORM), "finished", score=0.8)
FOUND = SearchStatus("finished", trials=(TRIAL,), winner="d1", winner_trial="t1")
EVIDENCE = GateEvidence("d1", 400, 0.9, 0.88, 0.2, 9.0, 2.0, 0.2, 0.1, 0, 0.6, 0.8)


class Loop:
    """A loop under test: replicas follow their targets, everything else is said step by step."""

    def __init__(self, num_replicas: int = 3, **settings: Any) -> None:
        self.settings = HealSettings(**({"mode": Mode.AUTO, "replica_lost_s": 10.0} | settings))
        self.state = State(base="b0", mode=self.settings.mode)
        self.now_s = 1000.0
        self.replicas = {f"r{n}": ReplicaView(f"r{n}", "i0", 0, BASE, 0.0, base="b0") for n in range(num_replicas)}
        self.silent: set[str] = set()
        self.stuck: set[str] = set()
        self.world: dict[str, Any] = {"buffered": 2000, "storage": "s3://x"}
        self.actions: tuple[Action, ...] = ()
        self.records: list[Record] = []
        self.commands = 0

    def observe(self, **seen: Any) -> Observation:
        published = {"stable_published": (self.state.generation, self.state.stable)}
        return Observation(self.now_s, tuple(self.replicas.values()), **(published | self.world | seen))

    def step(self, after_s: float = 0.5, follow: bool = True, **seen: Any) -> Loop:
        self.now_s += after_s
        for tag, view in self.replicas.items():
            if tag not in self.silent:
                wanted = target(self.state, tag)
                if follow and tag not in self.stuck and wanted.generation > view.generation:
                    view = replace(view, generation=wanted.generation, digest=wanted.digest)
                self.replicas[tag] = replace(view, last_seen_s=self.now_s)
        self.state, self.actions = plan(self.state, self.observe(**seen), self.settings)
        self.records += [a for a in self.actions if isinstance(a, Record)]
        return self

    def command(self, name: str, argument: str = "", **seen: Any) -> dict[str, Any]:
        """Give a command, and return how it was recorded."""
        self.commands += 1
        asked = Command(f"c{self.commands}", name, "ann", "because", argument)
        self.step(commands=(asked,), **seen)
        return next(r.body for r in self.records if r.body.get("command_id") == asked.command_id)

    def serve(self, tag: str, **changes: Any) -> None:
        self.replicas[tag] = replace(self.replicas[tag], **changes)

    def alarm(self, returned: bool = False) -> Alarm:
        return Alarm("global", self.state.stable, 9.0, 5.0, self.now_s - 5, self.now_s, 300, returned=returned)

    def to(self, phase: Phase) -> Loop:
        """Walk a harmful drift up to a phase."""
        walk: tuple[tuple[Phase, Callable[[], object]], ...] = (
            (Phase.DIAGNOSING, lambda: self.step(alarm=self.alarm())),
            (Phase.SEARCHING, lambda: self.step(diagnosis=diagnosis())),
            (Phase.GATING, lambda: self.step(search=FOUND)),
            (Phase.CANARY, lambda: self.step(gate=EVIDENCE)),
            (Phase.ROLLING, self._serve_canary),
            (Phase.BAKING, lambda: self.step(after_s=2.0)),
        )
        if phase is Phase.AWAITING_APPROVAL:
            return self.to(Phase.GATING).step(gate=EVIDENCE)
        done = [reached for reached, _ in walk].index(self.state.phase) + 1 if self.state.episode else 0
        for reached, move in walk[done:]:
            if self.state.phase is phase:
                break
            move()
            assert self.state.phase is reached, (self.state, self.actions)
        assert self.state.phase is phase
        return self

    def _serve_canary(self) -> None:
        self.step()  # ack
        self.serve("r0", instances=64)
        self.step()

    def heal(self) -> Loop:
        return self.to(Phase.BAKING).step(after_s=6.0)

    @property
    def verdict(self) -> tuple[str, str]:
        assert self.state.phase is Phase.WATCHING, self.state
        assert self.state.last_verdict is not None
        return self.state.last_verdict["verdict"], self.state.last_verdict["reason"]


def diagnosis(kind: Kind = Kind.COVARIATE_HARMFUL) -> Diagnosis:
    return Diagnosis(kind, "by the numbers", 256, 0.1, {"statistic": 3.0})


def closed_as(loop: Loop, verdict: Verdict, *words: str) -> None:
    got, reason = loop.verdict
    assert got == verdict, reason
    for word in words:
        assert word in reason


def restored(loop: Loop) -> None:
    """Everyone is told to serve what was stable, under a generation that no replica ignores."""
    assert loop.state.generation == 2
    assert {target(loop.state, tag).digest for tag in loop.replicas} == {BASE}
    assert loop.state.candidate is None
    loop.step().step()
    assert all((r.generation, r.digest) == (2, BASE) for t, r in loop.replicas.items() if t not in loop.silent)
