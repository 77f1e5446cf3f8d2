"""From a search's candidate to the canary, to a person, or to a verdict. Pure; called by `healing`."""

from __future__ import annotations

from dataclasses import replace

from orchestrator import gate
from orchestrator.messages import Analysis, GateDecision, GateEvidence, Mode, Phase, SearchStatus, Verdict
from orchestrator.settings import HealSettings
from orchestrator.state import MeasureCandidate, Observation, Record, State
from orchestrator.transitions import Outcome, close, enter, enter_canary, search_request, update_episode


def judge_candidate(state: State, observation: Observation, settings: HealSettings) -> Outcome:
    """Have the candidate measured, let `gate` judge, and go where that leads."""
    episode, evidence = state.episode, observation.gate
    assert episode is not None
    assert state.candidate is not None
    late = observation.now_s - episode.phase_s > settings.gate_timeout_s
    if episode.gate is not None:
        return _release(state, observation, settings, episode.gate, late)
    if evidence is None or evidence.candidate != state.candidate:
        if late:
            reason = f"no gate evidence in {settings.gate_timeout_s:.0f} s"
            return close(state, observation, settings, Verdict.ERROR, reason)
        return state, (MeasureCandidate(search_request(state, observation, settings), state.candidate),)
    return _judge(state, observation, settings, evidence, late)


def _judge(
    state: State, observation: Observation, settings: HealSettings, evidence: GateEvidence, late: bool
) -> Outcome:
    episode = state.episode
    assert episode is not None
    assert episode.diagnosis is not None
    decision = gate.decide(evidence, episode.diagnosis.kind, settings)
    state = update_episode(state, evidence=evidence, gate=decision, provisional=decision.provisional)
    body = {
        "episode": episode.id,
        "candidate": state.candidate,
        "analysis": decision.analysis.value,
        "message": decision.message,
        "provisional": decision.provisional,
    }
    state, actions = _release(state, observation, settings, decision, late)
    return state, (Record("gated", body), *actions)


def _release(
    state: State, observation: Observation, settings: HealSettings, decision: GateDecision, late: bool
) -> Outcome:
    """From a gate's decision to the canary, to a person, or to a verdict."""
    if decision.analysis is Analysis.ERROR:
        return close(state, observation, settings, Verdict.ERROR, decision.message)
    if decision.analysis is not Analysis.SUCCESSFUL:
        return _go_on(state, observation, decision) or refuse(
            state, observation, settings, f"gate {decision.analysis}: {decision.message}{_before(state)}"
        )
    if decision.provisional and settings.without_labels == "hold":
        return refuse(state, observation, settings, f"held: labels needed ({decision.message})")
    if state.mode is Mode.OBSERVE:
        reason = f"observe mode: would have rolled out {state.candidate} ({decision.message})"
        return close(state, observation, settings, Verdict.NO_ACTION, reason)
    if state.mode is Mode.APPROVE:
        state = update_episode(state, verdict=Verdict.AWAITING_APPROVAL, reason=decision.message)
        return enter(state, observation, Phase.AWAITING_APPROVAL, candidate=state.candidate)
    entered = enter_canary(state, observation, settings)
    if entered is None and late:
        reason = f"no live replica to serve the canary in {settings.gate_timeout_s:.0f} s"
        return close(state, observation, settings, Verdict.ERROR, reason)
    return entered or (state, ())


def _go_on(state: State, observation: Observation, decision: GateDecision) -> Outcome | None:
    """What is left to try where the gate measured the first choice and found it bad; None for nothing.

    An adapter that fitted an earlier drift is followed by a search that trains, a trained one by the search's second
    choice.
    """
    assert state.episode is not None
    search = state.episode.search
    if decision.analysis is not Analysis.FAILED or search is None:
        return None
    if search.recalled:
        return _search_anew(state, observation, decision)
    if search.runner_up in (None, state.candidate, state.stable):
        return None
    return _take_runner_up(state, observation, search, decision)


def _search_anew(state: State, observation: Observation, decision: GateDecision) -> Outcome:
    episode = state.episode
    assert episode is not None
    changes = {"search": None, "evidence": None, "gate": None, "winner": None, "winner_trial": None}
    why = f"{str(state.candidate)[:12]}, seen before: {decision.message}"
    state = replace(state, candidate=None)
    state = update_episode(
        state, attempt=episode.attempt + 1, recall=False, passed_over=why, provisional=False, **changes
    )
    return enter(state, observation, Phase.SEARCHING, passed_over=why)


def _take_runner_up(state: State, observation: Observation, search: SearchStatus, decision: GateDecision) -> Outcome:
    episode = state.episode
    assert episode is not None
    first, second = str(state.candidate), str(search.runner_up)
    trial = next((t for t in search.trials if t.trial_id == search.runner_up_trial), None)
    state = update_episode(
        replace(state, candidate=second),
        winner=second,
        winner_trial=trial,
        evidence=None,
        gate=None,
        provisional=False,
        phase_s=observation.now_s,
        passed_over=f"{first[:12]}: {decision.message}",
    )
    body = {"episode": episode.id, "passed_over": first, "candidate": second, "message": decision.message}
    return state, (Record("runner_up_taken", body),)


def _before(state: State) -> str:
    assert state.episode is not None
    return f"; before it {state.episode.passed_over}" if state.episode.passed_over else ""


def await_approval(state: State, observation: Observation, settings: HealSettings) -> Outcome:
    """A person's command moves on from here; nobody's ends in a refusal."""
    assert state.episode is not None
    if observation.now_s - state.episode.phase_s > settings.approval_timeout_s:
        return refuse(state, observation, settings, f"nobody approved in {settings.approval_timeout_s:.0f} s")
    return state, ()


def refuse(state: State, observation: Observation, settings: HealSettings, reason: str) -> Outcome:
    """The honest answer: nothing is changed, and why."""
    return close(state, observation, settings, Verdict.REFUSED, reason)
