"""A seeded world around `plan`: replicas, a lossy network, searches, people, and an orchestrator that crashes.

`World(seed).run()` plays it and checks the invariants after every step; the same seed plays the same world. `broken`
names rules that this world breaks on purpose, to show that the invariants notice.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass, replace

from orchestrator import gate, healing, rollout
from orchestrator.canary import Bet
from orchestrator.messages import (
    BASE,
    Alarm,
    Analysis,
    Command,
    Diagnosis,
    GateEvidence,
    Kind,
    Mode,
    Phase,
    SearchStatus,
    Target,
)
from orchestrator.settings import HealSettings
from orchestrator.state import (
    Action,
    CancelSearch,
    Decided,
    LaunchSearch,
    MeasureCandidate,
    Observation,
    PublishStable,
    Record,
    ReplicaView,
    ResetMonitor,
    State,
)

SETTINGS = HealSettings(
    mode=Mode.AUTO,
    buffer_instances=100,
    min_buffer_instances=20,
    buffer_wait_s=5,
    search_budget_s=5,
    gate_timeout_s=12,
    canary_steps="1, 50%",
    canary_instances=8,
    canary_max_s=12,
    roll_timeout_s=12,
    bake_s=3,
    cooldown_s=8,
    approval_timeout_s=20,
    replica_lost_s=6,
    heartbeat_s=0.5,
)
NEAR_S = 5.0  # a fault this long before a transition, or in the phase that it ends, counts as met by it
FORWARD = {
    Phase.WATCHING: {Phase.DIAGNOSING},
    Phase.DIAGNOSING: {Phase.SEARCHING},
    Phase.SEARCHING: {Phase.GATING},
    Phase.GATING: {Phase.AWAITING_APPROVAL, Phase.CANARY, Phase.SEARCHING},
    Phase.AWAITING_APPROVAL: {Phase.CANARY},
    Phase.CANARY: {Phase.ROLLING},
    Phase.ROLLING: {Phase.BAKING},
    Phase.BAKING: set(),
}
COMMANDS = (
    "start",
    "approve",
    "approve",
    "pause",
    "resume",
    "resume",
    "promote",
    "abort",
    "rollback",
    "mode",
    "nonsense",
)
KINDS = (*[Kind.COVARIATE_HARMFUL] * 6, Kind.PRIOR_SHIFT, *Kind)


class Violation(AssertionError):
    """An invariant does not hold."""


@dataclass
class Replica:
    tag: str
    incarnation: int = 0
    alive: bool = True
    generation: int = -1
    digest: str = BASE
    sequence: int = 0
    instances: int = 0
    errors: int = 0
    failure: str = ""


def evidence(candidate: str, good: bool, error: str = "") -> GateEvidence:
    return GateEvidence(candidate, 400, 0.9, 0.89 if good else 0.5, 0.5, 9.0, 2.0, 0.2, 0.1, 0, 0.6, 0.8, error=error)


class World:
    def __init__(self, seed: int, broken: frozenset[str] = frozenset(), num_steps: int = 300) -> None:
        self.seed, self.broken, self.num_steps = seed, broken, num_steps
        self.rng = random.Random(seed)
        self.now_s = 1000.0
        self.fault_rate = self.rng.choice((0.0, 0.3, 1.0, 1.0, 2.0))
        self.slow_rate = self.rng.choice((0.02, 0.02, 0.02, 0.02, 0.8))  # of loading an adapter
        self.replicas = [Replica(f"r{n}") for n in range(self.rng.randint(1, 4))]
        self.network: list[tuple[float, str, object]] = []
        self.searches: dict[str, tuple[float, str, SearchStatus]] = {}
        self.measured: dict[str, tuple[float, GateEvidence]] = {}
        self.allowed = {BASE}  # digests that the gate would pass, by the evidence the world gives
        self.stable_file: tuple[int, str] = (0, BASE)
        self.command_count = 0
        self.kinds: dict[str, Kind] = {}  # of the open episode, as diagnosed so far
        self.names: dict[int, str] = {}  # generation -> digest
        self.opened = self.closed = self.promotions = self.crashes = 0
        self.verdicts: dict[str, int] = {}
        self.events: Counter[str] = Counter()
        self.fired: dict[str, float] = {}  # when each fault happened last
        self.met: Counter[tuple[str, str]] = Counter()  # (transition, fault in the phase that it ends)
        self.entered_s = 0.0
        self.counted = False  # the last pass observed labels
        self.told = False  # and they say that what is served, or tried, is worse
        self.state = State(base="b0", mode=self.rng.choice((Mode.AUTO, Mode.AUTO, Mode.APPROVE)))
        self.journal = self.state  # its last entry
        self._boot()

    # ------------------------------------------------------------ chance

    def fault(self, name: str, probability: float) -> bool:
        fired = self.rng.random() < probability * self.fault_rate
        if fired:
            self.fired[name] = self.now_s
        return fired

    def _boot(self) -> None:
        """A fresh orchestrator process: only the journal survives."""
        replay = "skip_replay" not in self.broken
        self.state = (
            State.from_dict(json.loads(json.dumps(self.journal.to_dict())))
            if replay
            else State(base="b0", mode=Mode.AUTO)
        )
        self.views: dict[str, tuple[int, ReplicaView]] = {}
        self.alarm: Alarm | None = None
        self.published: tuple[int, str] | None = None
        self.commands: list[Command] = []
        self.since_s = self.now_s

    # ------------------------------------------------------------ replicas and network

    def _move_replicas(self) -> None:
        for replica in self.replicas:
            if self.fault("replica stops or starts", 0.01):
                replica.alive = not replica.alive
            if self.fault("replica restarts", 0.01):
                replica.incarnation += 1
                replica.sequence = replica.instances = replica.errors = 0
                replica.generation, replica.digest = self.stable_file
                replica.failure = ""
            if replica.alive:
                replica.instances += self.rng.randint(0, 4)
                replica.errors += self.fault("request fails", 0.01)
                replica.sequence += 1
                self._send("report", (replica.sequence, self._view(replica)))

    def _view(self, r: Replica) -> ReplicaView:
        return ReplicaView(
            r.tag, str(r.incarnation), r.generation, r.digest, 0.0, r.instances, r.errors, r.failure, "b0"
        )

    def _send(self, kind: str, body: object) -> None:
        for _ in range(2 if self.fault("message duplicated", 0.1) else 1):
            if not self.fault("message lost", 0.15):
                delay = self.rng.randint(1, 8) if self.fault("message late", 0.1) else 0
                self.network.append((self.now_s + delay, kind, body))

    def _deliver(self, kind: str) -> None:
        due = [m for m in self.network if m[0] <= self.now_s and m[1] == kind]
        self.network = [m for m in self.network if m[0] > self.now_s or m[1] != kind]
        for _, _, body in due:
            if kind == "report":
                self._receive(*body)
            else:
                self._apply(*body)

    def _receive(self, sequence: int, view: ReplicaView) -> None:
        """The fleet table: a report counts once; the answer is the target."""
        known = self.views.get(view.tag)
        if known is not None and known[1].incarnation == view.incarnation and sequence <= known[0]:
            self.views[view.tag] = (known[0], replace(known[1], last_seen_s=self.now_s))
        elif known is None or int(view.incarnation) >= int(known[1].incarnation):
            self.views[view.tag] = (sequence, replace(view, last_seen_s=self.now_s))
        target = rollout.target(self.state, view.tag)
        self._name(target.generation, target.digest)
        self._send("target", (view.tag, view.incarnation, target))

    def _apply(self, tag: str, incarnation: str, target: Target) -> None:
        replica = next(r for r in self.replicas if r.tag == tag)
        if not replica.alive or str(replica.incarnation) != incarnation:
            return
        if target.generation <= replica.generation and "accept_older" not in self.broken:
            return
        if self.fault("storage slow at a replica", self.slow_rate):
            replica.failure = "storage is slow"
            return
        if target.generation < replica.generation:
            raise Violation(f"{tag} went from generation {replica.generation} back to {target.generation}")
        replica.generation, replica.digest, replica.failure = target.generation, target.digest, ""

    def _name(self, generation: int, digest: str) -> None:
        if self.names.setdefault(generation, digest) != digest:
            raise Violation(f"generation {generation} names {self.names[generation]} and {digest}")

    # ------------------------------------------------------------ the orchestrator

    def _observe(self) -> Observation:
        state, identity = self.state, healing.search_id(self.state)
        done_s, _, search = self.searches.get(identity or "", (0.0, "", healing.NO_SEARCH))
        if search is not healing.NO_SEARCH and done_s > self.now_s:
            search = SearchStatus("running")
        measured = self.measured.get(state.candidate or "")
        diagnosing = state.phase is Phase.DIAGNOSING and self.rng.random() < 0.5
        return Observation(
            now_s=self.now_s,
            replicas=tuple(view for _, view in self.views.values()),
            alarm=self.alarm,
            diagnosis=Diagnosis(self._kind(identity or ""), "simulated", 256) if diagnosing else None,
            buffered=self.rng.randint(0, 150),
            search=search,
            gate=measured[1] if measured and measured[0] <= self.now_s else None,
            decided=self._labels(),
            monitor_ready=not self.fault("baseline missing", 0.1),
            commands=tuple(self.commands),
            canary_anomaly="collapsed" if self.fault("answers collapse", 0.01) else "",
            stable_published=self.published,
            observing_since_s=self.since_s,
        )

    def _labels(self) -> tuple[Decided, ...]:
        """Labels of instances that two versions disagree on; some are of comparisons that are over."""
        digest, against = self.state.candidate or self.state.stable, self.state.stable if self.state.candidate else BASE
        if digest == against or self.counted or self.rng.random() < 0.7:
            return ()
        good = random.Random(f"{self.seed} {digest}").random() < 0.6  # a property of the digest
        wins = [self.rng.random() < (0.85 if good else 0.15) for _ in range(self.rng.randint(1, 6))]
        return tuple(Decided(f"i{n}", digest, win, against, not win) for n, win in enumerate(wins))

    def _kind(self, identity: str) -> Kind:
        """More instances seldom change a diagnosis."""
        if identity not in self.kinds or self.fault("diagnosis changes", 0.05):
            self.kinds[identity] = self.rng.choice(KINDS)
        return self.kinds[identity]

    def _pass(self) -> None:
        before, observation = self.state, self._observe()
        self.counted = bool(observation.decided)
        after, actions = healing.plan(before, observation, SETTINGS)
        if self.rng.random() < 0.05 and healing.plan(before, observation, SETTINGS) != (after, actions):
            raise Violation("plan is not deterministic")
        if self.fault("crash before the journal", 0.02):  # crash before the journal
            return self._crash()
        self._check_step(before, after, actions)
        self.journal = after
        self.state = after
        if self.fault("crash after the journal", 0.02):  # crash between journal and execution
            return self._crash()
        self.commands = [c for c in self.commands if c.command_id not in after.seen_commands]
        for action in actions:
            if not self.fault("action lost", 0.05):
                self._act(action)
        return None

    def _crash(self) -> None:
        self.crashes += 1
        self._boot()

    def _act(self, action: Action) -> None:
        match action:
            case LaunchSearch(request=request):
                if request.episode not in self.searches:
                    self.searches[request.episode] = self._search(request.episode, request.recall)
            case CancelSearch(episode=episode):
                self.searches[episode] = (self.now_s, "cancelled", SearchStatus("failed", message="cancelled"))
            case MeasureCandidate(digest=digest):
                if digest not in self.measured:
                    late_s = 1000 if self.fault("gate late", 0.03) else self.rng.randint(0, 5)
                    good, error = self.rng.random() < 0.75, "oom" if self.fault("gate fails", 0.03) else ""
                    found = evidence(digest, good, error)
                    if gate.decide(found, Kind.COVARIATE_HARMFUL, SETTINGS).analysis is Analysis.SUCCESSFUL:
                        self.allowed.add(digest)
                    self.measured[digest] = (self.now_s + late_s, found)
            case PublishStable(generation=generation, digest=digest):
                if generation < self.stable_file[0]:
                    raise Violation(f"stable.json went from {self.stable_file[0]} back to {generation}")
                self._name(generation, digest)
                self.stable_file = self.published = (generation, digest)
            case ResetMonitor():
                self.alarm = None

    def _search(self, identity: str, recall: bool) -> tuple[float, str, SearchStatus]:
        if self.fault("search hangs", 0.03):
            return self.now_s + 10_000, "hung", SearchStatus("running")
        outcome = self.rng.random()
        if recall and self.rng.random() < 0.2:
            known = f"digest-{identity}-known"
            status = SearchStatus("finished", winner=known, winner_trial="recalled", recalled=True)
        elif outcome < 0.1:
            status = SearchStatus("failed", message="worker died")
        elif outcome < 0.2:
            status = SearchStatus("finished", message="nothing beats the base")
        else:
            second = f"digest-{identity}-second" if self.rng.random() < 0.5 else None
            status = SearchStatus("finished", winner=f"digest-{identity}", winner_trial="t0", runner_up=second)
        return self.now_s + self.rng.randint(0, 8), "done", status

    # ------------------------------------------------------------ one step

    def step(self, events: bool = True) -> None:
        self.now_s += 1.0
        self._move_replicas()
        self._deliver("report")
        self._deliver("target")
        if events:
            self._happen()
        if not self.fault("pass skipped", 0.05):
            self._pass()
        self._check_world()

    def _happen(self) -> None:
        """Drift, and what people ask for."""
        if self.alarm is None and self.rng.random() < 0.15:
            returned = self.state.stable != BASE and self.rng.random() < 0.3
            self.alarm = Alarm(
                "global", self.state.stable, 9.0, 5.0, self.now_s - 3, self.now_s, 300, returned=returned
            )
        if self.rng.random() < 0.06:
            name = self.rng.choice(COMMANDS)
            argument = {"mode": self.rng.choice(("auto", "auto", "approve", "observe", "bad")), "rollback": ""}.get(
                name, ""
            )
            if name == "rollback":
                argument = self.rng.choice(("", BASE, "ungated", *self.measured))
            self.command(name, argument)

    def command(self, name: str, argument: str = "") -> None:
        self.command_count += 1
        command = Command(f"c{self.command_count}", name, "ann", "because", argument)
        self.commands += [command] * self.rng.randint(1, 2)
        if self.rng.random() < 0.2 and self.command_count > 3:  # an old one, delivered again
            self.commands.append(replace(command, command_id=f"c{self.command_count - 2}"))

    # ------------------------------------------------------------ invariants

    def _check_step(self, before: State, after: State, actions: tuple[Action, ...]) -> None:
        legal = FORWARD[before.phase] | {before.phase, Phase.WATCHING}
        self._require(after.phase in legal, f"phase {before.phase} -> {after.phase}")
        self._require(after.generation >= before.generation, "generations only grow")
        self._require(bool(after.cohort) == (after.phase in (Phase.CANARY, Phase.ROLLING)), "cohort fits the phase")
        self._require((after.episode is None) == (after.phase is Phase.WATCHING), "an episode is open or one watches")
        self._require(not after.cohort or after.candidate_generation > after.generation, "a candidate is newer")
        self._name(after.generation, after.stable)
        if after.cohort and after.candidate:
            self._name(after.candidate_generation, after.candidate)
            self._require(after.candidate in self.allowed, f"{after.candidate} is served without a passed gate")
        self._require(after.stable in self.allowed, f"{after.stable} is stable without a passed gate")
        if after.phase is not before.phase:
            since_s = min(self.entered_s, self.now_s - NEAR_S)
            near = [name for name, at_s in self.fired.items() if at_s >= since_s]
            self.entered_s = self.now_s
            self.met.update((f"{before.phase} -> {after.phase}", name) for name in near)
        stays = self.told and after.test == before.test  # the pass that counts does nothing else; the next one acts
        self._require(not stays or before.mode is Mode.OBSERVE, "what labels say is worse is taken back at once")
        self.told = after.test is not None and after.test.outcome is Bet.WORSE
        events = [a for a in actions if isinstance(a, Record)]
        for event in ("confirmed", "reverted", "canary_widened"):
            self.events[event] += sum(a.event == event for a in events)
        self.opened += sum(a.event == "episode_opened" for a in events)
        for record in events:
            if record.event == "episode_closed":
                self.closed += 1
                verdict = record.body["verdict"]
                self._require(verdict is not None and bool(record.body["reason"]), "an episode ends with a verdict")
                self.verdicts[verdict] = self.verdicts.get(verdict, 0) + 1
        self.promotions += sum(a.event == "promoted" for a in events)
        self._require(self.opened == self.closed + (after.episode is not None), "every alarm has one episode")
        self._require(bool(events) or before == after, "every state change is recorded")

    def _check_world(self) -> None:
        for replica in self.replicas:
            self._require(replica.digest in self.allowed, f"{replica.tag} serves ungated {replica.digest}")
        if self.state.phase is Phase.CANARY:
            exposed = [r.tag for r in self.replicas if r.generation == self.state.candidate_generation]
            self._require(set(exposed) <= set(self.state.cohort), f"only canaries serve the candidate; got {exposed}")

    def _require(self, holds: bool, rule: str) -> None:
        if not holds:
            raise Violation(f"seed {self.seed} at {self.now_s:.0f} s: {rule}")

    # ------------------------------------------------------------ a whole run

    def run(self) -> World:
        """Play, stop the faults, and wait for rest: the loop must come to rest by itself, in bounded time."""
        for _ in range(self.num_steps):
            self.step()
        self.fault_rate = 0.0
        for replica in self.replicas:
            replica.alive = True
        self.command("resume")
        for _ in range(500):
            self.step(events=False)
            if self._at_rest():
                return self
        raise Violation(f"seed {self.seed}: not at rest after 500 steps without faults: {self.state}")

    def _at_rest(self) -> bool:
        settled = self.state.phase is Phase.WATCHING and self.alarm is None and not self.commands
        served = all((r.generation, r.digest) == (self.state.generation, self.state.stable) for r in self.replicas)
        return settled and served and self.stable_file == (self.state.generation, self.state.stable)
