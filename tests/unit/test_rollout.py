"""Which replica serves what."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.canary import PairedTest
from orchestrator.messages import BASE, Target
from orchestrator.rollout import acked, applied, choose_canaries, comparison, live, target, versions
from orchestrator.settings import HealSettings
from orchestrator.state import ALL_REPLICAS, ReplicaView, State

SETTINGS = HealSettings(replica_lost_s=10)
STABLE = State(base="b0", generation=4, stable="d1", previous="d0")
CANARY = replace(STABLE, candidate="d2", candidate_generation=5, cohort=("r1",))


def view(tag: str, generation: int = 4, digest: str = "d1", seen_s: float = 100.0, failure: str = "") -> ReplicaView:
    return ReplicaView(tag, "i", generation, digest, seen_s, failure=failure, base="b0")


def test_without_a_rollout_every_replica_serves_stable() -> None:
    assert target(STABLE, "r1") == Target(4, "d1", (BASE, "d1", "d0"), "stable")


def test_only_the_cohort_serves_the_candidate_and_all_keep_it_warm() -> None:
    assert target(CANARY, "r1") == Target(5, "d2", (BASE, "d1", "d2", "d0"), "canary")
    assert target(CANARY, "r2") == Target(4, "d1", (BASE, "d1", "d2", "d0"), "stable")


def test_while_rolling_also_a_new_replica_serves_the_candidate() -> None:
    assert target(replace(CANARY, cohort=ALL_REPLICAS), "born just now").digest == "d2"


def test_a_candidate_before_the_gate_is_neither_served_nor_listed() -> None:
    gating = replace(STABLE, candidate="d2")
    assert target(gating, "r1").digest == "d1"
    assert "d2" not in versions(gating)


def test_versions_name_nothing_twice() -> None:
    assert versions(replace(STABLE, stable=BASE, previous=BASE)) == (BASE,)


def test_acked_when_every_live_replica_applied_generation_and_digest() -> None:
    rolling = replace(CANARY, cohort=ALL_REPLICAS)
    done, late = view("r1", 5, "d2"), view("r2")
    assert acked(rolling, (done, view("r2", 5, "d2")), 101, SETTINGS)
    assert not acked(rolling, (done, late), 101, SETTINGS)
    assert not acked(rolling, (done, view("r2", 5, "d9")), 101, SETTINGS)


def test_lost_replicas_are_ignored_but_none_alive_is_no_ack() -> None:
    rolling = replace(CANARY, cohort=ALL_REPLICAS)
    assert acked(rolling, (view("r1", 5, "d2"), view("r2", seen_s=80)), 101, SETTINGS)
    assert not acked(rolling, (view("r1", 5, "d2", seen_s=80),), 101, SETTINGS)
    assert not acked(rolling, (), 101, SETTINGS)


def test_replicas_of_another_base_are_not_of_this_rollout() -> None:
    other = replace(view("r0"), base="b9")
    assert live(STABLE, (other, view("r1")), 101, SETTINGS) == (view("r1"),)


def tags(state: State, replicas: tuple[ReplicaView, ...], step: int = 0, steps: str = "1, 25%") -> list[str]:
    return [r.tag for r in choose_canaries(state, replicas, 101, replace(SETTINGS, canary_steps=steps), step)]


def test_the_canary_is_the_smallest_live_tag_and_healthy_if_any_is() -> None:
    replicas = (view("r2"), view("r0", seen_s=1), view("r1", failure="disk full"), view("r3"))
    assert tags(STABLE, replicas) == ["r2"]
    assert tags(STABLE, (view("r1", failure="disk full"),)) == ["r1"]
    assert tags(STABLE, ()) == []


def test_later_steps_widen_the_cohort_by_number_or_by_share_of_the_live() -> None:
    replicas = tuple(view(f"r{n}") for n in range(1, 10))
    assert tags(CANARY, replicas, step=1) == ["r1", "r2", "r3"]
    assert tags(replace(CANARY, cohort=("r9",)), replicas, step=1) == ["r9", "r1", "r2"]
    assert tags(CANARY, replicas, step=2, steps="1, 2, 100%") == [f"r{n}" for n in range(1, 10)]


def test_the_canary_is_compared_with_stable_and_what_was_promoted_with_what_it_replaced() -> None:
    testing = replace(CANARY, test=PairedTest("d2", "d1", 0.01))
    assert comparison(testing, "r1", SETTINGS) == ("d1", SETTINGS.compare_share)
    assert comparison(testing, "r2", SETTINGS) == ("", 0.0)
    promoted = replace(STABLE, stable="d2", previous="d1", test=PairedTest("d2", "d1", 0.01))
    assert comparison(promoted, "r2", SETTINGS) == ("d1", SETTINGS.confirm_share)
    assert comparison(replace(promoted, test=PairedTest("d2", "d1", 0.01, wins=40)), "r2", SETTINGS) == ("", 0.0)
    assert comparison(STABLE, "r2", SETTINGS) == ("", 0.0)


def test_applied_means_generation_and_digest_of_its_own_target() -> None:
    assert applied(CANARY, view("r1", 5, "d2"))
    assert applied(CANARY, view("r2"))
    assert not applied(CANARY, view("r1"))
