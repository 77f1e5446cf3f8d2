"""The command line of the healing benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.healing.buffers import DRIFTS, LABELS, STREAMS, TUNED_ON
from benchmarks.healing.peers.registry import PEERS
from benchmarks.healing.results import OURS

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
OUT = Path(__file__).resolve().parents[2] / "out" / "healing"
QUICK = {
    "drift": list(TUNED_ON),
    "stream": ["iid"],
    "labels": ["none"],
    "seeds": 1,
    "trials": 2,
    "epochs": 3,
    "budget": 120.0,
    "methods": [OURS, "bn", "tent", "eata", "sar", "roid", "note", "lame"],
}  # fits a quarter of an hour on two cores


def parse(words: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """Arguments of a call; `--quick` fixes the selection, whatever else was said of it."""
    parser = argparse.ArgumentParser(description=description)
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
    parser.add_argument("--methods", nargs="*", default=[OURS], choices=[OURS, *PEERS])
    parser.add_argument("--tune", action="store_true", help="peers with learning rates x0.3, x1, x3")
    parser.add_argument("--quick", action="store_true", help="a fixed small selection, a quarter of an hour")
    args = parser.parse_args(words)
    if args.quick:
        vars(args).update(QUICK)
    return args
