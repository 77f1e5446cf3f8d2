"""Episodes: streams of windows with a clean lead, then what happens. Seeded; rows are drawn from the passes.

Two to four replicas answer in turn, in every other episode from four cameras (segments) alike. Rows come in random
order, all of a set before any comes again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from benchmarks.cifar10 import CLEAN
from benchmarks.diagnosis import catalogue
from benchmarks.diagnosis.passes import Passes
from benchmarks.diagnosis.service import Tick
from orchestrator.drift.sample import Sample, rows_of
from orchestrator.settings import WINDOW_INSTANCES

LEAD = (10, 30)  # ticks of clean traffic before the change: 320 to 960 instances
AFTER = 130  # ticks of changed traffic at most: 4,160 instances
NUM_CAMERAS = 4


@dataclass(frozen=True)
class Scene:
    """What one episode is about."""

    kind: str
    change: str
    seed: int


class Deck:
    """Deals rows of one sample, all of them before any comes again."""

    def __init__(self, sample: Sample, rng: np.random.Generator, weights_K: np.ndarray | None = None) -> None:
        self._sample, self._rng, self._weights_K = sample, rng, weights_K
        self._order_N = np.zeros(0, dtype=np.int64)

    def deal(self, num: int = WINDOW_INSTANCES) -> Sample:
        """The next rows; with class weights, rows drawn by class."""
        if self._weights_K is not None:
            return rows_of(self._sample, self._by_class(num))
        if len(self._order_N) < num:
            self._order_N = self._rng.permutation(len(self._sample.logits_NK))
        rows_N, self._order_N = self._order_N[:num], self._order_N[num:]
        return rows_of(self._sample, rows_N)

    def _by_class(self, num: int) -> np.ndarray:
        labels_N, weights_K = self._sample.labels_N, self._weights_K
        assert labels_N is not None
        assert weights_K is not None
        share_N = weights_K[labels_N] / np.bincount(labels_N, minlength=len(weights_K))[labels_N]
        return self._rng.choice(len(labels_N), num, replace=False, p=share_N / share_N.sum())


class Stage:
    """The clean world of one episode: who answers, for which camera."""

    def __init__(self, passes: Passes, scene: Scene) -> None:
        self.passes, self.scene = passes, scene
        self.rng = np.random.default_rng([scene.seed, *scene.kind.encode(), *scene.change.encode()])
        self.replicas = [f"r{i}" for i in range(int(self.rng.integers(2, 5)))]
        self.cameras = [f"s{i}" for i in range(NUM_CAMERAS)] if scene.seed % 2 else [""]
        self.clean = self.deck(CLEAN)
        self.lead = int(self.rng.integers(*LEAD))

    def deck(self, name: str, weights_K: np.ndarray | None = None) -> Deck:
        """Rows of one change, in an order of this episode's own."""
        return Deck(self.passes.sample(name), self.rng, weights_K)

    def before(self, labelled: bool = False) -> Iterator[Tick]:
        """The clean lead."""
        for i in range(self.lead):
            yield self.tick(i, self.clean.deal(), labelled=labelled)

    def tick(self, i: int, sample: Sample, drifted: bool = False, labelled: bool = False) -> Tick:
        """The i-th window: replicas in turn, a camera by lot."""
        camera = self.cameras[int(self.rng.integers(len(self.cameras)))]
        labels_N = sample.labels_N if labelled else None
        return Tick(self.replicas[i % len(self.replicas)], sample, camera, drifted, labels_N=labels_N)


Script = Callable[[Stage], Iterator[Tick]]


def everywhere(stage: Stage) -> Iterator[Tick]:
    """The change reaches all traffic at once."""
    yield from stage.before()
    deck = stage.deck(stage.scene.change)
    for i in range(AFTER):
        yield stage.tick(i, deck.deal(), drifted=True)


def nothing(stage: Stage) -> Iterator[Tick]:
    """Clean throughout; labels come in every other episode."""
    labelled = stage.scene.seed % 4 >= 2
    yield from stage.before(labelled)
    for i in range(AFTER):
        yield stage.tick(i, stage.clean.deal(), drifted=True, labelled=labelled)


def failing(stage: Stage) -> Iterator[Tick]:
    """Requests fail: all or half of them, on all replicas."""
    yield from stage.before()
    failed = WINDOW_INSTANCES if stage.scene.change == "all fail" else WINDOW_INSTANCES // 2
    for i in range(AFTER):
        whole = stage.tick(i, stage.clean.deal(WINDOW_INSTANCES), drifted=True)
        yield Tick(whole.tag, rows_of(whole.sample, slice(failed, None)), whole.segment, True, failed)


def one_replica(stage: Stage) -> Iterator[Tick]:
    """One replica of three or four sees changed inputs, gives no finite answers, or fails."""
    stage.replicas = [f"r{i}" for i in range(3 + stage.scene.seed % 2)]
    yield from stage.before()
    change = stage.scene.change
    deck = stage.clean if change in ("fails", "not finite") else stage.deck(change)
    for i in range(AFTER * 2):
        if i % len(stage.replicas) != 1:
            yield stage.tick(i, stage.clean.deal())
            continue
        tick = stage.tick(i, deck.deal(), drifted=True)
        if change == "fails":
            tick = Tick(tick.tag, rows_of(tick.sample, slice(0, 0)), tick.segment, True, WINDOW_INSTANCES)
        elif change == "not finite":
            columns = {**vars(tick.sample), "logits_NK": tick.sample.logits_NK * np.nan}
            tick = Tick(tick.tag, Sample(**columns), tick.segment, True)
        yield tick


