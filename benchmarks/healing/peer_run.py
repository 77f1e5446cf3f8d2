"""Peers on a scene: the stream in its order, then the frozen model on eval rows.

They get the very buffer that our search collects, all of it, where our trials keep three tenths for choosing and for
the gate. Online accuracy is that of the answers as they came.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from benchmarks.healing.buffers import Scene, World
from benchmarks.healing.ours import correct
from benchmarks.healing.peers.base import Given, Peer
from benchmarks.healing.peers.registry import PEERS
from benchmarks.healing.results import AUTHORS, Base, Result, marks
from orchestrator.datasets import Dataset
from tuning.buffer import Buffer
from tuning.workbench import Workbench, load_workbench

RATES = (0.3, 1.0, 3.0)  # factors of the authors' learning rate, where it is tuned


def measure_base(bench: Workbench, world: World) -> Base:
    """The base's accuracies on a scene."""
    stream, rows = in_order(bench.buffer)
    assert world.stream.labels is not None
    labels = world.stream.labels[rows]
    sets = (world.evaluation, world.clean, Dataset(stream.inputs, labels), Dataset(world.stream_clean[rows], labels))
    return Base(*(float(correct(bench.module, bench.device, rows).mean()) for rows in sets))


def run_peers(
    scene: Scene, world: World, names: Sequence[str], tune: bool, bench: Workbench, base: Base
) -> Iterator[Result]:
    """Each peer on a scene; those who need labels only where there are some.

    Args:
        scene: what is run.
        world: its data.
        names: of peers.
        tune: True to run each with RATES, and score the frozen models as our trials are scored.
        bench: of the scene's search.
        base: the base's figures.
    """
    for name in names:
        kind = PEERS[name]
        if kind.labelled and bench.buffer.num_labelled < 2:
            continue
        for rate in RATES if tune and kind.rated else (1.0,):
            yield run_peer(name, scene, world, bench, base, rate, tune)


def run_peer(name: str, scene: Scene, world: World, bench: Workbench, base: Base, rate: float, scored: bool) -> Result:
    """One peer with one learning rate on a scene."""
    stream, rows = in_order(bench.buffer)
    assert world.stream.labels is not None
    torch.manual_seed(scene.seed)
    started_s = time.time()
    peer = PEERS[name](
        Given(
            module=bench.module,
            tap=bench.tap,
            device=bench.device,
            source=bench.reference,
            num_classes=len(bench.baseline.reference_class_shares_K),
            layout=bench.layout,
            labels_N=stream.labels,
            seed=scene.seed,
            rate=rate,
        )
    )
    answers = pass_by(peer, stream.inputs)
    module = peer.frozen().eval()
    seconds = time.time() - started_s
    right = correct(module, bench.device, world.evaluation)
    return Result(
        scene=scene,
        method=name,
        setting=AUTHORS if rate == 1.0 else f"x{rate:g}",
        base=base,
        drifted=float(right.mean()),
        clean=float(correct(module, bench.device, world.clean).mean()),
        online=None if answers is None else float((answers == world.stream.labels[rows]).mean()),
        right=marks(right, world.evaluation_rows, len(world.clean)),
        score=bench.score(module, peer.layers)["score"] if scored else None,
        seconds=seconds,
    )


def in_order(buffer: Buffer) -> tuple[Buffer, np.ndarray]:
    """The buffer oldest first, and which rows of the stream it holds (ids are `i` and the row's number)."""
    rows = np.array([int(name[1:]) for name in buffer.ids.tolist()])
    order = np.argsort(rows)
    return buffer.take(order), rows[order]


def pass_by(peer: Peer, inputs: np.ndarray) -> np.ndarray | None:
    """Shows a peer the stream; predicted classes (N,) as they came, None of one that is not online."""
    answers = []
    for part in stream_parts(len(inputs), peer.batch):
        x = torch.from_numpy(np.ascontiguousarray(inputs[part])).to(peer.given.device)
        if peer.online:
            answers.append(peer.adapt(x).argmax(dim=1).cpu().numpy())
        else:
            peer.keep(x)
    return np.concatenate(answers) if answers else None


def stream_parts(num_rows: int, batch: int) -> Iterator[slice]:
    """Batches in order; what is left at the end joins the last one where it is less than half a batch."""
    count = max(1, math.floor(num_rows / batch + 0.5))
    for number in range(count):
        yield slice(number * batch, num_rows if number == count - 1 else (number + 1) * batch)


def load(world: World) -> Workbench:
    """The workbench of a scene's search; this process keeps it, so that the gate finds it and its look."""
    return load_workbench(world.storage, world.request)
