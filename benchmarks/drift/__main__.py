"""Measurements of the drift monitor; `features` comes first, the others read what it left under --out.

python -m benchmarks.drift features
python -m benchmarks.drift false-alarms [--runs 200] [--traffic independent bursts cycle]
python -m benchmarks.drift delays [--kind all segment replica tenth] [--seeds 50]
python -m benchmarks.drift centre [--replicas 1000] [--duration 60]
python -m benchmarks.drift probe [--rounds 200] [--device cpu]
python -m benchmarks.drift peers [--seeds 50] [--peer ours-32 mmd-64 ...]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores; before numpy is imported

from benchmarks.drift import centre, delays, false_alarms, odd, peers, probe_cost
from benchmarks.drift.features import Features, measure, print_losses

ARL_INSTANCES = 1_000_000


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.drift", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="CIFAR-10 drift data and its model")
    parser.add_argument("--out", type=Path, default=Path("out/drift"), help="features, environments, results")
    parser.add_argument("--arl", type=int, default=ARL_INSTANCES, help="mean instances between false alarms")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("features", help="run the model once over all sets")
    command = commands.add_parser("false-alarms", help="on clean traffic from a generator, and on real clean traffic")
    command.add_argument("--runs", type=int, default=200)
    command.add_argument("--traffic", nargs="*", default=false_alarms.TRAFFICS, choices=false_alarms.TRAFFICS)
    command = commands.add_parser("delays", help="on real features")
    command.add_argument("--seeds", type=int, default=50)
    command.add_argument("--kind", nargs="*", default=list(delays.KINDS), choices=list(delays.KINDS))
    command = commands.add_parser("odd", help="healthy traffic that is odd in one way")
    command.add_argument("--seeds", type=int, default=4)
    command = commands.add_parser("centre", help="merging and testing many replicas, without Ray")
    command.add_argument("--replicas", type=int, default=1000)
    command.add_argument("--duration", type=int, default=60, help="seconds of reports")
    command = commands.add_parser("probe", help="cost on a replica, bytes of a report")
    command.add_argument("--rounds", type=int, default=200)
    command.add_argument("--device", default="cpu", help="cpu or cuda")
    command = commands.add_parser("peers", help="beside alibi-detect, frouros, river and KS, at equal false alarms")
    known = [*peers.OURS, *(peer.name for peer in peers.PEERS)]
    command.add_argument("--seeds", type=int, default=50)
    command.add_argument("--peer", nargs="*", default=known, choices=known)
    return parser


def main() -> None:
    """Run one measurement and print its tables."""
    args = _parser().parse_args()
    path = args.out / "features.npz"
    match args.command:
        case "features":
            measure(args.data, path)
            print_losses(Features(path))
        case "false-alarms":
            false_alarms.measure_real(Features(path), args.arl)
            for traffic in args.traffic:
                false_alarms.measure(path, traffic, args.arl, args.runs, args.workers, args.out)
        case "delays":
            for kind in args.kind:
                delays.measure(path, kind, delays.KINDS[kind], args.arl, args.seeds, args.workers)
        case "odd":
            odd.measure(path, args.arl, args.seeds)
        case "peers":
            peers.measure(path, args.out, args.peer, args.seeds)
        case "centre":
            centre.measure(Features(path), args.replicas, args.duration, args.arl)
        case "probe":
            served = probe_cost.Served(args.data, args.device)
            probe_cost.measure_cost(served, args.rounds)
            probe_cost.measure_bytes(served)


if __name__ == "__main__":
    main()
