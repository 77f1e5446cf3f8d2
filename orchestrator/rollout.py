"""Which replica serves what. Pure; called by the controller for every heartbeat and by `healing` for every pass.

Replicas pull: they send what they serve and get a `Target` back. A replica ignores a target older than what it has, so
every change of mind, also a rollback, is a new generation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from orchestrator.canary import Bet
from orchestrator.messages import BASE, Target
from orchestrator.settings import HealSettings, parse_steps
from orchestrator.state import ALL_REPLICAS, ReplicaView, State


def in_cohort(state: State, replica_tag: str) -> bool:
    """Whether this replica is told to serve the candidate."""
    return state.candidate is not None and (state.cohort == ALL_REPLICAS or replica_tag in state.cohort)


def versions(state: State) -> tuple[str, ...]:
    """Digests that every replica serves on request and keeps warm: base, stable, candidate, previous; no repeats.

    A candidate counts from the moment a replica may serve it, so not while it is still before the gate.
    """
    wanted = (BASE, state.stable, state.candidate if state.cohort else None, state.previous)
    return tuple(dict.fromkeys(digest for digest in wanted if digest is not None))


def target(state: State, replica_tag: str) -> Target:
    """What one replica should serve. The caller adds the feedback key and the `comparison`."""
    if in_cohort(state, replica_tag):
        assert state.candidate is not None
        cohort = "stable" if state.cohort == ALL_REPLICAS else "canary"
        return Target(state.candidate_generation, state.candidate, versions(state), cohort)
    return Target(state.generation, state.stable, versions(state), "stable")


def live(
    state: State, replicas: Iterable[ReplicaView], now_s: float, settings: HealSettings
) -> tuple[ReplicaView, ...]:
    """The replicas of this base that spoke within `replica_lost_s`, by tag."""
    return tuple(
        sorted(
            (r for r in replicas if now_s - r.last_seen_s <= settings.replica_lost_s and r.base in ("", state.base)),
            key=lambda r: r.tag,
        )
    )


def applied(state: State, replica: ReplicaView) -> bool:
    """Whether this replica serves exactly what it was told to."""
    wanted = target(state, replica.tag)
    return (replica.generation, replica.digest) == (wanted.generation, wanted.digest)


def acked(state: State, replicas: Iterable[ReplicaView], now_s: float, settings: HealSettings) -> bool:
    """Whether every live replica serves its target. Lost ones are ignored; with none alive the answer is no."""
    alive = live(state, replicas, now_s, settings)
    return bool(alive) and all(applied(state, replica) for replica in alive)


def choose_canaries(
    state: State, replicas: Iterable[ReplicaView], now_s: float, settings: HealSettings, step: int
) -> tuple[ReplicaView, ...]:
    """The live replicas of a canary step: healthy ones before those that report a failure, then by tag.

    Args:
        state: its cohort stays in.
        replicas: as last heard of.
        now_s: seconds since the epoch.
        settings: `canary_steps`.
        step: from 0.
    """
    alive = live(state, replicas, now_s, settings)
    size = parse_steps(settings.canary_steps)[step]
    wanted = math.ceil(size * len(alive)) if isinstance(size, float) else size
    return tuple(sorted(alive, key=lambda r: (r.tag not in state.cohort, bool(r.failure), r.tag))[:wanted])


def comparison(state: State, replica_tag: str, settings: HealSettings) -> tuple[str, float]:
    """What a replica's served version is compared with, and on which share of requests; "" and 0 for nothing."""
    test = state.test
    if test is None or test.outcome is not Bet.UNDECIDED or test.full:
        return "", 0.0
    if in_cohort(state, replica_tag) and state.candidate == test.digest:
        return test.against, settings.compare_share
    return (test.against, settings.confirm_share) if state.stable == test.digest else ("", 0.0)
