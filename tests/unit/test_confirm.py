"""Labels on what two versions answer differently: they promote, confirm, abort and revert."""

from __future__ import annotations

import pytest
from healing_loop import Loop, closed_as, restored

from orchestrator.canary import Bet
from orchestrator.messages import BASE, Mode, Phase, Verdict
from orchestrator.rollout import comparison, target
from orchestrator.state import Decided, State


def labels(wins: int, losses: int = 0, digest: str = "d1", against: str = BASE) -> tuple[Decided, ...]:
    outcomes = [True] * wins + [False] * losses
    return tuple(Decided(f"i{n}", digest, won, against, not won) for n, won in enumerate(outcomes))


def test_a_candidate_begins_a_test_against_what_is_stable() -> None:
    test = Loop().to(Phase.CANARY).state.test
    assert test is not None
    assert (test.digest, test.against, test.alpha, test.outcome) == ("d1", BASE, 0.01, Bet.UNDECIDED)


def test_labels_that_prove_the_gain_end_the_canary_before_its_traffic_does() -> None:
    loop = Loop().to(Phase.CANARY).step()
    loop.step(decided=labels(12))
    assert (loop.state.phase, loop.records[-1].event) == (Phase.CANARY, "confirmed"), "a pass that counts does no more"
    assert loop.step().state.phase is Phase.ROLLING
    loop.step(after_s=2).step(after_s=6)
    closed_as(loop, Verdict.HEALED, "confirmed by labels", "9 wins, 0 losses", ">= 100")
    assert loop.state.last_verdict is not None
    assert not loop.state.last_verdict["provisional"]
    assert loop.state.tests_won == 1


def test_labels_that_show_harm_abort_the_canary() -> None:
    loop = Loop().to(Phase.CANARY).step()
    loop.step(decided=labels(0, 9)).step()
    closed_as(loop, Verdict.ABORTED, "labels: 0 wins, 7 losses")
    restored(loop)
    assert loop.state.test is None


@pytest.mark.parametrize("phase", [Phase.ROLLING, Phase.BAKING])
def test_labels_that_show_harm_take_back_what_is_being_rolled_out(phase: Phase) -> None:
    loop = Loop().to(phase).step(after_s=0.1, follow=phase is Phase.BAKING, decided=labels(0, 9)).step(after_s=0.1)
    closed_as(loop, Verdict.ABORTED, "evidence of harm")
    restored(loop)


def test_labels_of_another_comparison_and_of_two_wrong_answers_decide_nothing() -> None:
    loop = Loop().to(Phase.CANARY).step()
    loop.step(decided=(*labels(30, digest="d0"), *labels(30, against="d0")))
    assert loop.state.phase is Phase.CANARY
    loop.step(decided=tuple(Decided(f"i{n}", "d1", False, BASE, False) for n in range(30)))
    assert loop.state.test is not None
    assert (loop.state.test.wins, loop.state.test.losses, loop.state.phase) == (0, 0, Phase.CANARY)


def test_a_provisional_promotion_goes_on_being_tested_until_labels_confirm_it() -> None:
    loop = Loop().heal()
    assert loop.state.last_verdict is not None
    assert loop.state.last_verdict["provisional"]
    assert comparison(loop.state, "r2", loop.settings) == (BASE, loop.settings.confirm_share)
    assert BASE in target(loop.state, "r2").versions
    loop.step(decided=labels(6)).step(after_s=86400, decided=labels(6))
    assert not loop.state.last_verdict["provisional"]
    assert loop.records[-1].event == "confirmed"
    assert comparison(loop.state, "r2", loop.settings) == ("", 0.0)
    assert loop.state.stable == "d1"


def test_a_provisional_promotion_that_labels_contradict_is_reverted_on_every_replica() -> None:
    loop = Loop().heal()
    loop.step(after_s=3600, decided=labels(1, 12))
    assert loop.records[-1].event == "contradicted"
    loop.step()
    assert loop.records[-1].event == "reverted"
    assert loop.state.last_verdict is not None
    assert loop.state.last_verdict["verdict"] == "aborted"
    assert "1 wins, 10 losses" in loop.state.last_verdict["reason"]
    assert loop.state.promoted == ()
    restored(loop)


