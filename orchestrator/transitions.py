"""The moves of an episode: open, enter a phase, promote, withdraw, roll back, close. Pure.

`healing` and `commands` decide when; these functions say what each move changes and what it writes into the journal.
They alone hand out generations.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from orchestrator.canary import PairedTest, level
from orchestrator.messages import BASE, Alarm, Phase, SearchRequest, Verdict
from orchestrator.rollout import choose_canaries
from orchestrator.settings import HealSettings
from orchestrator.state import (
    ALL_REPLICAS,
    Action,
    Canary,
    CancelSearch,
    Episode,
    Observation,
    Record,
    ResetMonitor,
    State,
)

Outcome = tuple[State, tuple[Action, ...]]


def search_id(state: State) -> str | None:
    """The id under which the open episode's search runs; None without an episode. A retry is a search of its own."""
    if state.episode is None:
        return None
    return state.episode.id if state.episode.attempt == 1 else f"{state.episode.id}-{state.episode.attempt}"


def next_generation(state: State) -> int:
    """A number that no decision has had."""
    return max(state.generation, state.candidate_generation) + 1


def update_episode(state: State, **changes: Any) -> State:
    """The state with fields of its open episode changed."""
    assert state.episode is not None, f"no open episode in phase {state.phase}"
    return replace(state, episode=replace(state.episode, **changes))


def search_request(state: State, observation: Observation, settings: HealSettings) -> SearchRequest:
    """What the open episode asks of a search; the same on every pass."""
    episode = state.episode
    identity = search_id(state)
    assert episode is not None
    assert episode.diagnosis is not None
    assert identity is not None
    return SearchRequest(
        episode=identity,
        base=state.base,
        storage=observation.storage,
        since_s=episode.since_s,
        until_s=episode.until_s,
        max_instances=settings.buffer_instances,
        labels=settings.labels,
        kind=episode.diagnosis.kind,
        seed=episode.seed,
        budget_s=settings.search_budget_s,
        num_trials=settings.num_trials,
        epochs=settings.trial_epochs,
        trial_device=settings.trial_device,
        recall=episode.recall,
    )


def news(state: State, alarm: Alarm | None) -> Alarm | None:
    """The alarm, unless it was answered before or concerns what is not served any more."""
    if alarm is None or alarm.digest != state.stable or alarm.raised_s < state.monitor_reset_s:
        return None
    return None if alarm.returned and state.stable == BASE else alarm


# ---------------------------------------------------------------- forward


def open_episode(
    state: State, observation: Observation, settings: HealSettings, alarm: Alarm, manual: bool = False
) -> Outcome:
    """From watching to diagnosing."""
    number = state.episodes_opened + 1
    episode = Episode(
        id=f"e{number:04d}",
        opened_s=observation.now_s,
        alarm=alarm,
        manual=manual,
        since_s=alarm.onset_s,
        until_s=observation.now_s,
        seed=settings.seed + number,
    )
    opened = replace(state, episode=episode, episodes_opened=number)
    state, actions = enter(opened, observation, Phase.DIAGNOSING)
    body = {"episode": episode.id, "scope": alarm.scope, "digest": alarm.digest, "manual": manual}
    figures = {"statistic": alarm.statistic, "threshold": alarm.threshold, "onset_s": alarm.onset_s}
    return state, (Record("episode_opened", body | figures), *actions)


def enter(state: State, observation: Observation, phase: Phase, **details: Any) -> Outcome:
    """The next phase of the open episode."""
    assert state.episode is not None
    entered = state.episode.phase_entered | {phase.value: observation.now_s}
    body = {"episode": state.episode.id, "from": state.phase.value, "phase": phase.value} | details
    state = update_episode(replace(state, phase=phase), phase_entered=entered, phase_s=observation.now_s)
    return state, (Record("phase_entered", body),)


def enter_canary(state: State, observation: Observation, settings: HealSettings) -> Outcome | None:
    """Give the gated candidate a generation, its first canaries and a test; None while no replica is alive."""
    assert state.candidate is not None
    chosen = choose_canaries(state, observation.replicas, observation.now_s, settings, 0)
    if not chosen:
        return None
    number = state.tests_begun + 1
    test = PairedTest(state.candidate, state.stable, level(settings.canary_alpha, number, state.tests_won))
    cohort = tuple(view.tag for view in chosen)
    state = replace(state, candidate_generation=next_generation(state), cohort=cohort, test=test, tests_begun=number)
    canaries = tuple(Canary(view.tag, view.incarnation) for view in chosen)
    state = update_episode(state, canaries=canaries, canary_step=0, step_s=0.0, verdict=None, reason="")
    return enter(
        state,
        observation,
        Phase.CANARY,
        canary=", ".join(cohort),
        generation=state.candidate_generation,
        digest=state.candidate,
        alpha=test.alpha,
    )


