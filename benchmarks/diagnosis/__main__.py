"""How often a change is given its right name: `python -m benchmarks.diagnosis [--episodes 200] [--kind ...]`.

Every episode runs what the live service decides with: windows of 32 instances from several replicas through the
controller on a virtual clock, from a clean lead to a verdict or the launch of a search. The ResNet-18 sees every
changed image once; the passes are kept under out/diagnosis, and episodes draw rows of them. Prints the confusion
matrix, a row per change, and how many searches were launched that should not have been.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.diagnosis.episodes import Scene, Stage, scripts
from benchmarks.diagnosis.faults import PIPELINE
from benchmarks.diagnosis.passes import Passes
from benchmarks.diagnosis.service import Outcome, decide
from benchmarks.diagnosis.table import by_change, confusion, searches

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
OUT = Path(__file__).resolve().parents[2] / "out" / "diagnosis"
HELD_OUT = ("held_out_drifts", "held_out_faults")


def main() -> None:
    """Run the episodes of the chosen kinds, print the tables, keep the outcomes as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--episodes", type=int, default=200, help="of each kind")
    parser.add_argument("--benign", type=int, default=1000, help="of covariate_benign")
    parser.add_argument("--kind", nargs="*", help="default: all but the held-out ones; 'all' for those too")
    parser.add_argument("--first-seed", type=int, default=0)
    args = parser.parse_args()
    passes = Passes(args.data, args.out)
    known = scripts(passes)
    kinds = list(known) if args.kind == ["all"] else args.kind or [kind for kind in known if kind not in HELD_OUT]
    found: list[tuple[Scene, Outcome]] = []
    for kind in kinds:
        start_s, script_changes = time.time(), known[kind]
        script, changes = script_changes
        for seed in range(args.benign if kind == "covariate_benign" else args.episodes):
            scene = Scene(kind, changes[seed % len(changes)], args.first_seed + seed // len(changes))
            found.append((scene, decide(passes.baseline, script(Stage(passes, scene)))))
        (args.out / f"episodes-{kind}.json").write_text(
            json.dumps([asdict(s) | asdict(o) for s, o in found if s.kind == kind])
        )
        print(f"{kind}: {time.time() - start_s:.0f} s", flush=True)
    losses = {s.change: passes.loss(s.change)[0] for s, _ in found if (args.out / _file(s.change)).exists()}
    print("\n".join(["", *confusion(found), "", *by_change(found, losses), ""]))
    print("searches launched in benign episodes:", searches(found, ["covariate_benign"]))
    print("searches launched over broken inputs:", searches(found, ["data_quality"]))
    print("  of these swaps, missing normalisation, black frames:", searches(found, ["data_quality"], PIPELINE))


def _file(change: str) -> str:
    return f"{change.replace(' ', '_')}.npz"


if __name__ == "__main__":
    main()