def test_what_labels_contradict_is_reverted_in_the_middle_of_the_next_episode_too() -> None:
    loop = Loop().heal().to(Phase.SEARCHING).step(decided=labels(0, 12)).step()
    closed_as(loop, Verdict.ABORTED, "evidence of harm")
    assert loop.state.stable == BASE


def test_observe_mode_reverts_nothing_by_itself() -> None:
    loop = Loop().heal()
    loop.command("mode", Mode.OBSERVE.value)
    assert loop.step(decided=labels(0, 12)).step().state.stable == "d1"
    assert loop.records[-1].event == "contradicted"
    loop.command("mode", Mode.AUTO.value)
    assert loop.step().state.stable == BASE


def test_the_budget_is_spent_over_the_life_of_the_service() -> None:
    loop = Loop().heal()
    loop.command("rollback", BASE)
    loop.step(after_s=700)
    loop.to(Phase.CANARY)
    assert loop.state.test is not None
    assert loop.state.test.alpha == pytest.approx(0.01 / 4)
    assert State.from_dict(loop.state.to_dict()).test == loop.state.test


# ---------------------------------------------------------------- steps


def serving(loop: Loop, per_replica: int) -> None:
    for tag in loop.state.cohort:
        loop.serve(tag, instances=loop.replicas[tag].instances + per_replica)
    loop.step()


def test_a_canary_widens_step_by_step_before_everyone_follows() -> None:
    loop = Loop(num_replicas=8, canary_steps="1, 25%, 50%", canary_step_s=10).to(Phase.CANARY).step()
    serving(loop, 64)
    assert loop.state.cohort == ("r0",), "the step lasts ten seconds at least"
    loop.step(after_s=10)
    assert loop.state.cohort == ("r0", "r1")
    loop.step()  # ack
    assert loop.step(after_s=10).state.cohort == ("r0", "r1"), "what r0 served before counts no more"
    serving(loop, 32)
    assert loop.step(after_s=10).state.cohort == ("r0", "r1", "r2", "r3")
    loop.step()
    serving(loop, 16)
    assert loop.step(after_s=10).state.phase is Phase.ROLLING
    assert [r.event for r in loop.records].count("canary_widened") == 2


def test_a_busy_first_canary_does_not_pay_for_the_next_step() -> None:
    loop = Loop(num_replicas=8).to(Phase.CANARY).step()
    serving(loop, 5000)
    loop.step().step()
    assert (loop.state.phase, loop.state.cohort) == (Phase.CANARY, ("r0", "r1"))
    serving(loop, 32)
    assert loop.state.phase is Phase.ROLLING


def test_a_canary_of_an_older_release_is_taken_back() -> None:
    loop = Loop().to(Phase.CANARY)
    values = loop.state.to_dict()
    values["episode"]["canary_tag"] = "r0"
    del values["episode"]["canaries"], values["test"]
    loop.state = State.from_dict(values)
    closed_as(loop.step(), Verdict.ABORTED, "the journal is of a release")
    restored(loop)


def test_any_canary_in_trouble_takes_back_all() -> None:
    loop = Loop(num_replicas=8).to(Phase.CANARY).step()
    serving(loop, 64)
    assert loop.state.cohort == ("r0", "r1")
    loop.step()
    loop.serve("r1", errors=1)
    closed_as(loop.step(), Verdict.ABORTED, "canary r1: 1 new errors > 0")
    restored(loop)


def test_a_step_that_adds_no_replica_is_skipped() -> None:
    loop = Loop(num_replicas=3).to(Phase.CANARY).step()
    serving(loop, 64)
    assert loop.state.phase is Phase.ROLLING


def test_a_later_canary_that_never_acks_is_named() -> None:
    loop = Loop(num_replicas=8).to(Phase.CANARY).step()
    loop.stuck = {"r1"}
    serving(loop, 64)
    closed_as(loop.step(after_s=61), Verdict.ABORTED, "canary r1 did not apply generation 1 in 60 s")
