"""The healing loop as one pure function: `plan(state, observation, settings) -> (state, actions)`.

Called by the controller on every pass, live and in rehearsal; knows no Ray, no torch, no clock and no disk. It is
level-triggered: each pass compares what is wanted with what is observed, so lost, late and repeated messages change
nothing, and an action is asked for again until its effect is seen. A pass does, in this order:

1. count: labels that tell a new version from the old one;
2. revert: whatever makes it worse is taken back first, also when paused;
3. obey: commands of people;
4. advance: the open episode's phase, by the table `PHASES`; at most one transition a pass, nothing when paused;
5. upkeep: what must hold in any phase (`stable.json` is current, the monitor forgets what was answered).

    watching -> diagnosing -> searching -> gating -> (awaiting_approval) -> canary -> rolling -> baking -> watching

Every phase may also end in watching, with a verdict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from orchestrator import confirm
from orchestrator.commands import handle_commands
from orchestrator.gating import await_approval, judge_candidate, refuse
from orchestrator.messages import (
    BASE,
    Diagnosis,
    Kind,
    Mode,
    Phase,
    SearchStatus,
    Verdict,
)
from orchestrator.release import await_acks, bake, canary_trouble, watch_canary
from orchestrator.settings import HealSettings
from orchestrator.state import (
    NO_SEARCH,
    Action,
    LaunchSearch,
    Observation,
    PublishStable,
    Record,
    ResetMonitor,
    State,
)
from orchestrator.transitions import (
    Outcome,
    abort,
    close,
    enter,
    news,
    next_generation,
    open_episode,
    search_id,
    search_request,
    update_episode,
)

__all__ = ["NO_SEARCH", "PHASES", "adopt_base", "plan", "search_id"]

SEARCH_ATTEMPTS = 2  # a search that failed is tried once more: workers get preempted
SEARCH_GRACE_S = 120.0  # beside twice the budget: cold start of trial workers on a full machine takes this long
DIAGNOSIS_TIMEOUT_S = 3600.0  # traffic so thin that an hour does not fill the buffer cannot be searched on
RETURNED = "the traffic looks like the reference again: base restored"

# Contract 3.6. Kinds that are not here are searched for.
ANSWERS: dict[Kind, tuple[Verdict, str]] = {
    Kind.NONE: (Verdict.NO_DRIFT, "no drift found"),
    Kind.OUTAGE: (Verdict.REFUSED, "an outage is repaired, not learned: restart what is down"),
    Kind.REPLICA_FAULT: (Verdict.REFUSED, "one replica is faulty: restart it"),
    Kind.SUSPICIOUS_SOURCE: (Verdict.REFUSED, "a suspicious source must not teach the model: quarantine it"),
    Kind.DATA_QUALITY: (Verdict.REFUSED, "broken inputs are mended at their source, not learned"),
    Kind.COVARIATE_BENIGN: (Verdict.NO_ACTION, "the drift does no harm worth a change"),
    Kind.CONCEPT: (Verdict.REFUSED, "what the classes mean has changed: needs labels and a person"),
    Kind.UNKNOWN: (Verdict.REFUSED, "no known kind of drift fits: a person must look"),
}


def plan(state: State, observation: Observation, settings: HealSettings) -> tuple[State, tuple[Action, ...]]:
    """One pass of the loop.

    Args:
        state: what the last pass returned, as journaled.
        observation: the world now; `search` and `gate` are of `search_id(state)` and `state.candidate`.
        settings: the service's settings; the mode in force is the state's.

    Returns:
        The state to journal before anything else, and the actions to run then, in order. Equal arguments give equal
        results; a pass without news returns an equal state and no `Record`.
    """
    # A label is observed once: the entry that counts it must hold the state, so the pass does nothing else.
    after, actions = confirm.count_labels(state, observation)
    if not actions:
        after, actions = _revert(state, observation, settings)
    if not actions:
        after, actions = handle_commands(state, observation, settings)
        moved = (after.phase, after.generation) != (state.phase, state.generation)
        if not moved and not after.paused:
            after, more = PHASES[after.phase](after, observation, settings)
            actions = (*actions, *more)
    return after, (*actions, *_upkeep(after, observation, actions))


def adopt_base(state: State, base: str) -> State:
    """Another base model was deployed: serve it, bare, under a fresh generation.

    No adapter outlives its base. An open episode is closed as aborted by the next pass, which knows the time.
    """
    episode = state.episode
    if episode is not None:
        reason = f"the base model changed from {state.base} to {base}"
        episode = replace(episode, verdict=Verdict.ABORTED, reason=reason)
    return replace(
        state,
        base=base,
        generation=next_generation(state),
        stable=BASE,
        phase=Phase.WATCHING,
        episode=episode,
        candidate=None,
        cohort=(),
        previous=None,
        test=None,
        promoted=(),
        cooldown_until_s=0.0,
    )


# ---------------------------------------------------------------- 2. revert


def _revert(state: State, observation: Observation, settings: HealSettings) -> Outcome:
    """Take back what makes it worse; no actions when nothing does."""
    episode = state.episode
    if state.phase is Phase.WATCHING and episode is not None:  # left open by `adopt_base`
        state, actions = close(state, observation, settings, episode.verdict or Verdict.ABORTED, episode.reason)
        return replace(state, cooldown_until_s=0.0), actions  # nothing is known against the new base
    alarm = news(state, observation.alarm)
    if alarm is not None and alarm.returned and state.mode is not Mode.OBSERVE and state.phase is not Phase.BAKING:
        return _restore_base(state, observation, settings)
    trouble = ""
    if state.phase is Phase.CANARY:
        trouble = canary_trouble(state, observation, settings)
    elif state.phase in (Phase.ROLLING, Phase.BAKING):
        trouble = observation.canary_anomaly or confirm.harm(state)
    if trouble:
        return abort(state, observation, settings, trouble)
    return confirm.take_back(state, observation, settings)


def _restore_base(state: State, observation: Observation, settings: HealSettings) -> Outcome:
    """The old world is back: the base serves it best. One pass, one closed episode."""
    actions: tuple[Action, ...] = ()
    alarm = observation.alarm
    assert alarm is not None
    if state.episode is None:
        state, actions = open_episode(state, observation, settings, alarm)
        state = update_episode(state, diagnosis=Diagnosis(Kind.NONE, RETURNED, alarm.instances))
    was = state.stable
    # A canary's generation counts as given out, so that it takes part in `next_generation` before it is dropped.
    restored = replace(state, generation=next_generation(state), stable=BASE, previous=was, test=None)
    body = {"generation": restored.generation, "digest": BASE, "previous": was, "reason": RETURNED}
    state, more = close(restored, observation, settings, Verdict.HEALED, RETURNED)
    return state, (*actions, Record("restored", body), *more)


# ---------------------------------------------------------------- 4. advance


def _watching(state: State, observation: Observation, settings: HealSettings) -> Outcome:
    alarm = news(state, observation.alarm)
    if alarm is None or observation.now_s < state.cooldown_until_s:
        return state, ()
    state, actions = open_episode(state, observation, settings, alarm)
    if not alarm.returned:
        return state, actions
    # Only in observe mode: the other modes have restored the base by now.
    state = update_episode(state, diagnosis=Diagnosis(Kind.NONE, RETURNED, alarm.instances))
    reason = "observe mode: would have restored the base: the traffic looks like the reference again"
    state, more = close(state, observation, settings, Verdict.NO_ACTION, reason)
    return state, (*actions, *more)


def _diagnosing(state: State, observation: Observation, settings: HealSettings) -> Outcome:
    """Wait for the diagnosis, answer by the table, else wait for the buffer.

    While the buffer fills the diagnosis is made again on all there is: what starts a search is the last word, and a
    broken pipeline that hides under a drift may take more instances to tell than the drift itself.
    """
    episode = state.episode
    assert episode is not None
    diagnosis = observation.diagnosis or episode.diagnosis
    if diagnosis is None:
        if observation.traffic_ended:
            return refuse(state, observation, settings, _too_little(observation, "diagnosis", settings))
        if observation.now_s - episode.phase_s > DIAGNOSIS_TIMEOUT_S:
            reason = f"no diagnosis in {DIAGNOSIS_TIMEOUT_S:.0f} s: {_too_little(observation, 'diagnosis', settings)}"
            return close(state, observation, settings, Verdict.ERROR, reason)
        return state, ()
    actions: tuple[Action, ...] = ()
    if episode.diagnosis is None or episode.diagnosis.kind is not diagnosis.kind:
        body = {"episode": episode.id, "kind": diagnosis.kind.value, "reason": diagnosis.reason}
        figures = {"instances": diagnosis.instances, "estimated_loss": diagnosis.estimated_loss}
        actions = (Record("diagnosed", body | figures),)
        state = update_episode(state, diagnosis=diagnosis)
    state, more = _answer(state, observation, settings, diagnosis)
    return state, (*actions, *more)


def _answer(state: State, observation: Observation, settings: HealSettings, diagnosis: Diagnosis) -> Outcome:
    episode = state.episode
    assert episode is not None
    if diagnosis.kind in ANSWERS:
        verdict, answer = ANSWERS[diagnosis.kind]
        return close(state, observation, settings, verdict, f"{answer} ({diagnosis.reason})")
    if state.mode is Mode.OBSERVE:
        reason = f"observe mode: would have searched for an adapter against {diagnosis.kind} ({diagnosis.reason})"
        return close(state, observation, settings, Verdict.NO_ACTION, reason)
    waited_s, least = observation.now_s - episode.phase_s, settings.min_buffer_instances
    enough = observation.buffered >= least and (waited_s >= settings.buffer_wait_s or observation.traffic_ended)
    if enough or observation.buffered >= settings.buffer_instances:
        state = update_episode(state, until_s=observation.now_s, diagnosis=diagnosis)
        return enter(state, observation, Phase.SEARCHING, kind=diagnosis.kind.value, buffered=observation.buffered)
    if observation.traffic_ended or waited_s > DIAGNOSIS_TIMEOUT_S:
        return refuse(state, observation, settings, _too_little(observation, "search", settings))
    return state, ()


def _too_little(observation: Observation, purpose: str, settings: HealSettings) -> str:
    needed = settings.min_buffer_instances if purpose == "search" else settings.diagnosis_instances
    name = "min_buffer_instances" if purpose == "search" else "diagnosis_instances"
    end = "the traffic ended" if observation.traffic_ended else "the traffic is too thin"
    return f"too little to go on for a {purpose}: {end} with {observation.buffered} of {name} {needed}"


def _searching(state: State, observation: Observation, settings: HealSettings) -> Outcome:
    episode, search = state.episode, observation.search
    assert episode is not None
    if search.state == "finished":
        return _take_winner(state, observation, settings)
    if search.state == "failed":
        return _retry(state, observation, settings)
    limit_s = 2 * settings.search_budget_s + SEARCH_GRACE_S
    if observation.now_s - episode.phase_s > limit_s:
        reason = f"search took {observation.now_s - episode.phase_s:.0f} s > {limit_s:.0f} s"
        return close(state, observation, settings, Verdict.ERROR, reason)
    if search.state == "absent":
        return state, (LaunchSearch(search_request(state, observation, settings)),)
    return state, ()


def _take_winner(state: State, observation: Observation, settings: HealSettings) -> Outcome:
    search: SearchStatus = observation.search
    trial = next((t for t in search.trials if t.trial_id == search.winner_trial), None)
    state = update_episode(state, search=search, winner=search.winner, winner_trial=trial)
    if search.winner in (None, BASE):
        return refuse(state, observation, settings, search.message or "no trial beats the base")
    if search.winner == state.stable:
        return refuse(state, observation, settings, f"the search found what is served already: {state.stable}")
    return enter(replace(state, candidate=search.winner), observation, Phase.GATING, candidate=search.winner)


def _retry(state: State, observation: Observation, settings: HealSettings) -> Outcome:
    episode, message = state.episode, observation.search.message
    assert episode is not None
    if episode.attempt >= SEARCH_ATTEMPTS:
        state = update_episode(state, search=observation.search)
        reason = f"the search failed {episode.attempt} times: {message}"
        return close(state, observation, settings, Verdict.ERROR, reason)
    body = {"episode": episode.id, "attempt": episode.attempt + 1, "message": message}
    return update_episode(state, attempt=episode.attempt + 1), (Record("search_retried", body),)


PHASES: dict[Phase, Callable[[State, Observation, HealSettings], Outcome]] = {
    Phase.WATCHING: _watching,
    Phase.DIAGNOSING: _diagnosing,
    Phase.SEARCHING: _searching,
    Phase.GATING: judge_candidate,
    Phase.AWAITING_APPROVAL: await_approval,
    Phase.CANARY: watch_canary,
    Phase.ROLLING: await_acks,
    Phase.BAKING: bake,
}


# ---------------------------------------------------------------- 5. upkeep


def _upkeep(state: State, observation: Observation, planned: tuple[Action, ...]) -> tuple[Action, ...]:
    """What must hold in every phase and is asked for until it does."""
    actions: list[Action] = []
    if observation.stable_published != (state.generation, state.stable):
        actions.append(PublishStable(state.generation, state.stable))
    stale = observation.alarm is not None and news(state, observation.alarm) is None
    if stale and state.episode is None and not any(isinstance(a, ResetMonitor) for a in planned):
        actions.append(ResetMonitor(state.stable))
    return tuple(actions)
