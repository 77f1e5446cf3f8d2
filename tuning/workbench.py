"""Everything the trials of one episode share, loaded once per process: base, buffer parts, reference parts, baseline.

Called by both runners, by the trials and by `finish`. It decides which data each step may see: `train` and `replay`
train, `choose` and `calibration` choose, `gate` and `reference_gate` judge the winner. The report part is never loaded.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from orchestrator.datasets import Dataset, read_dataset, row_hashes, split_reference
from orchestrator.drift.baseline import Baseline, Sample
from orchestrator.drift.estimate import MIN_ROWS, split_mixture
from orchestrator.drift.sample import rows_of
from orchestrator.drift.statistics import fourier_features
from orchestrator.errors import DataError
from orchestrator.messages import Kind, SearchRequest, TrialConfig
from orchestrator.models import fetch_model, load_published_spec
from orchestrator.storage import Storage
from tuning.augment import Views, find_views
from tuning.base_model import FeatureTap, build_module, collect_sample, feature_tap, resolve_device
from tuning.buffer import Buffer, collect
from tuning.candidates import search_space
from tuning.prepare import prepare_base
from tuning.restyle import Look, Variant, fit_look, near_variants, variants
from tuning.scoring import (
    calibrate,
    corrected_posteriors,
    covariate_score,
    logit_offset,
    predict,
    prior_shift_score,
)

CALIBRATION_ROWS = 384  # of the reference's fit part; at most a fifth of it. Standard error of an accuracy: 2 points
LOOK_ROWS = 512  # of either side, to tell which traffic drifted: a pass of the model on each
FIDELITY_ROWS = 128  # reference rows that each look is tried on
NOISE_STEPS = (0.25, 0.125)  # by which the share of noise of the best look is varied
MIN_DRIFTED = 64  # a look is fitted on no fewer rows; on all of them where fewer stand out
MIN_TRAFFIC = 32  # fewer instances than this in any part: nothing can be learned or judged

_cache: dict[tuple[str, str, str], Workbench] = {}
_cache_lock = threading.Lock()


@dataclass
class Workbench:
    """One episode's data and base model on one device. Make it with `load_workbench`."""

    request: SearchRequest
    folder: Path
    spec: Any
    module: nn.Module
    tap: FeatureTap
    device: torch.device
    buffer: Buffer
    parts: dict[str, Buffer]
    reference: Dataset  # the fit part, whole: for the winner's baseline
    replay: Dataset  # of the fit part: trains
    calibration: Dataset  # the rest of the fit part: sets temperatures
    reference_gate: Dataset
    baseline: Baseline
    _prior_shift: tuple[np.ndarray, np.ndarray] | None = field(default=None, repr=False)  # offset, posteriors

    @property
    def layout(self) -> str:
        """The spec's input layout."""
        return self.spec.layout or "HWC"

    @cached_property
    def look(self) -> tuple[Look, float]:
        """The look of the traffic that drifted, and the share 0..1 of the traffic that did not."""
        old, new = self.replay.inputs[:LOOK_ROWS], self.parts["train"].inputs[:LOOK_ROWS]
        seen_old, seen_new = self._see(old), self.seen_traffic
        share = 0.0
        if min(len(old), len(new)) >= MIN_ROWS:
            mixture = split_mixture(visible(seen_old), visible(seen_new))
            if mixture.drifted_N.sum() >= MIN_DRIFTED:
                share, new = mixture.share, new[mixture.drifted_N]
                seen_new = rows_of(seen_new, mixture.drifted_N)
        known = variants(old, self.layout)
        if len(known) == 1:
            return fit_look(old, new, self.layout, known[0]), share
        goal_M = self._mean_features(seen_new)
        tried: dict[Variant, tuple[float, Look]] = {}

        def best(those: Iterable[Variant]) -> Variant:
            for variant in those:
                look = fit_look(old, new, self.layout, variant)
                rows = look.apply(old[:FIDELITY_ROWS], np.random.default_rng(self.request.seed))
                gap_M = self._mean_features(self._see(rows)) - goal_M
                tried[variant] = (float(np.square(gap_M).sum()), look)
            return min(tried, key=lambda variant: tried[variant][0])

        variant = best(known)
        for step in NOISE_STEPS:
            variant = best(near_variants(variant, step))
        return tried[variant][1], share

    @cached_property
    def seen_traffic(self) -> Sample:
        """What the base makes of the first LOOK_ROWS train rows."""
        return self._see(self.parts["train"].inputs[:LOOK_ROWS])

    def _see(self, inputs: np.ndarray) -> Sample:
        """What the base makes of inputs."""
        return collect_sample(self.module, self.tap, inputs, self.device, layout=self.layout)

    def _mean_features(self, sample: Sample) -> np.ndarray:
        return np.asarray(fourier_features(self.baseline, sample.embedding_ND).mean(axis=0))

    @cached_property
    def views(self) -> Views:
        """Views of an image under which the base answers as well as before."""
        labels = known_labels(self.calibration)
        return find_views(
            self.calibration.inputs,
            self.layout,
            lambda rows: float((predict(self.module, rows, self.device).argmax(axis=1) == labels).mean()),
        )

    def in_the_mix(self, inputs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Reference rows as the traffic would show them: some as they are, by its share, the rest with its look."""
        look, share = self.look
        changed = rng.random(len(inputs)) >= share
        mixed = inputs.copy()
        if changed.any():
            mixed[changed] = look.apply(inputs[changed], rng)
        return mixed

    @cached_property
    def calibration_mix(self) -> np.ndarray:
        """The calibration rows as the traffic would show them."""
        return self.in_the_mix(self.calibration.inputs, np.random.default_rng(self.request.seed))

    def temperature(self, module: nn.Module, layers: list[nn.Module], as_it_is: bool = False) -> float:
        """Of a model on labelled rows that no trial trains on.

        Args:
            module: eval mode, on the device.
            layers: its normalisation layers that an adapter set to traffic.
            as_it_is: True: rows of the reference without the traffic's look, which takes time to find.
        """
        rows = self.calibration.inputs if as_it_is else self.calibration_mix
        return calibrate(module, layers, rows, known_labels(self.calibration), self.device)

    def configurations(self) -> list[TrialConfig]:
        """The search space for this model."""
        train = self.parts["train"]
        return search_space(self.request, self.module, train.num_labelled / max(len(train), 1))

    def logit_offset(self) -> np.ndarray:
        """Bias correction float32 (K,) for the class shares of the traffic, from the train rows."""
        return self._correction()[0]

    def _correction(self) -> tuple[np.ndarray, np.ndarray]:
        if self._prior_shift is None:
            temperature, old_K = self.baseline.temperature, self.baseline.confusion_KK.sum(axis=0)
            train = predict(self.module, self.parts["train"].inputs, self.device)
            choose = predict(self.module, self.parts["choose"].inputs, self.device)
            offset_K, new_K = logit_offset(train, temperature, old_K)
            self._prior_shift = offset_K, corrected_posteriors(choose, temperature, old_K, new_K)
        return self._prior_shift

    def score(self, module: nn.Module, layers: list[nn.Module], as_it_is: bool = False) -> dict[str, float]:
        """Selection score of a model on the choose rows, with the figures beside it.

        Args:
            module: eval mode, on the device.
            layers: its normalisation layers that an adapter set to traffic; none for the base.
            as_it_is: see `temperature`; scores compare only with scores of the same kind.

        Returns:
            `score`; `labelled_accuracy`, nan without labels; `temperature`.
        """
        choose = self.parts["choose"]
        logits = predict(module, choose.inputs, self.device)
        known = choose.labels >= 0
        right = (logits.argmax(axis=1) == choose.labels)[known]
        if self.request.kind is Kind.PRIOR_SHIFT:
            temperature = float(self.baseline.temperature)
            score = prior_shift_score(logits, self._correction()[1], choose.labels)
        else:
            temperature = self.temperature(module, layers, as_it_is)
            score = covariate_score(logits, temperature, choose.labels, self.baseline.reference_class_shares_K)
        accuracy = float(right.mean()) if len(right) else float("nan")
        return {"score": float(score), "labelled_accuracy": accuracy, "temperature": temperature}

    def reference_accuracy(self, module: nn.Module) -> float:
        """Accuracy on the calibration rows as the model would serve them."""
        logits = predict(module, self.calibration.inputs, self.device)
        return float((logits.argmax(axis=1) == self.calibration.labels).mean())


def load_workbench(storage: Storage, request: SearchRequest, keep: bool = True) -> Workbench:
    """The episode's workbench; the one loaded last is kept for the next call in this process.

    Args:
        storage: where models and traffic are.
        request: the search.
        keep: False to load afresh and keep nothing.

    Raises:
        DataError: too little traffic was stored in the request's window; the message gives both numbers.
    """
    key = (storage.uri, request.episode, request.trial_device)
    with _cache_lock:
        if keep and key in _cache:
            return _cache[key]
        bench = _load(storage, request)
        if keep:
            _cache.clear()
            _cache[key] = bench
        return bench


def forget_workbench(request: SearchRequest) -> None:
    """Frees the memory of the episode's workbench, if this process holds it."""
    with _cache_lock:
        for key in [k for k in _cache if k[1] == request.episode]:
            del _cache[key]


def _load(storage: Storage, request: SearchRequest) -> Workbench:
    buffer = collect(storage, request)
    if len(buffer) < MIN_TRAFFIC:
        raise DataError(f"a search needs >= {MIN_TRAFFIC} stored instances; got {len(buffer)}; is store=none?")
    folder = fetch_model(storage, request.base)
    spec = load_published_spec(folder)
    device = resolve_device(request.trial_device)
    reference = split_reference(read_dataset(folder / "reference.parquet", spec))
    fit = _labelled(reference["fit"])
    held_rows = min(CALIBRATION_ROWS, len(fit.inputs) // 5)
    order = np.argsort(row_hashes(fit.inputs), kind="stable")
    held, rest = order[:held_rows], order[held_rows:]
    module = build_module(folder, spec).to(device)
    return Workbench(
        request=request,
        folder=folder,
        spec=spec,
        module=module,
        tap=feature_tap(module, spec, fit.inputs[:2]),
        device=device,
        buffer=buffer,
        parts=buffer.split(),
        reference=fit,
        replay=Dataset(fit.inputs[rest], known_labels(fit)[rest]),
        calibration=Dataset(fit.inputs[held], known_labels(fit)[held]),
        reference_gate=_labelled(reference["gate"]),
        baseline=prepare_base(storage, request.base, request.trial_device),
    )


def visible(sample: Sample) -> np.ndarray:
    """Embedding beside the input's channel means and deviations: (N, D + 2C)."""
    means_NC, squares_NC = sample.channel_means_NC, sample.channel_squares_NC
    spread_NC = np.sqrt(np.maximum(squares_NC - means_NC**2, 0.0))
    return np.asarray(np.nan_to_num(np.concatenate([sample.embedding_ND, means_NC, spread_NC], axis=1)))


def known_labels(dataset: Dataset) -> np.ndarray:
    """Labels int64 (N,) of a part of the reference; DataError where there are none."""
    if dataset.labels is None:
        raise DataError("the reference must have labels; its label column is missing")
    return dataset.labels


def _labelled(dataset: Dataset) -> Dataset:
    known = known_labels(dataset) >= 0
    return Dataset(dataset.inputs[known], known_labels(dataset)[known])
