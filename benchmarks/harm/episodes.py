"""Episodes drawn by seed: what drifts, how much, in what order the traffic comes, and what its labels are worth.

Real handwritten digits under drifts that an adapter can answer (noise, blur, light), that it cannot (turned, hidden,
mirrored digits), and with labels that mean something else now (concept) or lie (poison).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from orchestrator.datasets import Dataset
from serve_app.digits.images import Split, jitter, transformed

NUM_ROWS = 1600
SEVERITIES = (0.4, 0.7, 1.0)
STREAMS = ("iid", "sorted", "bursts", "half", "label_shift")
LABELS = ("none", "none", "20", "200", "all")
TWISTS = ("none", "none", "none", "concept", "poison")
BURST = 40  # instances of one class in a row
KEPT_SHARE = 0.1  # of the odd classes, under label_shift
POISONED_SHARE = 0.4  # of the labels, drawn anew at random; or all of one class's


@dataclass(frozen=True)
class Episode:
    """One episode's draw. `twist` poison has a seed-drawn form: random labels, or one class called another."""

    seed: int
    drift: str
    severity: float
    stream: str
    labels: str
    twist: str

    @property
    def name(self) -> str:
        """Unique."""
        words = (f"{self.seed:03d}", self.drift, f"{self.severity:g}", self.stream, f"labels-{self.labels}", self.twist)
        return "-".join(words)


def draw(seed: int) -> Episode:
    """The episode of a seed."""
    rng = np.random.default_rng([seed, 7])
    drift, severity, stream, labels, twist = (
        options[int(rng.integers(len(options)))] for options in (list(DRIFTS), SEVERITIES, STREAMS, LABELS, TWISTS)
    )
    if twist == "poison" and labels == "none":
        twist = "concept"  # nothing to poison; and what nobody can see must do no harm either
    return Episode(seed, drift, severity, stream, labels, twist)


@dataclass(frozen=True)
class Data:
    """An episode's files. Evaluation rows are a sample of the live mixture with true labels."""

    traffic: Dataset
    evaluation: Dataset
    clean: Dataset


def make(episode: Episode, parts: dict[str, Split]) -> Data:
    """Traffic and evaluation of an episode; no image is in both.

    Args:
        episode: what to make.
        parts: of `serve_app.digits.images.load_images`.
    """
    rng = np.random.default_rng([episode.seed, 11])
    drifted = v2.Compose([jitter(), v2.Lambda(lambda image: DRIFTS[episode.drift](image, episode.severity))])

    def shown(part: str, rows: int, seed: int) -> Split:
        split = transformed(parts[part], drifted, rows, seed)
        if episode.stream == "half":
            old = transformed(parts[part], jitter(), rows, seed)  # the same images in the same order
            keeps = rng.random(rows) < 0.5
            split = Split(np.where(keeps[:, None, None, None], old.inputs, split.inputs), split.labels)
        if episode.stream == "label_shift":
            kept = np.flatnonzero((split.labels % 2 == 0) | (rng.random(rows) < KEPT_SHARE))
            split = Split(split.inputs[kept], split.labels[kept])
        return split

    traffic = shown("traffic", NUM_ROWS, 1000 + episode.seed)
    evaluation = shown("eval", 3 * len(parts["eval"].labels), 5000 + episode.seed)
    order = _order(episode.stream, traffic.labels, rng)
    inputs, labels, truth = traffic.inputs[order], traffic.labels[order], evaluation.labels
    if episode.twist == "concept":
        labels, truth = _swapped(labels, episode.seed), _swapped(truth, episode.seed)
    elif episode.twist == "poison":
        labels = _poisoned(labels, rng)
    clean = transformed(parts["eval"], jitter(), len(parts["eval"].labels), 9000 + episode.seed)
    return Data(Dataset(inputs, labels), Dataset(evaluation.inputs, truth), Dataset(clean.inputs, clean.labels))


