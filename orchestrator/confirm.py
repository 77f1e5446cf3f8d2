"""What labels say of a new version: counted as they come; it is confirmed or taken back. Pure; called by `healing`.

A promotion without labels is provisional. Its test goes on after the episode has ended, on every replica and for as
long as the version is served: see `canary`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from orchestrator.canary import Bet, PairedTest
from orchestrator.messages import Mode, Phase, Verdict
from orchestrator.settings import HealSettings
from orchestrator.state import Decided, Observation, Record, ResetMonitor, State
from orchestrator.transitions import Outcome, close, serve, update_episode


def count_labels(state: State, observation: Observation) -> Outcome:
    """Take the pass's labelled disagreements into the open test; a test that is won is recorded once."""
    test = state.test
    if test is None or test.outcome is not Bet.UNDECIDED or test.full:
        return state, ()
    pairs = [
        pair
        for pair in observation.decided
        if (pair.digest, pair.against) == (test.digest, test.against) and pair.right != pair.against_right
    ]
    if not pairs:
        return state, ()
    counted = _add(test, pairs)
    body: dict[str, Any] = {
        "digest": test.digest,
        "against": test.against,
        "wins": counted.wins,
        "losses": counted.losses,
        "message": counted.inequality(),
    }
    state = replace(state, test=counted)
    if counted.outcome is not Bet.BETTER:
        return state, (Record("contradicted" if counted.outcome is Bet.WORSE else "labels_compared", body),)
    state = replace(state, tests_won=state.tests_won + 1)
    if state.episode is not None and state.phase in (Phase.CANARY, Phase.ROLLING, Phase.BAKING):
        state = update_episode(state, provisional=False)
    elif state.last_verdict is not None and state.last_verdict.get("digest") == test.digest:
        state = replace(state, last_verdict=state.last_verdict | {"provisional": False})
    return state, (Record("confirmed", body),)


def _add(test: PairedTest, pairs: list[Decided]) -> PairedTest:
    """Label by label: what comes after the test has decided is not counted."""
    for pair in pairs:
        if test.outcome is not Bet.UNDECIDED or test.full:
            break
        test = replace(test, wins=test.wins + 1) if pair.right else replace(test, losses=test.losses + 1)
    return test


def harm(state: State) -> str:
    """Why labels say that the version under test must go, in words; empty when they do not."""
    test = state.test
    return f"labels: {test.inequality()}" if test is not None and test.outcome is Bet.WORSE else ""


def take_back(state: State, observation: Observation, settings: HealSettings) -> Outcome:
    """Serve again what labels say is better than what was promoted; also while another episode is under way."""
    reason = harm(state)
    if not reason or state.mode is Mode.OBSERVE or state.test is None or state.stable != state.test.digest:
        return state, ()
    worse, better = state.stable, state.test.against
    state = replace(
        serve(state, better),
        previous=None,
        promoted=tuple(digest for digest in state.promoted if digest != worse),
        monitor_reset_s=observation.now_s,
        cooldown_until_s=observation.now_s + settings.cooldown_s,
    )
    last = state.last_verdict
    if last is not None and last.get("digest") == worse:
        state = replace(state, last_verdict=last | {"verdict": Verdict.ABORTED.value, "reason": reason})
    body = {"generation": state.generation, "digest": better, "previous": worse, "reason": reason}
    if state.episode is None:
        return state, (Record("reverted", body), ResetMonitor(better))
    state, actions = close(state, observation, settings, Verdict.ABORTED, reason)
    return state, (Record("reverted", body), *actions)
