"""A drift seen before: `python -m benchmarks.healing.again`. How long from search to verdict, without a training step?

Each drift set is healed once by norm statistics (the figures do not depend on what made the adapter) on the first half
of its traffic; then a second search meets the other half. Prints whether the earlier adapter was known again, what the
gate said, and the seconds of each part, in one process of two threads as in a service on two cores.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.healing.buffers import DRIFTS, START_S, Limits, Scene, build
from benchmarks.healing.options import DATA
from orchestrator.gate import decide
from orchestrator.settings import HealSettings
from tuning.finish import measure, register_winner
from tuning.outset import settle
from tuning.sequential import run_trials
from tuning.workbench import load_workbench

HALF = 1000  # rows of either search


def main() -> None:
    """Heal, meet the drift again, print the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--drift", nargs="*", default=DRIFTS, choices=DRIFTS)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for drift in args.drift:
        with TemporaryDirectory(prefix="again-") as folder:
            print(meet_again(args.data, Path(folder), drift), flush=True)


def meet_again(data: Path, folder: Path, drift: str) -> str:
    """One drift set, in words."""
    world = build(data, folder, Scene(drift), Limits(1, 1, 600.0))
    first = replace(world.request, until_s=START_S + HALF - 0.5)
    bench = load_workbench(world.storage, first, keep=False)
    ((result, exported),) = run_trials(bench, bench.configurations(), time.time() + 600.0)
    assert exported is not None
    digest = register_winner(world.storage, bench, result, exported, None)

    again = replace(world.request, episode="again", since_s=START_S + HALF - 0.5)
    start = time.monotonic()
    bench = load_workbench(world.storage, again)
    loaded = time.monotonic()
    status = settle(world.storage, bench, None)
    settled = time.monotonic()
    if status is None or status.winner is None:
        return f"{drift}: not known again ({settled - start:.1f} s)"
    decision = decide(measure(world.storage, again, status.winner), again.kind, HealSettings())
    end = time.monotonic()
    same = "the same adapter" if status.winner == digest else "ANOTHER adapter"
    parts = f"load {loaded - start:.1f}, recall {settled - loaded:.1f}, gate {end - settled:.1f}"
    return f"{drift}: {same}, gate {decision.analysis}, {end - start:.1f} s ({parts}); {decision.message[:90]}"


if __name__ == "__main__":
    main()
