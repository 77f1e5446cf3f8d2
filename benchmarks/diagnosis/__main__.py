"""How often a drift is given its right name, on real images: `python -m benchmarks.diagnosis [--episodes 50]`.

Each change is applied to real clean (or drifted) CIFAR-10 images, the ResNet-18 sees them once, and every episode
diagnoses a random draw of them, as many as a search would wait for. Prints a row per change: points lost, the estimate,
and how often each kind was said. Data: the CIFAR-10 drift data beside the checkout, or --data.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.diagnosis.changes import BROKEN, DRIFTS, UNSEEN, Change, Images
from orchestrator.datasets import Dataset, concatenate, read_dataset, split_reference
from orchestrator.drift.baseline import Baseline, fit_baseline
from orchestrator.drift.diagnosis import diagnose
from orchestrator.drift.sample import Sample, rows_of
from orchestrator.drift.statistics import summarise
from orchestrator.messages import Alarm, Window
from orchestrator.settings import HealSettings
from orchestrator.spec import load_spec
from tuning.base_model import build_module, collect_sample, feature_tap

SETS = ("gaussian_noise", "defocus_blur", "glass_blur", "fog", "contrast", "brightness")
UNDER = ("clean", "fog", "gaussian_noise")  # what a broken pipeline is looked for under
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


class Model:
    """The ResNet-18 and what is normal for it."""

    def __init__(self, data: Path) -> None:
        torch.set_num_threads(1)
        self.data, self.spec = data, load_spec(data / "model.yaml")
        self.module = build_module(data, self.spec)
        parts = split_reference(read_dataset(data / "reference.parquet", self.spec))
        known = concatenate([parts["fit"], parts["gate"]])
        self.tap = feature_tap(self.module, self.spec, known.inputs[:2])
        assert known.labels is not None
        self.baseline: Baseline = fit_baseline("b", "base", self.sees(known.inputs, known.labels), None, None, 3)

    def read(self, name: str, rows: int) -> Dataset:
        """The first rows of a traffic file."""
        return read_dataset(self.data / f"{name}.traffic.parquet", self.spec).take(np.arange(rows))

    def sees(self, images: Images, labels: np.ndarray) -> Sample:
        """One pass over images."""
        images = np.ascontiguousarray(images)
        return collect_sample(self.module, self.tap, images, torch.device("cpu"), labels=labels, layout="HWC")


def changed(model: Model, rows: int) -> Iterator[tuple[str, str, Sample]]:
    """Group, name and sample of every change."""
    clean = {name: model.read(name, rows) for name in ("clean", *SETS)}
    rng = np.random.default_rng(0)

    def seen(name: str, change: Change | None = None, share: float = 1.0) -> Sample:
        images = clean[name].inputs
        if share < 1.0:
            images = np.round(clean["clean"].inputs * (1.0 - share) + images * share).astype(np.uint8)
        assert clean[name].labels is not None
        return model.sees(images if change is None else change(images, rng), clean[name].labels)

    yield "normal", "clean", seen("clean")
    for name in SETS:
        for share in (0.25, 0.5, 1.0):
            yield "drift", f"{name} {share:.0%}", seen(name, share=share)
    for name, change in DRIFTS.items():
        yield "drift", name, seen("clean", change)
    for name, change in BROKEN.items():
        for under in UNDER:
            yield "broken", f"{name} on {under}", seen(under, change)
    for name, change in UNSEEN.items():
        yield "unseen", name, seen("clean", change)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--instances", type=int, default=1000, help="diagnosed on")
    parser.add_argument("--rows", type=int, default=1500, help="images of each set")
    args = parser.parse_args()
    model = Model(args.data)
    normal = None
    for group, name, sample in changed(model, args.rows):
        assert sample.labels_N is not None
        accuracy = float((sample.logits_NK.argmax(axis=1) == sample.labels_N).mean())
        normal = accuracy if normal is None else normal
        kinds, losses = Counter[str](), []
        for episode in range(args.episodes):
            rows = np.random.default_rng(episode).choice(len(sample.logits_NK), args.instances, replace=False)
            found = _diagnose(model.baseline, rows_of(sample, rows))
            kinds[found[0]] += 1
            losses.append(found[1])
        said = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
        print(
            f"{group:7s} {name:26s} lost {normal - accuracy:6.3f}  estimated {np.mean(losses):.3f}  {said}", flush=True
        )


def _diagnose(baseline: Baseline, sample: Sample) -> tuple[str, float]:
    sums = np.sum(
        [_sums(baseline, rows_of(sample, slice(i, i + 32))) for i in range(0, len(sample.logits_NK), 32)], axis=0
    )
    window = Window("b", "base", "", len(sample.logits_NK), 0.0, 1.0, sums)
    found = diagnose(baseline, window, Alarm("global", "base", 1e7, 1e6, 0.0, 1.0, 64), 2, HealSettings())
    assert found is not None
    return found.kind.value, found.estimated_loss


def _sums(baseline: Baseline, sample: Sample) -> np.ndarray:
    """One window; equal images have equal logits, which serve as their hashes."""
    hashes_N = np.unique(sample.logits_NK, axis=0, return_inverse=True)[1].ravel()
    checks = replace(sample.checks(), hashes_N=hashes_N)
    return summarise(baseline, baseline.layout, sample.embedding_ND, sample.logits_NK, checks)


if __name__ == "__main__":
    main()
