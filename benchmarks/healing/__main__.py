"""How much of the lost accuracy a search brings back: `python -m benchmarks.healing [--labels none] [--stream iid]`.

Every scene is one drift set of the shared data in one order, with some labels and a seed. Prints per scene what each
trial truly gains, what was chosen and whether the gate let it pass; then the recovered share: the sum of what came back
over the sum of what was lost. `--methods ours bn tent ...` runs other methods on the same buffers and base. Outcomes
are kept as JSON under out/healing, the tables in summary.md there.
"""

from __future__ import annotations

import shlex
import sys
from itertools import product
from multiprocessing import get_context

from benchmarks.healing import report
from benchmarks.healing.buffers import Limits, Scene
from benchmarks.healing.options import parse
from benchmarks.healing.worker import Found, Job, run_scene


def main() -> None:
    """Run the scenes in processes of one thread each, print the tables."""
    args = parse(None, __doc__)
    scenes = [Scene(*s) for s in product(args.drift, args.stream, args.labels, range(args.seeds))]
    args.out.mkdir(parents=True, exist_ok=True)
    limits = Limits(args.trials, args.epochs, args.budget)
    jobs = [Job(args.data, args.out, scene, limits, tuple(args.methods), args.tune) for scene in scenes]
    found: list[Found] = []
    with get_context("spawn").Pool(args.workers, maxtasksperchild=1) as pool:
        for one in pool.imap_unordered(run_scene, jobs):
            found.append(one)
            if one.outcome is not None:
                print(report.outcome_lines(one.outcome), flush=True)
    found.sort(key=lambda one: scenes.index(one.scene))
    for stream, labels in product(args.stream, args.labels):
        own = [f.outcome for f in found if f.outcome and (f.scene.stream, f.scene.labels) == (stream, labels)]
        if own:
            print(report.trial_summary(own, stream, labels))
    results = [result for one in found for result in one.results]
    print("\n".join(report.lines(results)))
    command = shlex.join(["python", "-m", "benchmarks.healing", *sys.argv[1:]])
    (args.out / "summary.md").write_text(report.markdown(results, command))


if __name__ == "__main__":
    main()
