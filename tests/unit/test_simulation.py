"""Thousands of seeded worlds: whatever is lost, late, repeated or killed, the invariants hold and rest is reached.

Replay one seed: `pytest tests/unit/test_simulation.py --override-ini=addopts= -k one_seed` with `SIMULATION_SEED=<n>`.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest
from simulator import Violation, World

NUM_SEEDS = int(os.environ.get("SIMULATION_SEEDS", "1000"))


def play(seed: int, broken: frozenset[str] = frozenset()) -> World:
    try:
        return World(seed, broken).run()
    except Exception as error:
        error.add_note(f"replay with SIMULATION_SEED={seed}")
        raise


def test_every_seeded_world_keeps_the_invariants_and_comes_to_rest() -> None:
    verdicts: Counter[str] = Counter()
    events: Counter[str] = Counter()
    promotions = crashes = 0
    for seed in range(NUM_SEEDS):
        world = play(seed)
        verdicts.update(world.verdicts)
        events.update(world.events)
        promotions += world.promotions
        crashes += world.crashes
    # The worlds must have been worth playing: the faults fired and every outcome was seen.
    assert crashes > NUM_SEEDS
    assert promotions > NUM_SEEDS / 4
    assert min(events[name] for name in ("confirmed", "reverted", "canary_widened")) > NUM_SEEDS / 50, events
    assert {"healed", "refused", "aborted", "error", "no_action", "no_drift"} <= set(verdicts)


def test_one_seed_can_be_replayed_and_plays_the_same_world() -> None:
    seed = int(os.environ.get("SIMULATION_SEED", "7"))
    assert play(seed).state.to_dict() == play(seed).state.to_dict()


@pytest.mark.parametrize("rule", ["accept_older", "skip_replay", "skip_gate"])
def test_a_world_that_breaks_a_rule_is_caught(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if rule == "skip_gate":
        from orchestrator import gate
        from orchestrator.messages import Analysis, GateDecision

        blind = GateDecision(Analysis.SUCCESSFUL, "not looked at", provisional=True)
        monkeypatch.setattr(gate, "decide", lambda *_: blind)
        # The world judges by the real gate.
        monkeypatch.setattr("simulator.gate", RealGate())
    caught = 0
    for seed in range(40):
        try:
            World(seed, frozenset({rule})).run()
        except Violation:
            caught += 1
    assert caught >= 10


class RealGate:
    """The gate as it was before a test replaced it."""

    from orchestrator.gate import decide as _decide

    decide = staticmethod(_decide)
