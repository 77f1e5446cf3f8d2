"""The phases in which a candidate is served: canary, rolling, baking. Pure; called by `healing`.

A canary that is lost, restarts, cannot apply its target, errs or answers oddly takes the candidate back, and so does
time: what cannot be shown to work is not rolled out.
"""

from __future__ import annotations

from dataclasses import replace

from orchestrator.canary import Bet
from orchestrator.confirm import harm
from orchestrator.messages import Verdict
from orchestrator.rollout import acked, applied, live
from orchestrator.settings import HealSettings, parse_steps
from orchestrator.state import Canary, Observation, Record, ReplicaView, State
from orchestrator.transitions import Outcome, abort, close, enter_rolling, promote, update_episode, widen_canary

SETTLE_HEARTBEATS = 3  # an orchestrator that just started has heard from all replicas after this many heartbeats


def canary_trouble(state: State, observation: Observation, settings: HealSettings) -> str:
    """Why the canary must not go on, in words; empty when all is well."""
    assert state.episode is not None
    if not state.episode.canaries:
        return "the journal is of a release that watched its canary otherwise"
    troubles = (_trouble(state, canary, observation, settings) for canary in state.episode.canaries)
    first = next(filter(None, troubles), "")
    if first or not observation.canary_anomaly:
        return first or harm(state)
    return f"canary {_names(state.episode.canaries)}: {observation.canary_anomaly}"


def _trouble(state: State, canary: Canary, observation: Observation, settings: HealSettings) -> str:
    episode = state.episode
    assert episode is not None
    tag, now_s, view = canary.tag, observation.now_s, _view(state, canary, observation)
    heard_s = max(observation.observing_since_s, episode.phase_s) if view is None else view.last_seen_s
    if now_s - heard_s > settings.replica_lost_s:
        return f"canary {tag} lost: silent for {now_s - heard_s:.1f} s > {settings.replica_lost_s:.1f} s"
    if view is None:
        return ""
    if view.incarnation != canary.incarnation:
        return f"canary {tag} restarted"
    if view.failure:
        return f"canary {tag} could not apply generation {state.candidate_generation}: {view.failure}"
    if canary.acked_s is not None and view.errors > canary.errors:
        return f"canary {tag}: {view.errors - canary.errors} new errors > 0"
    return ""


def _view(state: State, canary: Canary, observation: Observation) -> ReplicaView | None:
    return next((r for r in observation.replicas if r.tag == canary.tag and r.base in ("", state.base)), None)


def _names(canaries: tuple[Canary, ...]) -> str:
    return ", ".join(canary.tag for canary in canaries)


def watch_canary(state: State, observation: Observation, settings: HealSettings) -> Outcome:
    """Wait for the canaries' acks, then for their traffic, step by step; labels that prove the gain end the wait.

    `_revert` has seen to all that is wrong with them.
    """
    assert state.episode is not None
    if state.test is not None and state.test.outcome is Bet.BETTER:
        return enter_rolling(state, observation, f"labels: {state.test.inequality()}")
    if not state.episode.step_s:
        return _await_canaries(state, observation, settings)
    return _await_traffic(state, observation, settings)


def _await_canaries(state: State, observation: Observation, settings: HealSettings) -> Outcome:
    episode, now_s = state.episode, observation.now_s
    assert episode is not None
    acked, records = [], []
    for canary in episode.canaries:
        view = _view(state, canary, observation)
        if canary.acked_s is None and view is not None and applied(state, view):
            canary = replace(canary, acked_s=now_s, instances=view.instances, errors=view.errors)
            body = {"episode": episode.id, "canary": view.tag, "generation": view.generation}
            records.append(Record("canary_acked", body))
        acked.append(canary)
    if records:
        complete = all(c.acked_s is not None for c in acked)
        if complete:  # the step's instances count from here, those of earlier canaries too
            acked = [_counted_anew(state, canary, observation) for canary in acked]
        return update_episode(state, canaries=tuple(acked), step_s=now_s if complete else 0.0), tuple(records)
    if now_s - episode.phase_s <= settings.canary_max_s:
        return state, ()
    late = tuple(canary for canary in episode.canaries if canary.acked_s is None)
    reason = (
        f"canary {_names(late)} did not apply generation {state.candidate_generation} in {settings.canary_max_s:.0f} s"
    )
    return abort(state, observation, settings, reason)


def _counted_anew(state: State, canary: Canary, observation: Observation) -> Canary:
    view = _view(state, canary, observation)
    return canary if view is None else replace(canary, instances=view.instances)


def _await_traffic(state: State, observation: Observation, settings: HealSettings) -> Outcome:
    """The next step after enough instances and time in this one; inconclusive where traffic stays away."""
    episode = state.episode
    assert episode is not None
    served = 0
    for canary in episode.canaries:
        view = _view(state, canary, observation)
        served += view.instances - canary.instances if view is not None else 0
    waited_s, wanted = observation.now_s - episode.step_s, settings.canary_instances
    if served >= wanted and waited_s >= settings.canary_step_s:
        return _next_step(state, observation, settings, f"canary served {served} >= {wanted} instances")
    if served < wanted and waited_s > settings.canary_max_s + settings.canary_step_s:
        limit_s = settings.canary_max_s + settings.canary_step_s
        reason = f"inconclusive: canary served {served} < {wanted} instances in {limit_s:.0f} s"
        return abort(state, observation, settings, reason)
    return state, ()


def _next_step(state: State, observation: Observation, settings: HealSettings, why: str) -> Outcome:
    """The first later step that has replicas to add; all replicas where none has."""
    assert state.episode is not None
    for step in range(state.episode.canary_step + 1, len(parse_steps(settings.canary_steps))):
        wider, records = widen_canary(state, observation, settings, step)
        if records:
            return wider, records
    return enter_rolling(state, observation, why)


def await_acks(state: State, observation: Observation, settings: HealSettings) -> Outcome:
    """Promote when every live replica serves the candidate; take it back when one cannot in time."""
    assert state.episode is not None
    now_s = observation.now_s
    settled = now_s - observation.observing_since_s >= SETTLE_HEARTBEATS * settings.heartbeat_s
    if settled and acked(state, observation.replicas, now_s, settings):
        return promote(state, observation)
    if now_s - state.episode.phase_s <= settings.roll_timeout_s:
        return state, ()
    late = [r for r in live(state, observation.replicas, now_s, settings) if not applied(state, r)]
    names = ", ".join(f"{r.tag} ({r.failure})" if r.failure else r.tag for r in late) or "no live replica"
    reason = f"generation {state.candidate_generation} not applied in {settings.roll_timeout_s:.0f} s by: {names}"
    return abort(state, observation, settings, reason)


def bake(state: State, observation: Observation, settings: HealSettings) -> Outcome:
    """Watch what was promoted. An adapter that cannot be watched could never be taken back, so it is not kept."""
    episode = state.episode
    assert episode is not None
    waited_s = observation.now_s - episode.phase_s
    if not observation.monitor_ready:
        if waited_s <= max(settings.bake_s, settings.roll_timeout_s):
            return state, ()
        return abort(state, observation, settings, f"no drift baseline of {state.stable} in {waited_s:.0f} s")
    if waited_s < settings.bake_s:
        return state, ()
    message = episode.gate.message if episode.gate else ""
    label = "provisional until labels confirm it: " if episode.provisional else "confirmed by labels: "
    if state.test is not None and state.test.outcome is Bet.BETTER:
        message = f"{state.test.inequality()}; {message}"
    return close(state, observation, settings, Verdict.HEALED, label + message)
