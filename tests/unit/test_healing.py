"""The healing loop as a specification: each rule of an episode is one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from simulator import World

from orchestrator.healing import ANSWERS, adopt_base, plan, search_id
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
    ALL_REPLICAS,
    Action,
    CancelSearch,
    LaunchSearch,
    MeasureCandidate,
    Observation,
    PublishStable,
    Record,
    ReplicaView,
    ResetMonitor,
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


# ---------------------------------------------------------------- the whole way


def test_a_harmful_drift_is_searched_gated_rolled_out_and_healed() -> None:
    loop = Loop().heal()
    closed_as(loop, Verdict.HEALED, "provisional")
    assert (loop.state.generation, loop.state.stable, loop.state.previous) == (1, "d1", BASE)
    assert all((r.generation, r.digest) == (1, "d1") for r in loop.replicas.values())
    entered = [r.body["phase"] for r in loop.records if r.event == "phase_entered"]
    assert entered == ["diagnosing", "searching", "gating", "canary", "rolling", "baking"]
    episode = next(r.body for r in loop.records if r.event == "episode_closed")
    assert list(episode["phase_entered"]) == entered
    assert episode["winner_trial"]["trial_id"] == "t1"
    assert json.dumps(episode, allow_nan=False)


def test_without_news_a_pass_changes_nothing() -> None:
    for phase in (Phase.WATCHING, Phase.CANARY, Phase.BAKING):
        loop = Loop().to(phase).step() if phase is Phase.CANARY else Loop().to(phase)
        before = loop.state
        loop.step(after_s=0.0)
        assert loop.state == before
        assert not [a for a in loop.actions if isinstance(a, Record)]


# ---------------------------------------------------------------- opening


def test_an_alarm_opens_one_episode_however_often_it_is_seen() -> None:
    loop = Loop()
    alarm = loop.alarm()
    for _ in range(3):
        loop.step(alarm=alarm)
    assert (loop.state.phase, loop.state.episodes_opened) == (Phase.DIAGNOSING, 1)
    assert loop.state.episode is not None
    assert loop.state.episode.id == "e0001"
    assert loop.state.episode.since_s == alarm.onset_s


def test_cooldown_holds_an_alarm_back_and_then_opens_it() -> None:
    loop = Loop().to(Phase.DIAGNOSING).step(diagnosis=diagnosis(Kind.UNKNOWN))
    alarm = replace(loop.alarm(), raised_s=loop.now_s + 1)
    assert loop.step(after_s=599, alarm=alarm).state.phase is Phase.WATCHING
    assert loop.step(after_s=2, alarm=alarm).state.phase is Phase.DIAGNOSING


def test_an_alarm_that_was_answered_is_reset_not_opened_again() -> None:
    loop = Loop().to(Phase.DIAGNOSING)
    assert loop.state.episode is not None
    old = loop.state.episode.alarm
    loop.step(diagnosis=diagnosis(Kind.NONE), alarm=old)
    loop.step(after_s=9999, alarm=old)
    assert loop.state.phase is Phase.WATCHING
    assert ResetMonitor(BASE) in loop.actions


def test_an_alarm_of_a_digest_that_is_not_served_any_more_is_reset() -> None:
    loop = Loop().step(alarm=replace(Loop().alarm(), digest="old", raised_s=2000.0))
    assert loop.state.phase is Phase.WATCHING
    assert loop.actions == (ResetMonitor(BASE),)


def test_start_opens_an_episode_by_hand_once() -> None:
    loop = Loop()
    assert loop.command("start")["accepted"]
    assert loop.state.episode is not None
    assert loop.state.episode.manual
    assert loop.state.episode.alarm is not None
    refused = loop.command("start")
    assert not refused["accepted"]
    assert "e0001 is open" in refused["message"]


# ---------------------------------------------------------------- diagnosing


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [
        (Kind.NONE, Verdict.NO_DRIFT),
        (Kind.OUTAGE, Verdict.REFUSED),
        (Kind.REPLICA_FAULT, Verdict.REFUSED),
        (Kind.SUSPICIOUS_SOURCE, Verdict.REFUSED),
        (Kind.DATA_QUALITY, Verdict.REFUSED),
        (Kind.UNKNOWN, Verdict.REFUSED),
        (Kind.CONCEPT, Verdict.REFUSED),
        (Kind.COVARIATE_BENIGN, Verdict.NO_ACTION),
    ],
)
def test_a_kind_that_no_adapter_fixes_closes_with_its_verdict(kind: Kind, verdict: Verdict) -> None:
    loop = Loop().to(Phase.DIAGNOSING).step(diagnosis=diagnosis(kind))
    closed_as(loop, verdict, "by the numbers")
    assert ResetMonitor(BASE) in loop.actions


def test_every_kind_has_an_answer_or_is_searched_for() -> None:
    assert set(Kind) - set(ANSWERS) == {Kind.PRIOR_SHIFT, Kind.COVARIATE_HARMFUL}


@pytest.mark.parametrize("kind", [Kind.PRIOR_SHIFT, Kind.COVARIATE_HARMFUL])
def test_observe_mode_says_what_it_would_have_done(kind: Kind) -> None:
    loop = Loop(mode=Mode.OBSERVE).to(Phase.DIAGNOSING).step(diagnosis=diagnosis(kind))
    closed_as(loop, Verdict.NO_ACTION, "would have searched", kind.value)


def test_a_search_waits_for_the_buffer_but_not_for_ever() -> None:
    loop = Loop().to(Phase.DIAGNOSING).step(diagnosis=diagnosis(), buffered=300)
    assert loop.state.phase is Phase.DIAGNOSING
    assert loop.step(buffered=1999).state.phase is Phase.DIAGNOSING
    assert loop.step(after_s=30, buffered=255).state.phase is Phase.DIAGNOSING
    assert loop.step(buffered=256).state.phase is Phase.SEARCHING
    assert Loop().to(Phase.DIAGNOSING).step(diagnosis=diagnosis(), buffered=2000).state.phase is Phase.SEARCHING


def test_the_end_of_the_traffic_ends_the_wait() -> None:
    loop = Loop().to(Phase.DIAGNOSING).step(diagnosis=diagnosis(), buffered=300, traffic_ended=True)
    assert loop.state.phase is Phase.SEARCHING
    loop = Loop().to(Phase.DIAGNOSING).step(diagnosis=diagnosis(), buffered=40, traffic_ended=True)
    closed_as(loop, Verdict.REFUSED, "the traffic ended with 40 of min_buffer_instances 256")
    loop = Loop().to(Phase.DIAGNOSING).step(buffered=40, traffic_ended=True)
    closed_as(loop, Verdict.REFUSED, "the traffic ended with 40 of diagnosis_instances 256")


def test_traffic_too_thin_for_an_hour_ends_in_a_verdict() -> None:
    closed_as(Loop().to(Phase.DIAGNOSING).step(after_s=3601, buffered=3), Verdict.ERROR, "too thin with 3")
    loop = Loop().to(Phase.DIAGNOSING).step(diagnosis=diagnosis(), buffered=3).step(after_s=3601, buffered=3)
    closed_as(loop, Verdict.REFUSED, "too thin with 3 of min_buffer_instances 256")


# ---------------------------------------------------------------- searching


def test_an_absent_search_is_launched_again_and_the_request_never_changes() -> None:
    loop = Loop(seed=7).to(Phase.SEARCHING).step()
    first = loop.actions
    assert loop.step(after_s=3).actions == first
    (launch,) = first
    assert isinstance(launch, LaunchSearch)
    assert (launch.request.episode, launch.request.storage, launch.request.seed) == ("e0001", "s3://x", 8)
    assert loop.step(search=SearchStatus("running")).actions == ()


def test_a_failed_search_is_tried_once_more_under_another_id() -> None:
    failed = SearchStatus("failed", message="worker died")
    loop = Loop().to(Phase.SEARCHING).step(search=failed)
    assert search_id(loop.state) == "e0001-2"
    (launch,) = loop.step().actions
    assert isinstance(launch, LaunchSearch)
    assert launch.request.episode == "e0001-2"
    closed_as(loop.step(search=failed), Verdict.ERROR, "failed 2 times: worker died")


def test_a_search_without_a_winner_refuses_with_its_message() -> None:
    loop = Loop().to(Phase.SEARCHING).step(search=SearchStatus("finished", message="best trial 0.41 < base 0.55"))
    closed_as(loop, Verdict.REFUSED, "best trial 0.41 < base 0.55")


def test_a_winner_that_is_served_already_is_refused() -> None:
    loop = Loop().heal()
    loop.to(Phase.SEARCHING).step(search=FOUND)
    closed_as(loop, Verdict.REFUSED, "served already")


def test_a_hung_search_is_cancelled() -> None:
    loop = Loop().to(Phase.SEARCHING)
    running = SearchStatus("running")
    assert loop.step(after_s=720, search=running).state.phase is Phase.SEARCHING
    loop.step(search=running)
    closed_as(loop, Verdict.ERROR, "> 720 s")
    assert CancelSearch("e0001") in loop.actions


# ---------------------------------------------------------------- gating


def test_a_candidate_is_measured_until_its_evidence_is_there() -> None:
    loop = Loop().to(Phase.GATING).step()
    (measure,) = loop.actions
    assert isinstance(measure, MeasureCandidate)
    assert measure.digest == "d1"
    assert loop.step(gate=replace(EVIDENCE, candidate="another")).actions == (measure,)
    assert loop.step(gate=EVIDENCE).state.phase is Phase.CANARY


def test_a_candidate_before_the_gate_is_served_nowhere() -> None:
    loop = Loop().to(Phase.GATING).step()
    assert {target(loop.state, tag).digest for tag in loop.replicas} == {BASE}


@pytest.mark.parametrize(
    ("change", "verdict", "words"),
    [
        ({"reference_candidate": 0.5, "reference_share": 0.5}, Verdict.REFUSED, "gate failed: clean loss 0.200 > max"),
        ({"instances": 3}, Verdict.REFUSED, "gate inconclusive: held-out instances 3 < 32"),
        ({"error": "no GPU"}, Verdict.ERROR, "no GPU"),
    ],
)
def test_a_candidate_that_does_not_pass_is_never_served(change: dict[str, Any], verdict: Verdict, words: str) -> None:
    loop = Loop().to(Phase.GATING).step(gate=replace(EVIDENCE, **change))
    closed_as(loop, verdict, words)
    assert loop.state.candidate is None
    assert loop.state.generation == 0


def test_gate_evidence_that_never_comes_is_an_error() -> None:
    closed_as(Loop().to(Phase.GATING).step(after_s=301), Verdict.ERROR, "no gate evidence in 300 s")


def test_hold_refuses_what_labels_have_not_confirmed() -> None:
    loop = Loop(without_labels="hold").to(Phase.GATING).step(gate=EVIDENCE)
    closed_as(loop, Verdict.REFUSED, "held: labels needed")
    loop = Loop(without_labels="hold").to(Phase.GATING)
    assert loop.step(gate=replace(EVIDENCE, labelled_wins=9)).state.phase is Phase.CANARY


def test_a_gated_candidate_waits_for_a_live_replica_and_then_gives_up() -> None:
    loop = Loop(num_replicas=0).to(Phase.GATING).step(gate=EVIDENCE).step()
    assert loop.state.phase is Phase.GATING
    closed_as(loop.step(after_s=301), Verdict.ERROR, "no live replica")


def test_a_mode_turned_to_observe_stops_before_the_canary() -> None:
    loop = Loop().to(Phase.GATING)
    loop.command("mode", "observe")
    closed_as(loop.step(gate=EVIDENCE), Verdict.NO_ACTION, "would have rolled out d1")


# ---------------------------------------------------------------- approval


@pytest.mark.parametrize("name", ["approve", "promote"])
def test_approve_mode_waits_for_a_person(name: str) -> None:
    loop = Loop(mode=Mode.APPROVE).to(Phase.AWAITING_APPROVAL).step(after_s=999)
    assert loop.state.episode is not None
    assert loop.state.episode.verdict is Verdict.AWAITING_APPROVAL
    assert {target(loop.state, tag).digest for tag in loop.replicas} == {BASE}
    assert loop.command(name)["accepted"]
    assert loop.state.phase is Phase.CANARY
    assert loop.state.episode.verdict is None


def test_nobody_approving_is_a_refusal() -> None:
    loop = Loop(mode=Mode.APPROVE).to(Phase.AWAITING_APPROVAL).step(after_s=8 * 86400)
    closed_as(loop, Verdict.REFUSED, "nobody approved")


def test_abort_while_awaiting_approval_aborts() -> None:
    loop = Loop(mode=Mode.APPROVE).to(Phase.AWAITING_APPROVAL)
    loop.command("abort")
    closed_as(loop, Verdict.ABORTED, "aborted by ann: because")
    assert loop.state.generation == 0


def test_approve_with_no_live_replica_is_refused_and_can_be_repeated() -> None:
    loop = Loop(num_replicas=1, mode=Mode.APPROVE).to(Phase.AWAITING_APPROVAL)
    loop.silent = {"r0"}
    loop.step(after_s=11)
    assert "no live replica" in loop.command("approve")["message"]
    loop.silent = set()
    assert loop.command("approve")["accepted"]


# ---------------------------------------------------------------- canary


def test_the_canary_is_one_replica_with_a_new_generation() -> None:
    loop = Loop().to(Phase.CANARY)
    targets = {tag: (target(loop.state, tag).generation, target(loop.state, tag).digest) for tag in loop.replicas}
    assert targets == {"r0": (1, "d1"), "r1": (0, BASE), "r2": (0, BASE)}


def test_a_single_replica_is_its_own_canary() -> None:
    assert Loop(num_replicas=1).heal().state.stable == "d1"


def test_instances_count_from_the_ack_of_the_canary() -> None:
    loop = Loop().to(Phase.CANARY)
    loop.serve("r0", instances=1000)
    loop.step()
    loop.serve("r0", instances=1063)
    assert loop.step().state.phase is Phase.CANARY
    loop.serve("r0", instances=1064)
    assert loop.step().state.phase is Phase.ROLLING
    assert loop.state.cohort == ALL_REPLICAS


def restored(loop: Loop) -> None:
    """Everyone is told to serve what was stable, under a generation that no replica ignores."""
    assert loop.state.generation == 2
    assert {target(loop.state, tag).digest for tag in loop.replicas} == {BASE}
    assert loop.state.candidate is None
    loop.step().step()
    assert all((r.generation, r.digest) == (2, BASE) for t, r in loop.replicas.items() if t not in loop.silent)


def test_replica_lost_during_canary_aborts_and_restores_stable() -> None:
    loop = Loop().to(Phase.CANARY)
    loop.silent = {"r0"}
    assert loop.step(after_s=9).state.phase is Phase.CANARY
    loop.step(after_s=2)
    closed_as(loop, Verdict.ABORTED, "canary r0 lost: silent for 11.0 s > 10.0 s")
    restored(loop)


def test_a_canary_that_vanished_from_the_table_counts_as_lost() -> None:
    loop = Loop().to(Phase.CANARY)
    del loop.replicas["r0"]
    closed_as(loop.step().step(after_s=11), Verdict.ABORTED, "canary r0 lost")


def test_an_orchestrator_that_just_restarted_gives_the_canary_time_to_report() -> None:
    loop = Loop().to(Phase.CANARY)
    del loop.replicas["r0"]
    assert loop.step(after_s=30, observing_since_s=loop.now_s + 25).state.phase is Phase.CANARY


@pytest.mark.parametrize(
    ("change", "seen", "words"),
    [
        ({"incarnation": "i1"}, {}, "canary r0 restarted"),
        ({"failure": "key conv1.weight is missing"}, {}, "could not apply generation 1: key conv1.weight"),
        ({"errors": 1}, {}, "1 new errors > 0"),
        ({}, {"canary_anomaly": "class 3 share 0.99 > 0.95"}, "class 3 share 0.99 > 0.95"),
    ],
)
def test_a_canary_in_trouble_is_taken_back(change: dict[str, Any], seen: dict[str, Any], words: str) -> None:
    loop = Loop().to(Phase.CANARY).step()
    loop.serve("r0", instances=64, **change)
    loop.step(**seen)
    closed_as(loop, Verdict.ABORTED, words)
    restored(loop)


def test_errors_from_before_the_ack_do_not_count() -> None:
    loop = Loop().to(Phase.CANARY)
    loop.serve("r0", errors=5)
    assert loop.step().step().state.phase is Phase.CANARY


def test_a_canary_without_traffic_is_inconclusive() -> None:
    loop = Loop().to(Phase.CANARY).step()
    loop.serve("r0", instances=12)
    loop.step(after_s=61)
    closed_as(loop, Verdict.ABORTED, "inconclusive: canary served 12 < 64 instances in 60 s")
    restored(loop)


def test_promote_forces_a_canary_without_traffic_into_rolling() -> None:
    loop = Loop().to(Phase.CANARY).step()
    assert loop.command("promote")["accepted"]
    assert loop.state.phase is Phase.ROLLING


def test_promote_does_not_overrule_a_canary_in_trouble() -> None:
    loop = Loop().to(Phase.CANARY).step()
    loop.serve("r0", errors=1)
    asked = Command("p", "promote", "ann", "hurry")
    loop.step(commands=(asked,))
    closed_as(loop, Verdict.ABORTED, "new errors")
    loop.step(commands=(asked,))
    assert loop.records[-1].body["message"] == "nothing awaits approval: the phase is watching"


def test_a_canary_that_never_applies_its_target_is_taken_back() -> None:
    loop = Loop().to(Phase.CANARY)
    loop.stuck = {"r0"}
    closed_as(loop.step(after_s=61), Verdict.ABORTED, "did not apply generation 1 in 60 s")


# ---------------------------------------------------------------- rolling and baking


def test_rolling_ends_when_every_live_replica_has_acked() -> None:
    loop = Loop().to(Phase.ROLLING)
    loop.stuck = {"r2"}
    assert loop.step(after_s=2).state.phase is Phase.ROLLING
    loop.replicas["r9"] = ReplicaView("r9", "i0", 0, BASE, 0.0, base="b0")
    loop.stuck = {"r9"}
    assert loop.step().state.phase is Phase.ROLLING
    loop.stuck = set()
    loop.step()
    assert loop.state.phase is Phase.BAKING
    assert (loop.state.generation, loop.state.stable) == (1, "d1")
    assert ResetMonitor("d1") in loop.actions
    assert loop.records[-2].event == "promoted"


def test_a_replica_lost_while_rolling_does_not_hold_the_rest() -> None:
    loop = Loop().to(Phase.ROLLING)
    loop.silent = {"r2"}
    assert loop.step(after_s=2).state.phase is Phase.ROLLING
    assert loop.step(after_s=9).state.phase is Phase.BAKING


def test_rolling_waits_until_a_restarted_orchestrator_has_heard_from_all() -> None:
    loop = Loop().to(Phase.ROLLING)
    assert loop.step(after_s=2, observing_since_s=loop.now_s + 1.5).state.phase is Phase.ROLLING
    assert loop.step(after_s=2).state.phase is Phase.BAKING


def test_a_rollout_that_takes_too_long_is_taken_back_and_says_who_was_late() -> None:
    loop = Loop().to(Phase.ROLLING)
    loop.stuck = {"r1"}
    loop.serve("r1", failure="disk full")
    loop.step(after_s=61)
    closed_as(loop, Verdict.ABORTED, "generation 1 not applied in 60 s by: r1 (disk full)")
    loop.stuck = set()
    restored(loop)


def test_an_anomaly_while_rolling_takes_it_back() -> None:
    loop = Loop().to(Phase.ROLLING).step(canary_anomaly="collapsed")
    closed_as(loop, Verdict.ABORTED, "collapsed")
    restored(loop)


def test_an_anomaly_while_baking_rolls_back_to_what_was_before() -> None:
    loop = Loop().to(Phase.BAKING).step(canary_anomaly="collapsed")
    closed_as(loop, Verdict.ABORTED, "collapsed")
    assert (loop.state.stable, loop.state.previous, loop.state.promoted) == (BASE, None, ())
    restored(loop)


def test_an_adapter_that_cannot_be_watched_is_not_kept() -> None:
    loop = Loop().to(Phase.BAKING).step(after_s=59, monitor_ready=False)
    assert loop.state.phase is Phase.BAKING
    closed_as(loop.step(after_s=2, monitor_ready=False), Verdict.ABORTED, "no drift baseline of d1")


def test_labels_that_proved_the_gain_make_the_verdict_final() -> None:
    loop = Loop().to(Phase.GATING).step(gate=replace(EVIDENCE, labelled=20, labelled_wins=15))
    loop.to(Phase.BAKING).step(after_s=6)
    closed_as(loop, Verdict.HEALED, "confirmed by labels")
    assert loop.state.last_verdict is not None
    assert not loop.state.last_verdict["provisional"]


def test_stable_is_published_until_it_is_seen() -> None:
    loop = Loop().to(Phase.BAKING)
    for _ in range(2):
        loop.step(stable_published=(0, BASE))
        assert PublishStable(1, "d1") in loop.actions
    assert PublishStable(1, "d1") not in loop.step().actions


# ---------------------------------------------------------------- the old world returns


def back(loop: Loop) -> Loop:
    return loop.step(alarm=loop.alarm(returned=True))


@pytest.mark.parametrize("mode", [Mode.AUTO, Mode.APPROVE])
def test_the_return_of_the_old_world_restores_the_base_in_one_pass(mode: Mode) -> None:
    loop = Loop().heal()
    loop.command("mode", mode.value)
    loop.command("pause")
    back(loop)
    closed_as(loop, Verdict.HEALED, "the traffic looks like the reference again: base restored")
    assert (loop.state.stable, loop.state.generation, loop.state.previous) == (BASE, 2, "d1")
    assert loop.state.last_verdict is not None
    assert loop.state.last_verdict["kind"] == Kind.NONE
    assert ResetMonitor(BASE) in loop.actions


def test_observe_mode_only_says_that_the_old_world_is_back() -> None:
    loop = Loop().heal()
    loop.command("mode", "observe")
    back(loop)
    closed_as(loop, Verdict.NO_ACTION, "would have restored the base")
    assert loop.state.stable == "d1"
    assert back(loop.step()).state.episodes_opened == 2, "cooldown"


def test_a_return_while_the_next_search_runs_restores_the_base_and_cancels() -> None:
    loop = Loop().heal().to(Phase.SEARCHING)
    back(loop)
    closed_as(loop, Verdict.HEALED, "base restored")
    assert CancelSearch("e0002") in loop.actions


def test_a_return_while_baking_waits_for_the_end_of_baking() -> None:
    loop = Loop().to(Phase.BAKING)
    alarm = replace(loop.alarm(returned=True), raised_s=loop.now_s + 1)
    assert loop.step(alarm=alarm).state.phase is Phase.BAKING
    loop.step(after_s=6, alarm=alarm)
    assert loop.state.stable == "d1"
    assert loop.step(alarm=alarm).state.stable == BASE


# ---------------------------------------------------------------- people


def test_a_repeated_command_is_a_no_op() -> None:
    loop = Loop()
    asked = Command("same", "start", "ann", "because")
    loop.step(commands=(asked, asked))
    loop.step(diagnosis=diagnosis(Kind.NONE), commands=(asked,)).step(commands=(asked,))
    assert loop.state.phase is Phase.WATCHING
    assert sum(r.event == "command" for r in loop.records) == 1


def test_commands_after_one_that_moved_the_episode_wait_for_the_next_pass() -> None:
    loop = Loop()
    both = (Command("a", "start", "ann", ""), Command("b", "abort", "ann", "no"))
    loop.step(commands=both)
    assert (loop.state.phase, loop.state.seen_commands) == (Phase.DIAGNOSING, ("a",))
    loop.step(commands=both)
    assert (loop.state.phase, loop.state.seen_commands) == (Phase.WATCHING, ("a", "b"))


def test_only_the_last_256_command_ids_are_kept() -> None:
    loop = Loop()
    for _ in range(300):
        loop.command("nonsense")
    assert (len(loop.state.seen_commands), loop.state.seen_commands[-1]) == (256, "c300")


def test_a_refused_command_is_recorded_with_actor_and_reason() -> None:
    body = Loop().command("dance")
    assert (body["accepted"], body["actor"], body["reason"]) == (False, "ann", "because")
    assert "unknown command 'dance'; known: abort, approve" in body["message"]


@pytest.mark.parametrize("name", ["approve", "promote", "abort", "rollback", "resume"])
def test_commands_that_make_no_sense_while_watching_change_nothing(name: str) -> None:
    loop = Loop()
    assert not loop.command(name)["accepted"]
    assert replace(loop.state, seen_commands=()) == Loop().state


def test_a_pause_opens_no_episode() -> None:
    loop = Loop()
    loop.command("pause")
    assert loop.step(alarm=loop.alarm()).state.phase is Phase.WATCHING
    assert "resume first" in loop.command("start")["message"]
    loop.command("resume")
    assert loop.step(alarm=loop.alarm()).state.phase is Phase.DIAGNOSING


def test_a_pause_freezes_the_phase_and_its_timeouts_but_not_safety() -> None:
    loop = Loop().to(Phase.CANARY).step()
    loop.command("pause")
    loop.serve("r0", instances=64)
    assert loop.step(after_s=1000).state.phase is Phase.CANARY
    assert "resume first" in loop.command("promote")["message"]
    loop.serve("r0", instances=3)
    loop.command("resume")
    assert loop.state.phase is Phase.CANARY, "the time paused does not count"
    loop.command("pause")
    closed_as(loop.step(canary_anomaly="collapsed"), Verdict.ABORTED)
    assert loop.state.paused


@pytest.mark.parametrize("phase", [Phase.DIAGNOSING, Phase.SEARCHING, Phase.GATING])
def test_abort_before_anything_was_served_needs_no_new_generation(phase: Phase) -> None:
    loop = Loop().to(phase)
    assert loop.command("abort")["accepted"]
    closed_as(loop, Verdict.ABORTED)
    assert loop.state.generation == 0
    assert (CancelSearch("e0001") in loop.actions) == (phase is Phase.SEARCHING)


@pytest.mark.parametrize("phase", [Phase.CANARY, Phase.ROLLING, Phase.BAKING])
def test_abort_of_what_was_served_withdraws_it_by_a_new_generation(phase: Phase) -> None:
    loop = Loop().to(phase)
    loop.command("abort")
    closed_as(loop, Verdict.ABORTED)
    restored(loop)


def test_rollback_is_a_new_generation_with_an_old_digest() -> None:
    loop = Loop().heal()
    assert loop.command("rollback")["accepted"]
    assert (loop.state.generation, loop.state.stable, loop.state.previous) == (2, BASE, "d1")
    assert loop.command("rollback", "d1")["accepted"]
    assert (loop.state.generation, loop.state.stable) == (3, "d1")
    assert not loop.command("rollback", "d1")["accepted"]
    assert loop.step(alarm=loop.alarm()).state.phase is Phase.WATCHING, "cooldown: a person decided"


def test_rollback_to_what_was_never_promoted_is_refused() -> None:
    loop = Loop().heal()
    assert "(base, d1); got d7" in loop.command("rollback", "d7")["message"]
    loop = Loop().to(Phase.CANARY)
    assert not loop.command("rollback", "d1")["accepted"], "a candidate is not promoted yet"


@pytest.mark.parametrize("phase", [Phase.CANARY, Phase.ROLLING])
def test_rollback_to_base_during_a_rollout_closes_the_episode(phase: Phase) -> None:
    loop = Loop().to(phase)
    loop.command("rollback", BASE)
    closed_as(loop, Verdict.ABORTED, "rolled back by ann: because")
    restored(loop)


def test_mode_takes_a_mode_and_nothing_else() -> None:
    loop = Loop()
    assert loop.command("mode", "observe")["accepted"]
    assert loop.state.mode is Mode.OBSERVE
    assert "must be one of observe, approve, auto; got 'fast'" in loop.command("mode", "fast")["message"]


# ---------------------------------------------------------------- a new base


def test_a_new_base_is_served_bare_under_a_fresh_generation() -> None:
    loop = Loop().heal()
    loop.state = adopt_base(loop.state, "b1")
    assert (loop.state.base, loop.state.generation, loop.state.stable) == ("b1", 2, BASE)
    assert (loop.state.previous, loop.state.promoted) == (None, ())


def test_a_new_base_aborts_an_open_episode_on_the_next_pass() -> None:
    loop = Loop().to(Phase.CANARY)
    loop.state = adopt_base(loop.state, "b1")
    assert loop.state.generation == 2, "the canary's generation is used up"
    loop.step()
    closed_as(loop, Verdict.ABORTED, "from b0 to b1")
    assert loop.state.cooldown_until_s == 0.0


# ---------------------------------------------------------------- what holds for every state


def test_a_state_of_a_newer_schema_is_not_read() -> None:
    with pytest.raises(ValueError, match="schema_version must be <= 1; got 2: upgrade"):
        State.from_dict(State(base="b0").to_dict() | {"schema_version": 2})


def test_figures_that_are_not_numbers_survive_the_journal() -> None:
    loop = Loop().to(Phase.GATING)
    written = json.dumps(loop.state.to_dict(), allow_nan=False)
    read = State.from_dict(json.loads(written))
    assert json.dumps(read.to_dict()) == written
    assert read.episode is not None
    assert read.episode.winner_trial is not None
    assert read.episode.winner_trial.labelled_accuracy != read.episode.winner_trial.labelled_accuracy
    assert isinstance(read.episode.winner_trial.config.placement, Placement)


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 120))
def test_in_any_world_at_any_moment_state_round_trips_and_plan_is_idempotent(seed: int, num_steps: int) -> None:
    world = World(seed)
    for _ in range(num_steps):
        generation = world.state.generation
        world.step()  # raises when a candidate is served ungated, or a generation is reused or falls
        assert world.state.generation >= generation or world.crashes
    state = world.state
    written = json.dumps(state.to_dict())
    assert json.dumps(State.from_dict(json.loads(written)).to_dict()) == written  # NaN is not equal to itself
    observation = Observation(world.now_s, stable_published=(state.generation, state.stable))
    once = plan(state, observation, HealSettings())
    again = plan(once[0], observation, HealSettings())
    assert plan(once[0], observation, HealSettings()) == again
    if once[0] == state:
        assert once == again