def widen_canary(state: State, observation: Observation, settings: HealSettings, step: int) -> Outcome:
    """The next step's replicas join those that serve the candidate; none, and no record, where it has no more."""
    episode = state.episode
    assert episode is not None
    chosen = choose_canaries(state, observation.replicas, observation.now_s, settings, step)
    fresh = tuple(Canary(view.tag, view.incarnation) for view in chosen if view.tag not in state.cohort)
    if not fresh:
        return state, ()
    tags = tuple(canary.tag for canary in fresh)
    state = replace(state, cohort=(*state.cohort, *tags))
    canaries = (*episode.canaries, *fresh)
    state = update_episode(state, canaries=canaries, canary_step=step, step_s=0.0, phase_s=observation.now_s)
    body = {"episode": episode.id, "step": step, "canary": ", ".join(tags)}
    return state, (Record("canary_widened", body),)


def enter_rolling(state: State, observation: Observation, why: str) -> Outcome:
    """Every replica is told to serve the candidate."""
    return enter(replace(state, cohort=ALL_REPLICAS), observation, Phase.ROLLING, why=why)


def promote(state: State, observation: Observation) -> Outcome:
    """The candidate, served everywhere, becomes stable; what was stable is kept for a rollback."""
    assert state.candidate is not None
    digest = state.candidate
    state = replace(
        state,
        generation=state.candidate_generation,
        stable=digest,
        previous=state.stable,
        promoted=(*(d for d in state.promoted if d != digest), digest),
        candidate=None,
        cohort=(),
        monitor_reset_s=observation.now_s,
    )
    body = {"generation": state.generation, "digest": digest, "previous": state.previous}
    state, actions = enter(state, observation, Phase.BAKING)
    return state, (Record("promoted", body), *actions, ResetMonitor(digest))


# ---------------------------------------------------------------- back


def abort(
    state: State,
    observation: Observation,
    settings: HealSettings,
    reason: str,
    verdict: Verdict = Verdict.ABORTED,
) -> Outcome:
    """Undo what the open episode brought to any replica, by a new generation, and close it."""
    if state.phase is Phase.BAKING:
        assert state.previous is not None
        # Not a rollback target any more: it was taken back for cause.
        kept = tuple(digest for digest in state.promoted if digest != state.stable)
        state = replace(serve(state, state.previous), previous=None, promoted=kept)
    elif state.cohort:
        state = serve(state, state.stable)
    else:
        return close(state, observation, settings, verdict, reason)
    body = {"generation": state.generation, "digest": state.stable, "reason": reason}
    state, actions = close(state, observation, settings, verdict, reason)
    return state, (Record("restored", body), *actions)


def roll_back(state: State, observation: Observation, settings: HealSettings, digest: str, reason: str) -> Outcome:
    """Serve an old digest under a new generation; an open episode ends as aborted."""
    state = replace(
        serve(state, digest),
        previous=state.stable if digest != state.stable else state.previous,
        # The loop must not undo at once what a person did.
        cooldown_until_s=observation.now_s + settings.cooldown_s,
        monitor_reset_s=observation.now_s,
    )
    body = {"generation": state.generation, "digest": digest, "reason": reason}
    if state.episode is None:
        return state, (Record("rolled_back", body), ResetMonitor(digest))
    state, actions = close(state, observation, settings, Verdict.ABORTED, reason)
    return state, (Record("rolled_back", body), *actions)


def serve(state: State, digest: str) -> State:
    """Serve a digest under a new generation; what was being rolled out or tested is dropped."""
    return replace(
        state,
        generation=next_generation(state),
        stable=digest,
        candidate=None,
        candidate_generation=0,
        cohort=(),
        test=None,
    )


def close(state: State, observation: Observation, settings: HealSettings, verdict: Verdict, reason: str) -> Outcome:
    """End the open episode with a verdict; the journal entry holds all of it.

    What healed needs no cooldown. All else would alarm again at once, so the monitor starts afresh and waits.
    """
    assert state.episode is not None
    baked = state.phase is Phase.BAKING and verdict is Verdict.HEALED
    searching = state.phase is Phase.SEARCHING and observation.search.state not in ("finished", "failed")
    identity = search_id(state)
    episode = replace(state.episode, verdict=verdict, reason=reason, closed_s=observation.now_s)
    state = replace(
        state,
        phase=Phase.WATCHING,
        episode=None,
        candidate=None,
        cohort=(),
        last_verdict=summary(episode),
        cooldown_until_s=state.cooldown_until_s
        if verdict is Verdict.HEALED
        else observation.now_s + settings.cooldown_s,
        monitor_reset_s=state.monitor_reset_s if baked else observation.now_s,
    )
    actions: list[Action] = [Record("episode_closed", episode.to_dict())]
    if not baked:  # it began afresh at the promotion; an alarm since then is news
        actions.append(ResetMonitor(state.stable))
    if searching and identity is not None:
        actions.append(CancelSearch(identity))
    return state, tuple(actions)


def summary(episode: Episode) -> dict[str, Any]:
    """A closed episode in a few values."""
    return {
        "episode": episode.id,
        "verdict": episode.verdict.value if episode.verdict else None,
        "kind": episode.diagnosis.kind.value if episode.diagnosis else None,
        "reason": episode.reason,
        "provisional": episode.provisional,
        "closed_s": episode.closed_s,
        "digest": episode.winner,
    }
