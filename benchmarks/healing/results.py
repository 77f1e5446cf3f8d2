"""One method's figures on one scene, and what many of them say together. Pure; knows no torch.

`report` writes from these; `peer_run` and `ours` make them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from benchmarks.healing.buffers import Scene

AUTHORS, ORACLE, SELECTED = "authors", "oracle", "selected"
OURS = "ours"
NUM_RESAMPLES = 4000
UNSCORED = "-"


@dataclass(frozen=True)
class Base:
    """Accuracies 0..1 of the untouched base: on eval rows and on the stream, drifted and as the clean images were."""

    drifted: float
    clean: float
    stream: float
    stream_clean: float


@dataclass(frozen=True)
class Result:
    """A method on a scene.

    Attributes:
        method: `ours` or a peer's name.
        setting: `authors`, or by what factor the learning rate differs, as `x0.3`.
        drifted: accuracy on eval rows of the frozen model, 0..1.
        clean: the same on clean eval rows.
        online: accuracy on the stream of the answers as they came; None for who answers as the base until its end.
        right: a character per row of the eval file: 1 right, 0 wrong, - not scored.
        score: our label-free selection score of the frozen model; None where it was not asked for.
        seconds: of adapting, freezing and, online, answering.
    """

    scene: Scene
    method: str
    setting: str
    base: Base
    drifted: float
    clean: float
    online: float | None
    right: str
    score: float | None
    seconds: float

    def plain(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return asdict(self)

    @property
    def lost(self) -> float:
        """What the drift costs the base on eval rows."""
        return self.base.clean - self.base.drifted

    @property
    def back(self) -> float:
        """What of that the frozen model brings back; negative where it does harm."""
        return self.drifted - self.base.drifted

    @property
    def share(self) -> float:
        """Recovered share of this scene alone; nan where nothing was lost."""
        return self.back / self.lost if self.lost > 0 else float("nan")


def marks(right_N: np.ndarray, rows_N: np.ndarray, num_rows: int) -> str:
    """`right` of a result: bool (N,) of scored rows, at their places among `num_rows`."""
    text = np.full(num_rows, UNSCORED)
    text[rows_N] = np.where(right_N, "1", "0")
    return "".join(text)


def frozen_share(found: Sequence[Result]) -> float:
    """Sum of what came back over the sum of what was lost, eval rows; nan where nothing was lost."""
    lost = sum(r.lost for r in found)
    return sum(r.back for r in found) / lost if lost > 0 else float("nan")


def online_share(found: Sequence[Result]) -> float | None:
    """The same of answers as they came, stream rows; None for methods that are not online."""
    if not found or any(r.online is None for r in found):
        return None
    lost = sum(r.base.stream_clean - r.base.stream for r in found)
    back = sum((r.online or 0.0) - r.base.stream for r in found)
    return back / lost if lost > 0 else float("nan")


def share_difference(one: Sequence[Result], other: Sequence[Result], seed: int = 0) -> tuple[float, float, float]:
    """Difference of frozen recovered shares, `one` less `other`, with a 95% interval.

    A paired bootstrap over test images: the image is the unit, drawn once for all sets, seeds and both methods, since
    every eval file shows the same images. What was lost is held fixed.

    Args:
        one: results of a method.
        other: of another, on the same scenes.
        seed: of the resampling.

    Returns:
        Difference, lower and upper bound; nan where they share no scene.
    """
    by_scene = {r.scene: r for r in other}
    pairs = [(r, by_scene[r.scene]) for r in one if r.scene in by_scene]
    lost = sum(r.lost for r, _ in pairs)
    if not pairs or lost <= 0:
        return float("nan"), float("nan"), float("nan")
    num_images = len(pairs[0][0].right)
    rng = np.random.default_rng(seed)
    weights_BN = rng.multinomial(num_images, np.full(num_images, 1 / num_images), NUM_RESAMPLES).astype(np.float64)
    difference, draws_B = 0.0, np.zeros(NUM_RESAMPLES)
    for mine, theirs in pairs:
        scored_N = np.array([c != UNSCORED for c in mine.right], float)
        gain_N = _ones(mine.right) - _ones(theirs.right)
        difference += gain_N.sum() / scored_N.sum()
        draws_B += weights_BN @ gain_N / np.maximum(weights_BN @ scored_N, 1.0)
    low, high = np.percentile(draws_B / lost, [2.5, 97.5])
    return difference / lost, float(low), float(high)


def _ones(text: str) -> np.ndarray:
    return np.array([c == "1" for c in text], float)


def tuned(found: Sequence[Result]) -> list[Result]:
    """The authors' settings, and of methods that ran with several learning rates the best by truth and by our score."""
    kept = [r for r in found if r.setting == AUTHORS]
    groups: dict[tuple[Scene, str], list[Result]] = {}
    for result in found:
        groups.setdefault((result.scene, result.method), []).append(result)
    for group in groups.values():
        if len(group) > 1:
            kept.append(replace(max(group, key=lambda r: r.drifted), setting=ORACLE))
            scored = [(r.score, r) for r in group if r.score is not None]
            if len(scored) == len(group):
                kept.append(replace(max(scored, key=lambda pair: pair[0])[1], setting=SELECTED))
    return kept
