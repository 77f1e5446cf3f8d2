"""The phases in which a candidate is served: canary, rolling, baking. Pure; called by `healing`.

A canary that is lost, restarts, cannot apply its target, errs or answers oddly takes the candidate back, and so does
time: what cannot be shown to work is not rolled out.
"""

from __future__ import annotations

from orchestrator.messages import Verdict
from orchestrator.rollout import acked, applied, live
from orchestrator.settings import HealSettings
from orchestrator.state import Observation, Record, ReplicaView, State
from orchestrator.transitions import Outcome, abort, close, enter_rolling, promote, update_episode

SETTLE_HEARTBEATS = 3  # an orchestrator that just started has heard from all replicas after this many heartbeats


def canary_trouble(state: State, observation: Observation, settings: HealSettings) -> str:
    """Why the canary must not go on, in words; empty when all is well."""
    episode = state.episode
    assert episode is not None
    tag, now_s = episode.canary_tag, observation.now_s
    view = _canary(state, observation)
    heard_s = max(observation.observing_since_s, episode.phase_s) if view is None else view.last_seen_s
    if now_s - heard_s > settings.replica_lost_s:
        return f"canary {tag} lost: silent for {now_s - heard_s:.1f} s > {settings.replica_lost_s:.1f} s"
    if view is None:
        return ""
    if view.incarnation != episode.canary_incarnation:
        return f"canary {tag} restarted"
    if view.failure:
        return f"canary {tag} could not apply generation {state.candidate_generation}: {view.failure}"
    if observation.canary_anomaly:
        return f"canary {tag}: {observation.canary_anomaly}"
    if episode.canary_acked_s is not None and view.errors > episode.canary_errors:
        return f"canary {tag}: {view.errors - episode.canary_errors} new errors > 0"
    return ""


def _canary(state: State, observation: Observation) -> ReplicaView | None:
    assert state.episode is not None
    tag = state.episode.canary_tag
    return next((r for r in observation.replicas if r.tag == tag and r.base in ("", state.base)), None)


def watch_canary(state: State, observation: Observation, settings: HealSettings) -> Outcome:
    """Wait for the canary's ack, then for its traffic. `_revert` has seen to all that is wrong with it."""
    episode, view = state.episode, _canary(state, observation)
    assert episode is not None
    now_s, limit_s = observation.now_s, settings.canary_max_s
    if episode.canary_acked_s is None:
        if view is not None and applied(state, view):
            body = {"episode": episode.id, "canary": view.tag, "generation": view.generation}
            state = update_episode(
                state, canary_acked_s=now_s, canary_instances=view.instances, canary_errors=view.errors
            )
            return state, (Record("canary_acked", body),)
        if now_s - episode.phase_s > limit_s:
            reason = (
                f"canary {episode.canary_tag} did not apply generation {state.candidate_generation} in {limit_s:.0f} s"
            )
            return abort(state, observation, settings, reason)
        return state, ()
    served = view.instances - episode.canary_instances if view is not None else 0
    if served >= settings.canary_instances:
        return enter_rolling(state, observation, f"canary served {served} >= {settings.canary_instances} instances")
    if now_s - episode.canary_acked_s > limit_s:
        reason = f"inconclusive: canary served {served} < {settings.canary_instances} instances in {limit_s:.0f} s"
        return abort(state, observation, settings, reason)
    return state, ()


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
    return close(state, observation, settings, Verdict.HEALED, label + message)
