"""Twenty thousand seeded worlds of 300 steps: no invariant breaks, and every transition meets every fault."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from simulator import World

NUM_SEEDS = int(os.environ.get("SIMULATION_SEEDS", "20000"))
CHUNK = 500
LEAST_MET = 100 * NUM_SEEDS // 20_000
# Faults that can come at any time; the others belong to a phase: a gate that fails, a search that hangs.
ANY_TIME = (
    "replica stops or starts",
    "replica restarts",
    "request fails",
    "message duplicated",
    "message lost",
    "message late",
    "baseline missing",
    "crash before the journal",
    "crash after the journal",
    "action lost",
    "pass skipped",
)


def play(first: int) -> tuple[Counter[tuple[str, str]], Counter[str]]:
    """What the worlds of CHUNK seeds met, and how their episodes ended; a Violation names its seed."""
    met: Counter[tuple[str, str]] = Counter()
    verdicts: Counter[str] = Counter()
    for seed in range(first, first + CHUNK):
        world = World(seed).run()
        met.update(world.met)
        verdicts.update(world.verdicts)
    return met, verdicts


@pytest.mark.timeout(3600)
def test_no_world_breaks_an_invariant_and_every_transition_meets_every_fault() -> None:
    met: Counter[tuple[str, str]] = Counter()
    verdicts: Counter[str] = Counter()
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for some, ended in pool.map(play, range(0, NUM_SEEDS, CHUNK)):
            met.update(some)
            verdicts.update(ended)
    transitions = sorted({transition for transition, _ in met})
    print(f"\n{NUM_SEEDS} worlds, {sum(verdicts.values())} episodes: {dict(verdicts.most_common())}")
    print(f"{len(transitions)} transitions x {len(ANY_TIME)} faults, least often met together:")
    rarest = sorted((met[t, fault], t, fault) for t in transitions for fault in ANY_TIME)
    for count, transition, fault in rarest[:5]:
        print(f"  {count}  {transition}  {fault}")
    assert len(transitions) == 16
    assert rarest[0][0] >= LEAST_MET
