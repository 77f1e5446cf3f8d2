"""The orchestrator without Ray: gathers what is observed, lets `plan` decide, journals, then acts.

Called by the Ray actor in `launch` (live) and by `heal rehearse` (offline): both decide through this class. It knows
its edges only as `ports`. Three rules order everything here:

1. a state is journaled before it is answered to a replica or acted upon;
2. heartbeats touch memory only: storage and trials are touched by `step` alone, outside the lock;
3. `step` is level-triggered: an action whose effect is not observed is planned again.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from orchestrator import guards, healing, rollout
from orchestrator.drift.diagnosis import diagnose, diagnose_failures
from orchestrator.drift.labels import LabelTest, tolerated_error
from orchestrator.drift.monitor import Monitor
from orchestrator.errors import HealError
from orchestrator.fleet import Fleet
from orchestrator.messages import BASE, Alarm, Command, Diagnosis, LabelArrived, Phase, Report, Target
from orchestrator.pairs import Pairs
from orchestrator.ports import Ports
from orchestrator.settings import HealSettings, ServiceConfig
from orchestrator.state import (
    NO_SEARCH,
    Action,
    CancelSearch,
    LaunchSearch,
    MeasureCandidate,
    Observation,
    PublishStable,
    Record,
    ResetMonitor,
    State,
)

log = logging.getLogger("rayheal")

MAX_LABELS = 100_000  # joined labels kept in memory
MAX_EVENTS = 1_000  # journal entries kept in memory for the page
BASELINE_RETRY_PASSES = 8  # a missing baseline is looked for every this many passes
LAST_WORD_S = 0.5 * healing.DIAGNOSIS_TIMEOUT_S  # an undecided diagnosis is waited for this long


class Controller:
    """One service's orchestrator.

    Args:
        config: names the service, its storage and its base.
        ports: the edges.
        clock: seconds since the epoch; virtual in a rehearsal.
        feedback_key: handed to the replicas with each target.
    """

    def __init__(
        self, config: ServiceConfig, ports: Ports, clock: Callable[[], float], feedback_key: bytes = b""
    ) -> None:
        self.config = config
        self.traffic_ended = False  # set by a rehearsal at the end of its file
        self._ports = ports
        self._clock = clock
        self._feedback_key = feedback_key
        self._lock = threading.RLock()
        self._fleet = Fleet()
        self._monitor = Monitor(config.settings.arl_instances)
        self._commands: deque[Command] = deque()
        self._answers: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._labels: OrderedDict[str, LabelArrived] = OrderedDict()
        self._pairs = Pairs()
        self._counted = False  # the last pass counted labels, and did nothing else
        self._label_test: LabelTest | None = None
        self._label_alarm: Alarm | None = None
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self._missing: dict[str, int] = {}
        self._stable_published: tuple[int, str] | None = None
        self._problem = ""
        self._since_s = self._snapshot_s = clock()
        self._state = self._recover()
        self._restore_monitor()

    # ------------------------------------------------------------ heartbeats: memory only

    def receive(self, report: Report) -> Target:
        """Count a report once and answer with what this replica should serve."""
        with self._lock:
            now_s = self._clock()
            # After a restart nobody knows whether the report under way was counted before: its pairs are left out.
            certain = report.sequence == 0 or self._fleet.knows(report.replica_tag)
            if self._fleet.admit(report, now_s) and report.base == self.config.base:
                for window in report.windows:
                    self._monitor.absorb(report.replica_tag, window)
                for pair in report.disagreements if certain else ():
                    self._pairs.take(pair, self._labels.get(pair.instance_id))
                for label in report.labels:
                    self._take_label(label, now_s)
            target = rollout.target(self._state, report.replica_tag)
            compare, share = rollout.comparison(self._state, report.replica_tag, self.settings)
            return replace(target, feedback_key=self._feedback_key, compare=compare, compare_share=share)

    def _take_label(self, label: LabelArrived, now_s: float) -> None:
        """Count a label once, the first to come; those on the base are tested, whose accuracy is known."""
        if label.instance_id in self._labels:
            return
        self._labels[label.instance_id] = label
        self._pairs.join(label)
        while len(self._labels) > MAX_LABELS:
            self._labels.popitem(last=False)
        baseline = self._monitor.baseline(BASE)
        if label.digest != BASE or baseline is None or not math.isfinite(baseline.accuracy):
            return
        if self._label_test is None:
            harm = self.settings.harm_threshold
            tolerated = tolerated_error(baseline.accuracy, baseline.reference_count, harm)
            self._label_test = LabelTest(tolerated, self.settings.arl_instances)
        test = self._label_test
        if test.absorb(label.prediction != label.label, label.predicted_s) and self._label_alarm is None:
            self._label_alarm = Alarm(
                "global", BASE, test.statistic, test.threshold, test.onset_s, now_s, test.labels, cause="labels"
            )

    def command(self, command: Command) -> dict[str, Any]:
        """Queue what a person asked for; the next pass handles it once, however often it is delivered."""
        with self._lock:
            if all(c.command_id != command.command_id for c in self._commands):
                self._commands.append(command)
        return {"command_id": command.command_id, "accepted": True}

    # ------------------------------------------------------------ one pass

    def step(self) -> None:
        """Observe, decide, journal, act. Raises ServiceError when another orchestrator took over."""
        self._fetch_baselines()
        observation = self._observe()
        state, actions = healing.plan(self._state, observation, self.config.settings)
        self._journal(state, actions)
        with self._lock:
            self._state = state
            self._pairs.forget(observation.decided)
            self._counted = bool(observation.decided)
            while self._commands and self._commands[0].command_id in state.seen_commands:
                self._commands.popleft()
        for action in actions:
            self._act(action)
        self._save_monitor()

    def _observe(self) -> Observation:
        state = self._state
        episode = state.episode
        search_id = healing.search_id(state) if episode else None
        search = self._ports.runner.status(search_id) if search_id else None
        gate = None
        if search_id and state.phase is Phase.GATING and state.candidate:
            gate = self._ports.runner.evidence(search_id, state.candidate)
        with self._lock:
            now_s = self._clock()
            return Observation(
                now_s=now_s,
                replicas=self._fleet.views(now_s),
                alarm=self._monitor.alarm() or self._fleet.outage(state.stable, now_s) or self._label_alarm,
                diagnosis=self._diagnose(state),
                buffered=self._buffered(state),
                traffic_ended=self.traffic_ended,
                search=search or NO_SEARCH,
                gate=gate,
                monitor_ready=self._monitor.has_baseline(state.stable),
                decided=() if self._counted else self._pairs.decided,  # every other pass: the loop must go on
                commands=tuple(self._commands),
                canary_anomaly=self._canary_anomaly(state),
                stable_published=self._stable_published,
                storage=self.config.storage,
                observing_since_s=self._since_s,
            )

    def _diagnose(self, state: State) -> Diagnosis | None:
        """What the windows since the onset say by now; None while they are too few or do not tell harm from none."""
        episode, settings = state.episode, self.config.settings
        if episode is None or episode.alarm is None or state.phase is not Phase.DIAGNOSING:
            return None
        if episode.alarm.cause == "failures":
            return diagnose_failures(episode.alarm)
        alarm = self._monitor.attribute(episode.alarm)
        window = self._monitor.since(alarm.onset_s, alarm.digest, alarm.scope)
        baseline = self._monitor.baseline(alarm.digest)
        if window is None or baseline is None:
            return None
        if window.count < settings.diagnosis_instances and not self.traffic_ended:
            return None
        waited_s = self._clock() - episode.phase_s
        fresh = self._monitor.since(alarm.raised_s, alarm.digest, alarm.scope)
        # A fast replica's window at the onset holds a thousand clean instances: the last word is had on later ones.
        later = 0 if fresh is None else fresh.count
        enough = window.count >= settings.buffer_instances and later >= settings.diagnosis_instances
        return diagnose(
            baseline,
            window,
            alarm,
            len(self._fleet.views(self._clock())),
            settings,
            growth=self._monitor.growth(alarm),
            labels_say_harm=self._label_alarm is not None,
            final=self.traffic_ended or enough or waited_s > LAST_WORD_S,
            fresh=fresh,
            latest=self._monitor.since((alarm.onset_s + window.last_s) / 2.0, alarm.digest, alarm.scope),
        )

    def _buffered(self, state: State) -> int:
        if state.episode is None or state.episode.alarm is None:
            return 0
        window = self._monitor.since(state.episode.alarm.onset_s, state.episode.alarm.digest)
        return 0 if window is None else int(window.count)

    def _canary_anomaly(self, state: State) -> str:
        """A guard metric out of bounds under the digest being rolled out, in words; empty when fine."""
        if state.episode is None or state.phase not in (Phase.CANARY, Phase.ROLLING, Phase.BAKING):
            return ""
        digest, before = (state.candidate, state.stable) if state.candidate else (state.stable, state.previous or BASE)
        entered_s = state.episode.phase_entered.get(Phase.CANARY, 0.0)
        window, baseline = self._monitor.since(entered_s, digest), self._monitor.baseline(digest)
        if window is None or baseline is None:
            return ""
        old, normal = self._monitor.since(state.episode.opened_s, before), self._monitor.baseline(before)
        stable = (normal, old) if normal is not None and old is not None else None
        return guards.anomaly(baseline, window, stable, self.config.settings.canary_instances)

    # ------------------------------------------------------------ the edges

    def _fetch_baselines(self) -> None:
        """Load the baselines that the state asks for, each looked for now and then until it is there."""
        state = self._state
        for digest in {BASE, state.stable, state.candidate or state.stable}:
            with self._lock:
                if self._monitor.has_baseline(digest):
                    continue
            tries = self._missing[digest] = self._missing.get(digest, -1) + 1
            if tries % BASELINE_RETRY_PASSES:
                continue
            baseline = self._ports.baselines.load(digest)
            if baseline is not None:
                with self._lock:
                    self._monitor.set_baseline(baseline)
                self._missing.pop(digest, None)
            elif digest == BASE:
                self._ports.baselines.prepare_base()

    def _journal(self, state: State, actions: tuple[Action, ...]) -> None:
        records = [a for a in actions if isinstance(a, Record)]
        if not records and state != self._state:
            records = [Record("state", {})]
        for number, record in enumerate(records):
            # Only the last entry of a pass carries the new state: a crash between two repeats the pass.
            after = state if number == len(records) - 1 else self._state
            self._write(record.event, record.body, after)

    def _write(self, event: str, body: dict[str, Any], state: State) -> None:
        seq = self._ports.records.append(event, body, state.to_dict(), time_s=self._clock())
        with self._lock:
            self._events.append({"seq": seq, "time_s": self._clock(), "event": event, "body": body})

    def _act(self, action: Action) -> None:
        match action:
            case LaunchSearch(request=request):
                self._ports.runner.launch(request)
            case CancelSearch(episode=episode):
                self._ports.runner.cancel(episode)
            case MeasureCandidate(request=request, digest=digest):
                self._ports.runner.measure(request, digest)
            case PublishStable(generation=generation, digest=digest):
                self._ports.stable.write(generation, digest)
                self._stable_published = (generation, digest)
            case ResetMonitor(digest=digest):
                with self._lock:
                    self._monitor.reset(digest)
                    self._label_test = self._label_alarm = None
            case Record():
                pass  # written before the state was taken over

    def _save_monitor(self) -> None:
        """Once in `snapshot_s`; nobody waits for it: heartbeats are let in before it is written."""
        now_s = self._clock()
        if now_s - self._snapshot_s < self.config.settings.snapshot_s:
            return
        self._snapshot_s = now_s
        with self._lock:
            data = self._monitor.snapshot()
        self._ports.snapshots.save(data)

    def _restore_monitor(self) -> None:
        """Continue the tests of the stable digest where the last snapshot left them."""
        try:
            data = self._ports.snapshots.load()
            if data is not None:
                self._monitor.restore(data)
        except HealError as error:  # a lost snapshot costs detection delay; a service that does not start costs more
            log.warning("the drift tests start afresh: %s", error)
        if self._monitor.watched not in (None, self._state.stable):  # promoted since: a new normal
            self._monitor.reset(self._state.stable)

    def _recover(self) -> State:
        """The journaled state; a first start and a new base are journaled as such."""
        stored = self._ports.records.replay()
        if stored is None:
            state = State(base=self.config.base, mode=self.config.settings.mode)
            self._write("started", {"base": self.config.base}, state)
            return self._deployed(state)
        for entry in self._ports.records.entries()[-MAX_EVENTS:]:
            self._events.append({"seq": entry.seq, "time_s": entry.time_s, "event": entry.event, "body": entry.body})
        state = State.from_dict(stored)
        if state.base != self.config.base:
            state = healing.adopt_base(state, self.config.base)
            self._write("base_adopted", {"base": self.config.base}, state)
        return self._deployed(state)

    def _deployed(self, state: State) -> State:
        """A newer deployment's mode replaces the one in force; a restart of the same deployment changes nothing."""
        known = [e["body"]["deployed_s"] for e in self._events if e["event"] == "deployed"]
        known.append(state.deployed_s)  # 0 in journals of older releases, which kept it in the event alone
        if max(known) >= self.config.deployed_s and (len(known) > 1 or state.deployed_s):
            return state
        state = replace(state, mode=self.config.settings.mode, deployed_s=self.config.deployed_s)
        self._write("deployed", {"deployed_s": self.config.deployed_s, "mode": state.mode.value}, state)
        return state

    # ------------------------------------------------------------ reading

    @property
    def current(self) -> State:
        """The journaled state."""
        return self._state

    @property
    def settings(self) -> HealSettings:
        """The settings in force."""
        return self.config.settings

    def note_problem(self, problem: str) -> None:
        """Show why the last pass failed; empty when it did not."""
        self._problem = problem

    def state(self) -> dict[str, Any]:
        """What `GET /healing` answers."""
        with self._lock:
            now_s = self._clock()
            right = sum(1 for label in self._labels.values() if label.prediction == label.label)
            test = self._state.test
            return {
                "service": self.config.service,
                "storage": self.config.storage,
                "time_s": now_s,
                "problem": self._problem,
                "labels": {"joined": len(self._labels), "correct": right},
                "comparison": None
                if test is None
                else {"outcome": test.outcome.value, "message": test.inequality(), **self._pairs.to_json(test)},
                "reports": {"repeated": self._fleet.repeated, "lost": self._fleet.lost_reports()},
                "replicas": self._fleet.to_json(now_s, self.settings.replica_lost_s),
                "drift": self._monitor.statistic(),
                **self._state.to_dict(),
            }

    def episodes(self) -> list[dict[str, Any]]:
        """Every episode's record, the open one last."""
        with self._lock:
            closed = {e["body"]["id"]: e["body"] for e in self._events if e["event"] == "episode_closed"}
            if self._state.episode is not None:
                closed[self._state.episode.id] = self._state.episode.to_dict()
            return list(closed.values())

    def episode(self, episode_id: str) -> dict[str, Any] | None:
        """One episode's record."""
        return next((e for e in self.episodes() if e["id"] == episode_id), None)

    def events(self, after: int = -1) -> list[dict[str, Any]]:
        """Journal entries with a higher sequence number than `after`."""
        with self._lock:
            return [e for e in self._events if e["seq"] > after]


def run_pass(controller: Controller) -> bool:
    """One pass that survives slow or broken edges: the cause is shown, the next pass tries again.

    Returns:
        False when the pass failed; what is served is unchanged then.
    """
    try:
        controller.step()
    except HealError as error:
        controller.note_problem(f"{type(error).__name__}: {error}")
        return False
    controller.note_problem("")
    return True
