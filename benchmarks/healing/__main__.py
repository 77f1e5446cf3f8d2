"""How much of the lost accuracy a search brings back: `python -m benchmarks.healing [--labels none] [--stream iid]`.

Every scene is one drift set of the shared data in one order, with some labels and a seed. Prints per scene what each
trial truly gains, what was chosen and whether the gate let it pass; then the recovered share: the sum of what came back
over the sum of what was lost. Outcomes are kept as JSON under out/healing.
"""

from __future__ import annotations

import argparse
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from benchmarks.healing.buffers import DRIFTS, LABELS, STREAMS, Scene
from benchmarks.healing.ours import Limits, Outcome, rolled, run_scene

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
OUT = Path(__file__).resolve().parents[2] / "out" / "healing"


def main() -> None:
    """Run the scenes in processes of one thread each, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--drift", nargs="*", default=DRIFTS, choices=DRIFTS)
    parser.add_argument("--stream", nargs="*", default=["iid"], choices=STREAMS)
    parser.add_argument("--labels", nargs="*", default=["none"], choices=LABELS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--budget", type=float, default=600.0, help="seconds of a search")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    scenes = [Scene(*s) for s in product(args.drift, args.stream, args.labels, range(args.seeds))]
    args.out.mkdir(parents=True, exist_ok=True)
    limits = Limits(args.trials, args.epochs, args.budget)
    jobs = [(args.data, args.out, scene, limits) for scene in scenes]
    found: list[Outcome] = []
    with get_context("spawn").Pool(args.workers, maxtasksperchild=1) as pool:
        for outcome in pool.imap_unordered(run_scene, jobs):
            found.append(outcome)
            print(_line(outcome), flush=True)
    for stream, labels in product(args.stream, args.labels):
        print(summary([o for o in found if (o.scene.stream, o.scene.labels) == (stream, labels)], stream, labels))


def _line(found: Outcome) -> str:
    scene = found.scene
    head = f"{scene.drift} {scene.stream} labels {scene.labels} seed {scene.seed}: rolls {rolled(found)}"
    head += f" [chosen {found.chosen or '-'}, gate {found.gate or '-'}: {found.message}]"
    head += f" {found.seconds.get('total', 0):.0f} s"
    rows = [
        f"    {name:32s} drifted {value:.3f} clean {found.clean[name]:.3f} score {found.scores.get(name, 0):.3f}"
        f" {found.seconds.get(name, 0):.0f} s"
        for name, value in found.drifted.items()
    ]
    return "\n".join([head, *rows])


def summary(found: list[Outcome], stream: str, labels: str) -> str:
    """Recovered shares over all drifts of one regime: of what rolled, the best trial, and norm statistics."""
    lost = sum(_clean(o) - o.drifted["base"] for o in found)
    free = "norm_statistics r0 0 x0"

    def share(of: dict[str, float]) -> float:
        return sum(of[o.scene.drift + str(o.scene.seed)] - o.drifted["base"] for o in found) / lost

    key = {o.scene.drift + str(o.scene.seed): o for o in found}
    picks = {
        "rolled": {k: o.drifted[rolled(o)] for k, o in key.items()},
        "chosen": {k: o.drifted[o.chosen or "base"] for k, o in key.items()},
        "best trial": {k: max(o.drifted.values()) for k, o in key.items()},
        "norm statistics": {k: o.drifted.get(free, o.drifted["base"]) for k, o in key.items()},
    }
    words = ", ".join(f"{name} {share(values):.3f}" for name, values in picks.items())
    return f"recovered share, {stream}, labels {labels}, {len(found)} scenes: {words}"


def _clean(found: Outcome) -> float:
    return found.clean["base"]


if __name__ == "__main__":
    main()
