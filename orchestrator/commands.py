"""What people may ask of the loop, and when it answers no. Pure; called by `healing` on every pass.

A command stays in the observation until its id is in `State.seen_commands`; a repeated delivery is a no-op. Each is
written into the journal with who asked and why, also when it is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from orchestrator.messages import BASE, Alarm, Command, Mode, Phase
from orchestrator.settings import HealSettings
from orchestrator.state import Observation, Record, State
from orchestrator.transitions import (
    Outcome,
    abort,
    enter_canary,
    enter_rolling,
    news,
    open_episode,
    roll_back,
    update_episode,
)

SEEN_COMMANDS = 256  # ids remembered; a repeat arrives within seconds, not after this many others
MANUAL_LOOKBACK_S = 3600.0  # `start` without an alarm looks at traffic from this long ago
MANUAL_SCOPE = "global"  # a person's word stands for an alarm on everything

Handler = Callable[[State, Observation, HealSettings, Command], Outcome | str]


def handle_commands(state: State, observation: Observation, settings: HealSettings) -> Outcome:
    """Handle the waiting commands in order, up to the first that moves the episode; the rest waits a pass."""
    actions: Outcome = (state, ())
    for command in observation.commands:
        before = actions[0]
        if command.command_id in before.seen_commands:
            continue
        after, more = _handle(before, observation, settings, command)
        actions = after, (*actions[1], *more)
        if (after.phase, after.generation) != (before.phase, before.generation):
            break
    return actions


def _handle(state: State, observation: Observation, settings: HealSettings, command: Command) -> Outcome:
    handler = HANDLERS.get(command.name)
    if handler is None:
        answer: Outcome | str = f"unknown command {command.name!r}; known: {', '.join(sorted(HANDLERS))}"
    else:
        answer = handler(state, observation, settings, command)
    refused = answer if isinstance(answer, str) else ""
    after, actions = (state, ()) if isinstance(answer, str) else answer
    body = {
        "command_id": command.command_id,
        "name": command.name,
        "actor": command.actor,
        "reason": command.reason,
        "argument": command.argument,
        "accepted": not refused,
        "message": refused,
    }
    seen = (*after.seen_commands, command.command_id)[-SEEN_COMMANDS:]
    return replace(after, seen_commands=seen), (Record("command", body), *actions)


def _start(state: State, observation: Observation, settings: HealSettings, command: Command) -> Outcome | str:
    if state.paused:
        return "paused: resume first"
    if state.episode is not None:
        return f"episode {state.episode.id} is open in phase {state.phase}: abort it first"
    alarm = news(state, observation.alarm)
    if alarm is None:
        now_s = observation.now_s
        alarm = Alarm(MANUAL_SCOPE, state.stable, 0.0, 0.0, max(0.0, now_s - MANUAL_LOOKBACK_S), now_s, 0)
    return open_episode(state, observation, settings, alarm, manual=True)


def _approve(state: State, observation: Observation, settings: HealSettings, command: Command) -> Outcome | str:
    if state.phase is not Phase.AWAITING_APPROVAL:
        return f"nothing awaits approval: the phase is {state.phase}"
    if state.paused:
        return "paused: resume first"
    return enter_canary(state, observation, settings) or "no live replica to serve the canary: try again when one is up"


def _promote(state: State, observation: Observation, settings: HealSettings, command: Command) -> Outcome | str:
    if state.phase is not Phase.CANARY:
        return _approve(state, observation, settings, command)
    if state.paused:
        return "paused: resume first"
    return enter_rolling(state, observation, f"promoted by {command.actor}: {command.reason}")


def _abort(state: State, observation: Observation, settings: HealSettings, command: Command) -> Outcome | str:
    if state.episode is None:
        return "no open episode"
    return abort(state, observation, settings, f"aborted by {command.actor}: {command.reason}")


def _rollback(state: State, observation: Observation, settings: HealSettings, command: Command) -> Outcome | str:
    digest = command.argument or state.previous
    known = tuple(dict.fromkeys((BASE, *state.promoted, *((state.previous,) if state.previous else ()))))
    if digest is None:
        return "nothing was promoted before: name a digest or base"
    if digest not in known:
        return f"rollback needs a digest that was promoted before ({', '.join(known)}); got {digest}"
    if digest == state.stable and not state.cohort:
        return f"{digest} is stable already"
    return roll_back(state, observation, settings, digest, f"rolled back by {command.actor}: {command.reason}")


def _pause(state: State, observation: Observation, settings: HealSettings, command: Command) -> Outcome | str:
    if state.paused:
        return "paused already"
    return replace(state, paused=True, paused_s=observation.now_s), ()


def _resume(state: State, observation: Observation, settings: HealSettings, command: Command) -> Outcome | str:
    """Timeouts go on from where they stopped."""
    if not state.paused:
        return "not paused"
    episode, slept_s = state.episode, observation.now_s - state.paused_s
    resumed = replace(state, paused=False, paused_s=0.0)
    if episode is None:
        return resumed, ()
    step_s = episode.step_s + slept_s if episode.step_s else 0.0
    return update_episode(resumed, phase_s=episode.phase_s + slept_s, step_s=step_s), ()


def _mode(state: State, observation: Observation, settings: HealSettings, command: Command) -> Outcome | str:
    if command.argument not in list(Mode):
        return f"mode must be one of {', '.join(Mode)}; got {command.argument!r}"
    return replace(state, mode=Mode(command.argument)), ()


HANDLERS: dict[str, Handler] = {
    "start": _start,
    "approve": _approve,
    "promote": _promote,
    "abort": _abort,
    "rollback": _rollback,
    "pause": _pause,
    "resume": _resume,
    "mode": _mode,
}
