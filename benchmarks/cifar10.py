"""The shared CIFAR-10 drift data and its ResNet-18, as every benchmark on real images sees them.

Each set holds the traffic rows, then the eval rows; the same row is the same image in every set.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.drift.baseline import Baseline, fit_baseline
from orchestrator.drift.sample import Sample, rows_of

DRIFTS = ("gaussian_noise", "defocus_blur", "glass_blur", "fog", "contrast", "brightness")
CLEAN, REFERENCE = "clean", "reference"
NUM_CHANNELS = 3
FITTED_PARTS = ("fit", "gate")  # of the reference, that the base's baseline is fitted on: `tuning.prepare`

Images = NDArray[np.uint8]


class Cifar10:
    """The folder's sets, seen through the model; the model is built when it is first needed.

    Args:
        data: folder of the data.
    """

    def __init__(self, data: Path) -> None:
        self.data = data

    def images(self, name: str) -> tuple[Images, NDArray[np.int64]]:
        """All images of a set, uint8 (N, 32, 32, 3), and their labels."""
        files = [REFERENCE] if name == REFERENCE else [f"{name}.traffic", f"{name}.eval"]
        parts = [self._read(file) for file in files]
        return np.concatenate([p.inputs for p in parts]), np.concatenate([p.labels for p in parts])

    def blend(self, name: str, percent: float) -> Images:
        """That many percent of a set's pixels in the clean ones."""
        share = np.float32(percent / 100.0)
        mixed = share * self.images(name)[0] + (1 - share) * self.images(CLEAN)[0]
        return np.asarray(np.rint(mixed), dtype=np.uint8)

    def see(self, images: Images, labels_N: NDArray[np.int64]) -> Sample:
        """What the product sees of images: one pass of the model (`tuning.base_model.collect_sample`)."""
        import torch

        from tuning.base_model import collect_sample

        module, tap, layout = self._model
        images = np.ascontiguousarray(images)
        return collect_sample(module, tap, images, torch.device("cpu"), labels=labels_N, layout=layout)

    @cached_property
    def fit_rows_N(self) -> NDArray[np.int64]:
        """Which rows of the reference the product fits the base's baseline on: it splits by content."""
        from orchestrator.datasets import split_reference

        reference = self._read(REFERENCE)
        parts = split_reference(replace(reference, labels=np.arange(len(reference))))
        return np.sort(np.concatenate([parts[name].labels for name in FITTED_PARTS]))

    @cached_property
    def _model(self) -> tuple[Any, Any, str]:
        import torch

        from orchestrator.spec import load_spec
        from tuning.base_model import build_module, feature_tap

        torch.set_num_threads(1)
        spec = load_spec(self.data / "model.yaml")
        module = build_module(self.data, spec)
        return module, feature_tap(module, spec, self._read(REFERENCE).inputs[:2]), spec.layout

    def _read(self, name: str) -> Any:
        from orchestrator.datasets import read_dataset

        return read_dataset(self.data / f"{name}.parquet")


def base_baseline(reference: Sample, fit_rows_N: NDArray[np.int64]) -> Baseline:
    """The base's baseline, fitted on what the product fits it on."""
    return fit_baseline("bench", "base", rows_of(reference, fit_rows_N), None, None, NUM_CHANNELS)


def right(sample: Sample) -> NDArray[np.bool_]:
    """Which predictions are right: (N,)."""
    assert sample.labels_N is not None
    return np.asarray(sample.logits_NK.argmax(axis=1) == sample.labels_N)