def _order(stream: str, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    order = rng.permutation(len(labels))
    if stream == "sorted":
        return order[np.argsort(labels[order], kind="stable")]
    if stream == "bursts":
        by_class = order[np.argsort(labels[order], kind="stable")]
        blocks = np.array_split(by_class, max(1, len(order) // BURST))
        return np.concatenate([blocks[i] for i in rng.permutation(len(blocks))])
    return order


def _swapped(labels: np.ndarray, seed: int) -> np.ndarray:
    """Three neighbouring classes change their meaning in a ring."""
    first = seed % 8
    ring = np.arange(10)
    ring[[first, first + 1, first + 2]] = [first + 1, first + 2, first]
    return np.asarray(ring[labels])


def _poisoned(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if rng.random() < 0.5:
        lies = rng.random(len(labels)) < POISONED_SHARE
        return np.where(lies, rng.integers(0, 10, len(labels)), labels)
    victim, called = rng.permutation(10)[:2]
    return np.where(labels == victim, called, labels)


def _noise(image: torch.Tensor, severity: float) -> torch.Tensor:
    return _bytes(image.float() + 110.0 * severity * torch.randn(image.shape))


def _impulse(image: torch.Tensor, severity: float) -> torch.Tensor:
    drawn = torch.rand(image.shape[1:])
    share = 0.35 * severity
    out = torch.where(drawn < share / 2, torch.zeros_like(image), image)
    return torch.where(drawn > 1 - share / 2, torch.full_like(image, 255), out)


def _blur(image: torch.Tensor, severity: float) -> torch.Tensor:
    return F.gaussian_blur(image, [13, 13], [0.6 + 2.4 * severity] * 2)


def _contrast(image: torch.Tensor, severity: float) -> torch.Tensor:
    return F.adjust_contrast(image, 1.0 - 0.85 * severity)


def _fog(image: torch.Tensor, severity: float) -> torch.Tensor:
    mixed = image.float() * (1 - 0.75 * severity) + 255.0 * 0.6 * severity
    return F.gaussian_blur(_bytes(mixed + 8.0 * torch.randn(image.shape)), [5, 5], [0.8, 0.8])


def _dark(image: torch.Tensor, severity: float) -> torch.Tensor:
    return _bytes(image.float() * (1 - 0.85 * severity) + 10.0 * torch.randn(image.shape))


def _colour(image: torch.Tensor, severity: float) -> torch.Tensor:
    gain = torch.tensor([1.0 - 0.8 * severity, 1.0, 1.0 - 0.5 * severity]).view(3, 1, 1)
    return _bytes(image.float() * gain + torch.tensor([0.0, 40.0, 90.0]).view(3, 1, 1) * severity)


def _negative(image: torch.Tensor, severity: float) -> torch.Tensor:
    return _bytes(image.float() * (1 - 2 * severity) + 255.0 * severity)


def _turned(image: torch.Tensor, severity: float) -> torch.Tensor:
    return F.rotate(image, 75.0 * severity)


def _small(image: torch.Tensor, severity: float) -> torch.Tensor:
    seen = F.affine(image, angle=0.0, translate=[0, 0], scale=1.0 - 0.5 * severity, shear=[0.0])
    return _bytes(seen.float() + 8.0 * torch.randn(seen.shape))  # grain: a dead border is a fault


def _hidden(image: torch.Tensor, severity: float) -> torch.Tensor:
    side = int(6 + 14 * severity)
    top, left = (int(torch.randint(0, image.shape[-1] - side, (1,))) for _ in range(2))
    out = image.clone()
    out[:, top : top + side, left : left + side] = 128
    return out


def _mirrored(image: torch.Tensor, severity: float) -> torch.Tensor:
    return F.horizontal_flip(image) if float(torch.rand(1)) < severity else image


def _same(image: torch.Tensor, severity: float) -> torch.Tensor:
    return image


DRIFTS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "none": _same,
    "noise": _noise,
    "impulse": _impulse,
    "blur": _blur,
    "contrast": _contrast,
    "fog": _fog,
    "dark": _dark,
    "colour": _colour,
    "negative": _negative,
    "turned": _turned,
    "small": _small,
    "hidden": _hidden,
    "mirrored": _mirrored,
}


def _bytes(image: torch.Tensor) -> torch.Tensor:
    return image.round().clamp(0, 255).to(torch.uint8)
