"""What people say to the healing loop, and a new base: each rule is one sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest
from healing_loop import Loop, closed_as, diagnosis, restored

from orchestrator.healing import adopt_base
from orchestrator.messages import (
    BASE,
    Command,
    Kind,
    Mode,
    Phase,
    Verdict,
)
from orchestrator.rollout import target
from orchestrator.state import (
    CancelSearch,
)

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
