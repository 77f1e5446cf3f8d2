"""Healthy traffic that is odd in one way: how many seeds raise an alarm, and after how many instances.

Wide embeddings without leading directions, table columns with long tails, sites with a class mix of their own, one
input sent again and again. Reference and stream are drawn from the same world; at the default setting none may alarm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.cifar10 import CLEAN
from benchmarks.diagnosis.service import Outcome, Tick, decide
from benchmarks.drift.features import Features
from benchmarks.drift.streams import window_of
from orchestrator.drift.baseline import Baseline, fit_baseline
from orchestrator.drift.monitor import Monitor
from orchestrator.drift.sample import Sample, rows_of
from orchestrator.messages import Window
from orchestrator.settings import WINDOW_INSTANCES

ANIMALS = (2, 3, 4, 5, 6, 7)
Draw = Callable[[int], Sample]
Stream = tuple[Baseline, Iterator[Window]]


def sample_of(embedding_ND: NDArray, logits_NK: NDArray, inputs_NC: NDArray, labels_N: NDArray) -> Sample:
    """Rows of a table."""
    low_N, high_N = inputs_NC.min(axis=1), inputs_NC.max(axis=1)
    return Sample(embedding_ND, logits_NK, inputs_NC, inputs_NC**2, low_N, high_N, labels_N)


def wide(seed: int, width: int, decay: float) -> Draw:
    """Ten Gaussian classes in `width` dimensions, the i-th of spread i ** -decay."""
    rng = np.random.default_rng(seed)
    spread_D = np.arange(1, width + 1.0) ** -decay
    centres_KD = rng.standard_normal((10, width)) * spread_D

    def draw(num: int) -> Sample:
        labels_N = rng.integers(0, 10, num)
        embedding_ND = centres_KD[labels_N] + rng.standard_normal((num, width)) * spread_D
        logits_NK = embedding_ND @ (centres_KD / spread_D**2).T
        return sample_of(embedding_ND, logits_NK, rng.standard_normal((num, 3)), labels_N)

    return draw


def skewed(seed: int, sigma: float, columns: int = 10) -> Draw:
    """Independent log-normal columns, two classes, an embedding of 16."""
    rng = np.random.default_rng(seed)
    hidden_CD, head_DK = rng.standard_normal((columns, 16)) / columns**0.5, rng.standard_normal((16, 2)) * 1.5

    def draw(num: int) -> Sample:
        z_NC = rng.standard_normal((num, columns))
        embedding_ND = np.tanh(1.5 * z_NC @ hidden_CD)
        logits_NK = embedding_ND @ head_DK
        labels_N = (logits_NK + rng.gumbel(size=logits_NK.shape)).argmax(axis=1)
        return sample_of(embedding_ND, logits_NK, np.exp(sigma * z_NC), labels_N)

    return draw


def drawn(draw: Draw, num_reference: int, num: int) -> Stream:
    """A fresh reference and a fresh stream of one world."""
    baseline = fit_baseline("bench", "base", draw(num_reference), None, None, draw(8).channel_means_NC.shape[1])
    starts = range(0, num, WINDOW_INSTANCES)
    return baseline, (window_of(baseline, draw(WINDOW_INSTANCES), float(start)) for start in starts)


def own_mix(features: Features, share: float, seed: int, num: int = 4_096) -> Stream:
    """Real clean images from two sites: that share of the first one's are animals, of the second one's vehicles."""
    clean, rng = features.sample(CLEAN), np.random.default_rng(seed)
    assert clean.labels_N is not None
    is_animal_N = np.isin(clean.labels_N, ANIMALS)

    def windows() -> Iterator[Window]:
        for i, start in enumerate(range(0, num, WINDOW_INSTANCES)):
            at_zoo = i % 5 < 3  # as many animals in all as the reference has
            animals_N = rng.random(WINDOW_INSTANCES) < (share if at_zoo else 1.0 - share)
            pools = [np.flatnonzero(is_animal_N == wanted) for wanted in (False, True)]
            rows_N = np.array([rng.choice(pools[int(animal)]) for animal in animals_N])
            yield window_of(features.baseline, rows_of(clean, rows_N), float(start), "zoo" if at_zoo else "road")

    return features.baseline, windows()


def repeated(features: Features, times: int, seed: int, num: int = 2_976) -> Outcome:
    """Real clean images, one of them sent `times` in a row: what the service says in the end."""
    clean, rng = features.sample(CLEAN), np.random.default_rng(seed)
    rows_N = rng.permutation(len(clean.logits_NK))[:num]
    rows_N[256 : 256 + times] = rows_N[-1]
    starts = range(0, num, WINDOW_INSTANCES)
    return decide(
        features.baseline, (Tick("r0", rows_of(clean, rows_N[start : start + WINDOW_INSTANCES])) for start in starts)
    )


def first_alarm(stream: Stream, arl_instances: int) -> int | None:
    """Instances until the first alarm; None: there was none."""
    baseline, windows = stream
    monitor, seen = Monitor(arl_instances), 0
    monitor.set_baseline(baseline)
    for window in windows:
        monitor.absorb("r0", window)
        seen += window.count
        if monitor.alarm() is not None:
            return seen
    return None


def cases(path: Path) -> dict[str, Callable[[int], Stream]]:
    """Stream of a seed by the name of the case."""
    features = Features(path)
    found: dict[str, Callable[[int], Stream]] = {}
    for width, decay, rows in ((64, 0.0, 2000), (100, 0.0, 2000), (300, 0.0, 2000), (512, 0.0, 5000), (256, 0.3, 2000)):
        name = f"embedding of {width}, spread i^-{decay:g}, {rows:,} reference rows"
        found[name] = partial(_drawn, wide, (width, decay), rows, 16_384)
    for sigma in (0.5, 1.0, 1.5):
        for rows in (1000, 4000):
            name = f"log-normal columns, sigma {sigma:g}, {rows:,} reference rows"
            found[name] = partial(_drawn, skewed, (sigma,), rows, 65_536)
    for share in (0.75, 0.85, 1.0):
        found[f"two sites, {share:.0%} animals and vehicles"] = partial(own_mix, features, share)
    return found


def _drawn(world: Callable[..., Draw], settings: tuple[float, ...], rows: int, num: int, seed: int) -> Stream:
    return drawn(world(seed, *settings), rows, num)


def measure(path: Path, arl_instances: int, seeds: int) -> None:
    """Every case; prints a row for each."""
    print(f"healthy traffic, setting {arl_instances:,}: seeds with an alarm of {seeds}, instances until then")
    for name, stream in cases(path).items():
        alarms = [at for seed in range(seeds) if (at := first_alarm(stream(seed), arl_instances)) is not None]
        print(f"  {name:60s} {len(alarms):2d}  {', '.join(map(str, sorted(alarms)))}", flush=True)
    features = Features(path)
    for times in (8, 16, 32, 50):
        outcomes = [repeated(features, times, seed) for seed in range(5 * seeds)]
        said = ", ".join(f"{kind} {num}" for kind, num in Counter(o.kind for o in outcomes).most_common())
        print(f"  one input {times} times: {said}; searches {sum(o.searched for o in outcomes)}", flush=True)
