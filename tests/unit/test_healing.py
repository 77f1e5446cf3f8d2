"""The healing loop as a specification, to the gate: each rule of an episode is one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from healing_loop import EVIDENCE, FOUND, Loop, closed_as, diagnosis
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from simulator import World

from orchestrator.healing import ANSWERS, plan, search_id
from orchestrator.messages import (
    BASE,
    Kind,
    Mode,
    Phase,
    Placement,
    SearchStatus,
    Verdict,
)
from orchestrator.rollout import target
from orchestrator.settings import HealSettings
from orchestrator.state import (
    CancelSearch,
    LaunchSearch,
    MeasureCandidate,
    Observation,
    Record,
    ResetMonitor,
    State,
)

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


# ---------------------------------------------------------------- the second choice

SECOND = replace(FOUND, runner_up="d2", runner_up_trial="t2")
BAD = replace(EVIDENCE, reference_candidate=0.4, reference_share=1.0)


def test_where_the_gate_refuses_the_winner_the_runner_up_is_judged() -> None:
    loop = Loop().to(Phase.SEARCHING).step(search=SECOND)
    loop.step(search=SECOND, gate=BAD)
    assert (loop.state.phase, loop.state.candidate) == (Phase.GATING, "d2")
    loop.step(search=SECOND, gate=BAD)
    assert [a.digest for a in loop.actions if isinstance(a, MeasureCandidate)] == ["d2"], "evidence of d1 is of no use"
    loop.step(gate=replace(EVIDENCE, candidate="d2"))
    assert (loop.state.phase, loop.state.candidate) == (Phase.CANARY, "d2")
    assert loop.state.episode is not None
    assert loop.state.episode.winner == "d2"
    assert "clean loss" in loop.state.episode.passed_over


def test_where_both_are_refused_the_reason_names_both() -> None:
    loop = Loop().to(Phase.SEARCHING).step(search=SECOND)
    loop.step(search=SECOND, gate=BAD).step(gate=replace(BAD, candidate="d2"))
    closed_as(loop, Verdict.REFUSED, "gate failed: clean loss", "before it d1: clean loss")


def test_an_earlier_adapter_that_the_gate_refuses_is_followed_by_a_search_that_trains() -> None:
    loop = Loop().to(Phase.SEARCHING)
    known = replace(FOUND, recalled=True)
    loop.step(search=known).step(search=known, gate=BAD)
    assert (loop.state.phase, search_id(loop.state), loop.state.candidate) == (Phase.SEARCHING, "e0001-2", None)
    loop.step()
    request = next(a.request for a in loop.actions if isinstance(a, LaunchSearch))
    assert (request.episode, request.recall) == ("e0001-2", False)
    loop.step(search=replace(FOUND, winner="d9"))
    assert (loop.state.phase, loop.state.candidate) == (Phase.GATING, "d9")
    loop.step(gate=replace(BAD, candidate="d9"))
    closed_as(loop, Verdict.REFUSED, "before it d1, seen before: clean loss")


def test_a_winner_that_could_not_be_measured_is_no_reason_for_the_runner_up() -> None:
    loop = Loop().to(Phase.SEARCHING).step(search=SECOND)
    loop.step(search=SECOND, gate=replace(EVIDENCE, error="out of memory"))
    closed_as(loop, Verdict.ERROR, "out of memory")


def test_a_runner_up_that_is_served_already_is_not_judged() -> None:
    loop = Loop().heal().to(Phase.SEARCHING)
    loop.step(search=replace(SECOND, winner="d3", runner_up="d1")).step(gate=replace(BAD, candidate="d3"))
    closed_as(loop, Verdict.REFUSED, "gate failed")
