"""The healing loop from the canary on, and back: each rule is one sentence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from healing_loop import EVIDENCE, Loop, closed_as, restored

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
    ALL_REPLICAS,
    CancelSearch,
    PublishStable,
    ReplicaView,
    ResetMonitor,
)

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
