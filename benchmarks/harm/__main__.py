"""Seeded episodes of the whole loop: `python -m benchmarks.harm --episodes 60`.

Prints each episode's verdict with the accuracies before and after on its live mixture, then how many promotions did
harm, and how many of the episodes that could be healed were. Outcomes are kept under out/harm; a run goes on from them.
"""

from __future__ import annotations

import argparse
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

from benchmarks.harm.episodes import draw
from benchmarks.harm.run import Outcome, play

NEVER_SEARCHED = ("outage", "replica_fault", "suspicious_source", "data_quality", "unknown")

OUT = Path(__file__).resolve().parents[2] / "out" / "harm"


def main() -> None:
    """Play the episodes in processes of one thread, print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--episodes", type=int, default=60)
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {"num_trials": args.trials, "trial_epochs": args.epochs}
    jobs = [(args.out, draw(args.first + i), settings) for i in range(args.episodes)]
    found: list[Outcome] = []
    with get_context("spawn").Pool(args.workers) as pool:
        for outcome in pool.imap_unordered(play, jobs):
            found.append(outcome)
            print(line(outcome), flush=True)
    print(summary(found))


def line(o: Outcome) -> str:
    """One episode."""
    mark = "HARM " if o.harmed else "missed " if o.healable and not o.healed else ""
    figures = f"{o.before:.3f} -> {o.after:.3f} (best {o.best:.3f})"
    return f"{o.episode.name}: {mark}{o.kind} {o.verdict} {figures} {o.seconds:.0f} s; {o.reason[:160]}"


def summary(found: list[Outcome]) -> str:
    """Counts of harm and of healing."""
    rows = [f"{len(found)} episodes, {Counter(o.verdict for o in found)}"]
    promoted = [o for o in found if o.verdict == "healed"]
    rows.append(f"harm: {sum(o.harmed for o in promoted)} of {len(promoted)} promotions")
    healable = [o for o in found if o.healable]
    groups = {
        "all": healable,
        "labels as they should be": [o for o in healable if o.episode.twist == "none"],
        "not refused as a fault, or as a kind that nobody knows": [o for o in healable if o.kind not in NEVER_SEARCHED],
    }
    rows += [
        f"healable, {name}: {sum(o.healed for o in group)} of {len(group)} healed" for name, group in groups.items()
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    main()
