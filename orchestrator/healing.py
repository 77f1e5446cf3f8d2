"""The healing loop as one pure function. (Skeleton: signatures first.)"""

from __future__ import annotations

from orchestrator.settings import HealSettings
from orchestrator.state import NO_SEARCH, Action, Observation, State

__all__ = ["NO_SEARCH", "adopt_base", "plan", "search_id"]


def search_id(state: State) -> str | None:
    """The id under which the open episode's search runs."""
    if state.episode is None:
        return None
    return state.episode.id if state.episode.attempt == 1 else f"{state.episode.id}-{state.episode.attempt}"


def plan(state: State, observation: Observation, settings: HealSettings) -> tuple[State, tuple[Action, ...]]:
    """One pass: what to remember and what to ask for."""
    raise NotImplementedError


def adopt_base(state: State, base: str) -> State:
    """Another base model was deployed: serve it under a fresh generation."""
    raise NotImplementedError