def flood(stage: Stage) -> Iterator[Tick]:
    """A camera that sent an eighth, or nothing, sends three fifths of the traffic, and strays."""
    is_new = stage.scene.seed % 2 == 1
    stage.cameras = [f"s{i}" for i in range(1 if is_new else 0, 8)]
    yield from stage.before()
    deck = stage.deck(stage.scene.change)
    for i in range(AFTER):
        strays = bool(stage.rng.random() < 0.6)
        tick = stage.tick(i, (deck if strays else stage.clean).deal(), drifted=strays)
        others = [c for c in stage.cameras if c != "s0"]
        camera = "s0" if strays else others[int(stage.rng.integers(len(others)))]
        yield Tick(tick.tag, tick.sample, camera, tick.drifted)


def invalid(stage: Stage) -> Iterator[Tick]:
    """A part of the answers is not finite."""
    yield from stage.before()
    for i in range(AFTER):
        tick = stage.tick(i, stage.clean.deal(), drifted=True)
        bad_N1 = np.where(stage.rng.random((WINDOW_INSTANCES, 1)) < 0.2, np.nan, 1.0)
        yield Tick(tick.tag, Sample(**{**vars(tick.sample), "logits_NK": tick.sample.logits_NK * bad_N1}), "", True)


def other_classes(stage: Stage) -> Iterator[Tick]:
    """Another mix of classes; the images of each are as they were."""
    yield from stage.before()
    deck = stage.deck(CLEAN, class_mix(stage.scene.change, stage.rng))
    for i in range(AFTER):
        yield stage.tick(i, deck.deal(), drifted=True)


def class_mix(name: str, rng: np.random.Generator, num_classes: int = 10) -> np.ndarray:
    """Class shares of one mix, the classes by lot."""
    some_K = rng.permutation(num_classes)
    shares_K = np.full(num_classes, 1.0)
    if name == "one dominates":
        shares_K[some_K[0]] = num_classes - 1.0
    elif name == "three of ten":
        shares_K[some_K[3:]] = 0.3
        shares_K[some_K[:3]] = 3.0
    elif name == "two missing":
        shares_K[some_K[:2]] = 0.0
    elif name == "half doubled":
        shares_K[some_K[:5]] = 3.0
    else:  # uneven
        shares_K = rng.gamma(0.7, size=num_classes) + 0.05
    return np.asarray(shares_K / shares_K.sum())


def new_meaning(stage: Stage) -> Iterator[Tick]:
    """Labels of some classes are exchanged in turn; labels of a part of the traffic come in."""
    some_K = stage.rng.permutation(10)[: int(stage.scene.change.split()[0])]
    renamed_K = np.arange(10)
    renamed_K[some_K] = np.roll(some_K, 1)
    yield from stage.before(labelled=True)
    for i in range(AFTER):
        tick = stage.tick(i, stage.clean.deal(), drifted=True)
        assert tick.sample.labels_N is not None
        yield Tick(tick.tag, tick.sample, tick.segment, True, labels_N=renamed_K[tick.sample.labels_N])


ON_A_REPLICA = (
    "gaussian_noise",
    "fog",
    "contrast",
    "glass_blur@50",
    "bgr",
    "black_30",
    "dropped",
    "fails",
    "not finite",
)
ON_A_CAMERA = ("gaussian_noise", "fog", "defocus_blur", "impulses", "contrast", "night")
MIXES = ("one dominates", "three of ten", "two missing", "half doubled", "uneven")
RENAMED = ("3 classes", "5 classes", "10 classes")
HARMFUL, BENIGN = 0.02, 0.01  # true loss from which a change counts as harmful, below which as benign


@cache
def by_loss(passes: Passes, harmful: bool) -> tuple[str, ...]:
    """Natural changes whose true loss is clear."""
    found = []
    for name in (*catalogue.NATURAL, *catalogue.GENTLE):
        loss, error = passes.loss(name)
        if (loss - 2.0 * error >= HARMFUL) if harmful else (loss < BENIGN):
            found.append(name)
    return tuple(found)


def scripts(passes: Passes) -> dict[str, tuple[Script, tuple[str, ...]]]:
    """Per kind: how its episodes go, and the changes that take turns in them."""
    return {
        "none": (nothing, (CLEAN,)),
        "outage": (failing, ("all fail", "half fail")),
        "replica_fault": (one_replica, ON_A_REPLICA),
        "suspicious_source": (flood, ON_A_CAMERA),
        "data_quality": (everywhere, catalogue.BROKEN),
        "prior_shift": (other_classes, MIXES),
        "covariate_benign": (everywhere, by_loss(passes, harmful=False)),
        "covariate_harmful": (everywhere, by_loss(passes, harmful=True)),
        "concept": (new_meaning, RENAMED),
        "unknown": (everywhere, catalogue.UNSEEN),
        "held_out_drifts": (everywhere, catalogue.HELD_OUT_DRIFTS),
        "held_out_faults": (everywhere, catalogue.HELD_OUT_FAULTS),
        "faults_under_drift": (everywhere, tuple(f"{name} on fog" for name in catalogue.UNSEEN)),
    }
