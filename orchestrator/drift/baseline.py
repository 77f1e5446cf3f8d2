"""What one digest's normal looks like: fitted once from samples, stored, read by probes, tests and diagnosis.

An adapter knows two worlds: `normal`, the traffic it was made for, and `reference`, the world of the base. The tests
run against normal; the reference is kept to notice when the old world returns. A swap changes the embedding, so every
digest has its own baseline, in the coordinates of the base's.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.drift.fitting import fit_coordinates, fit_outputs, fit_sketch
from orchestrator.drift.null import gaussian_table
from orchestrator.drift.sample import Sample, true_classes
from orchestrator.drift.statistics import (
    CHECKS,
    NUM_BINS,
    Layout,
    count_checks,
    entropies,
    fourier_features,
    probabilities,
    standardised_channels,
    standardised_inputs,
)
from orchestrator.drift.yardstick import Yardstick, class_means, fit_yardstick, score_weights, whitening_mix
from orchestrator.errors import DataError, IntegrityError, NotFound

if TYPE_CHECKING:
    from orchestrator.storage import Storage

__all__ = ["Baseline", "Sample", "baseline_key", "decode_baseline", "fit_baseline", "load_baseline", "save_baseline"]

Array = NDArray[Any]

# What numpy and the zip beneath raise for bytes that are cut off, flipped, empty, or of another version.
NPZ_ERRORS = (KeyError, ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error)
MIN_INSTANCES = 8
ENTROPY_SHARE = 0.05  # of the variance of the outputs' residual that its entropy makes up
TOLERANCE = 1.0e-4  # squared distance of the outputs, in total variances, that is never drift
INPUT_TOLERANCE = 5.0e-3  # the same for the input channels: light changes over a day
MAX_TESTED_CHANNELS = 64  # wider tables are tested by their embedding alone
_SEED = 20240230


@dataclass(frozen=True)
class Baseline:
    """Arrays and numbers that describe one digest's normal traffic. Shares and means are 0..1 unless said otherwise."""

    base: str
    digest: str
    num_classes: int
    num_channels: int
    center_D: Array  # of the embedding, embedding units
    projection_DP: Array  # PCA, scaled; P <= PCA_DIMENSIONS
    frequencies_PF: Array  # F = FOURIER_FEATURES / 2
    normal_mean_M: Array  # features of the traffic this digest is for
    reference_mean_M: Array  # features of the old world under this digest; equal to normal for the base
    normal_count: int
    reference_count: int
    outputs: Yardstick  # normal embedding and entropy, by predicted class
    inputs: Yardstick | None  # normal channel means and squares; None for > MAX_TESTED_CHANNELS or all with long tails
    classes_table_T: Array  # null of the predicted class shares, see `null.tail_table`
    class_shares_K: Array  # predicted, normal
    reference_class_shares_K: Array  # predicted, reference
    class_means_KM: Array  # reference feature mean of each true class (predicted class where unlabelled)
    confusion_KK: Array  # joint P(predicted i, true j) on the reference; diagonal where unlabelled
    temperature: float  # divides logits before every softmax of the statistics
    accuracy: float  # on the labelled reference; nan without labels
    mean_confidence: float  # calibrated, normal
    reference_confidence: float  # calibrated, reference
    confidence_edges_E: Array  # NUM_BINS - 1 ascending reference quantiles
    entropy_edges_E: Array  # nats
    confidence_shares_B: Array  # normal
    entropy_shares_B: Array  # normal
    bin_accuracy_B: Array  # accuracy per confidence bin on the reference; the bin's mean confidence without labels
    atc_threshold: float  # share of reference confidences below it = reference error; nan without labels
    channel_mean_C: Array  # reference, input units: the origin of standardised channels
    channel_scale_C: Array  # standard deviation over all positions, input units, > 0
    normal_channels_3C: Array  # standardised, normal: mean of means, mean of squares, sd of means over instances
    channel_products_P: Array  # standardised, normal: mean products of channel means
    sketch_mean_S: Array  # of an image's sketch on the reference, input units; S = 0 for tables
    sketch_scale_S: Array  # standard deviation over instances, input units, > 0
    normal_inputs_2X: Array  # mean and sd over normal instances of [channel means, squares, sketch], standardised
    class_inputs_KX: Array  # the same means for each true class of the reference
    class_confidence_KB: Array  # confidence shares of each true class of the reference
    class_counts_K: Array  # reference rows behind them (predicted class where unlabelled)
    input_low: float  # smallest and largest value seen, with half their distance added on both sides
    input_high: float
    check_rates: Array  # of normal, in the order of statistics.CHECKS

    @cached_property
    def layout(self) -> Layout:
        """Layout of windows under this baseline."""
        return Layout(self.num_classes, self.num_channels, len(self.sketch_mean_S))


def baseline_key(base: str, digest: str) -> str:
    """Storage key of one digest's baseline."""
    return f"baselines/{base}-{digest}.npz"


def save_baseline(storage: Storage, baseline: Baseline) -> None:
    """Write a baseline (npz without pickle); an older one of the same digest is replaced atomically."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **_flat(baseline))
    storage.put(baseline_key(baseline.base, baseline.digest), buffer.getvalue())


def _flat(value: Baseline | Yardstick, prefix: str = "") -> dict[str, Array]:
    """Every entry as an array; those of a yardstick as `outputs.means_KW` and the like."""
    found: dict[str, Array] = {}
    for f in fields(value):
        entry = getattr(value, f.name)
        if isinstance(entry, Yardstick):
            found |= _flat(entry, f"{prefix}{f.name}.")
        elif entry is not None:
            found[prefix + f.name] = np.asarray(entry)
    return found


def load_baseline(storage: Storage, digest: str, base: str | None = None) -> Baseline | None:
    """Read a digest's baseline, or None where there is none.

    Args:
        storage: where it was saved.
        digest: adapter digest or `base`.
        base: digest of the base model; None: found by listing, the only one that matches.

    Raises:
        IntegrityError: the file lacks an entry or several bases match; the message names them.
    """
    if base is None:
        keys = [key for key in storage.list("baselines/") if key.endswith(f"-{digest}.npz")]
        if len(keys) > 1:
            raise IntegrityError(f"one baseline must match digest {digest}; got {keys}; pass base=")
        key = keys[0] if keys else ""
    else:
        key = baseline_key(base, digest)
    try:
        data = storage.get(key) if key else None
    except NotFound:
        return None
    return None if data is None else decode_baseline(data)


def decode_baseline(data: bytes) -> Baseline:
    """Baseline from the bytes of its npz; IntegrityError when an entry is missing or the bytes are no npz."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            values = {name: stored[name] for name in stored.files}
        sticks = {name: _stick(values, name) for name in ("outputs", "inputs")}
        plain: dict[str, Any] = {f.name: values[f.name] for f in fields(Baseline) if f.name not in sticks}
    except NPZ_ERRORS as error:
        raise IntegrityError(f"a baseline must be an npz with all its entries; got {error!r}; fit it anew") from error
    plain = {name: value if value.ndim else value.item() for name, value in plain.items()}
    return Baseline(**plain | sticks)


def _stick(values: dict[str, Array], name: str) -> Yardstick | None:
    if name == "inputs" and f"{name}.means_KW" not in values:
        return None
    found: dict[str, Any] = {f.name: values[f"{name}.{f.name}"] for f in fields(Yardstick)}
    return Yardstick(**found | {"tolerance": found["tolerance"].item()})


def fit_baseline(
    base: str,
    digest: str,
    reference: Sample,
    normal: Sample | None,
    base_baseline: Baseline | None,
    num_channels: int,
) -> Baseline:
    """Fit the baseline of one digest. Deterministic: equal samples give equal baselines.

    Args:
        base: digest of the base model.
        digest: adapter digest, or `base`.
        reference: the labelled old world seen through this digest, N >= 8, all outputs finite.
        normal: traffic this digest was made for, seen through it, N >= 8; None: the reference itself.
        base_baseline: for an adapter, the base's baseline, whose coordinates are kept; None for the base.
        num_channels: C of the input.

    Raises:
        DataError: too few instances, non-finite embeddings or logits, or widths that differ.
    """
    for name, sample in (("reference", reference), ("normal", normal)):
        if sample is not None:
            _require_usable(name, sample, num_channels)
    values: dict[str, Any] = {"base": base, "digest": digest, "num_channels": num_channels}
    values["num_classes"] = reference.logits_NK.shape[1]
    values |= fit_coordinates(reference) if base_baseline is None else _coordinates_of(base_baseline)
    values |= fit_outputs(reference, normal or reference)
    draft = Baseline(**{f.name: values.get(f.name, np.zeros(0)) for f in fields(Baseline)})
    values |= _fit_inputs(draft, reference, normal or reference)
    draft = Baseline(**{f.name: values.get(f.name, np.zeros(0)) for f in fields(Baseline)})
    return Baseline(**values | _fit_features(draft, reference, normal or reference))


def _require_usable(name: str, sample: Sample, num_channels: int) -> None:
    num = len(sample.logits_NK)
    if num < MIN_INSTANCES:
        raise DataError(f"the {name} sample must have >= {MIN_INSTANCES} instances; got {num}; add more data")
    if not (np.isfinite(sample.embedding_ND).all() and np.isfinite(sample.logits_NK).all()):
        raise DataError(f"the {name} sample must have finite embeddings and logits; got NaN or infinity")
    if sample.channel_means_NC.shape[1] != num_channels:
        raise DataError(f"the {name} sample must have {num_channels} channels; got {sample.channel_means_NC.shape[1]}")


def _coordinates_of(base_baseline: Baseline) -> dict[str, Any]:
    names = ("center_D", "projection_DP", "frequencies_PF")
    return {name: getattr(base_baseline, name) for name in names}


def _fit_inputs(draft: Baseline, reference: Sample, normal: Sample) -> dict[str, Any]:
    """Channel moments, the sketch, range of values and the rates of input checks."""
    means_NC = np.asarray(reference.channel_means_NC, dtype=np.float64)
    squares_NC = np.asarray(reference.channel_squares_NC, dtype=np.float64)
    usable_N = np.isfinite(means_NC).all(axis=1) & np.isfinite(squares_NC).all(axis=1)
    mu_C = means_NC[usable_N].mean(axis=0) if usable_N.any() else np.zeros(means_NC.shape[1])
    second_C = squares_NC[usable_N].mean(axis=0) if usable_N.any() else np.ones(means_NC.shape[1])
    sd_C = np.sqrt(np.maximum(second_C - mu_C**2, 0.0))
    scale_C = np.where(sd_C > 1e-6 * (1.0 + np.abs(mu_C)), sd_C, 1.0)
    low = float(min(np.nanmin(reference.input_min_N), np.nanmin(normal.input_min_N)))
    high = float(max(np.nanmax(reference.input_max_N), np.nanmax(normal.input_max_N)))
    margin = 0.5 * (high - low)  # a brighter camera is drift; a missing normalisation is far outside
    found: dict[str, Any] = {"channel_mean_C": mu_C, "channel_scale_C": scale_C, **fit_sketch(reference.sketch_NS)}
    found |= {"input_low": low - margin, "input_high": high + margin}
    scaled = Baseline(**{f.name: found.get(f.name, getattr(draft, f.name)) for f in fields(Baseline)})
    checks = normal.checks()
    z_NC, v_NC = standardised_channels(scaled, checks)
    pairs = draft.layout.pairs
    found["normal_channels_3C"] = np.stack([z_NC.mean(axis=0), v_NC.mean(axis=0), z_NC.std(axis=0)])
    found["channel_products_P"] = np.array([(z_NC[:, i] * z_NC[:, j]).mean() for i, j in pairs], dtype=np.float64)
    found["check_rates"] = np.array(count_checks(scaled, checks, 0), dtype=np.float64) / len(z_NC)
    assert len(found["check_rates"]) == len(CHECKS)
    inputs_NX = standardised_inputs(scaled, checks)
    found["normal_inputs_2X"] = np.stack([inputs_NX.mean(axis=0), inputs_NX.std(axis=0)])
    found |= _fit_classes(scaled, reference)
    return found


def _fit_classes(scaled: Baseline, reference: Sample) -> dict[str, Any]:
    """What the reference looks like class by class: the yardstick of a prior shift, which leaves all of it alone."""
    truth_N = true_classes(reference)
    inputs_NX = standardised_inputs(scaled, reference.checks())
    confidence_N = probabilities(reference.logits_NK, scaled.temperature).max(axis=1)
    bins_N = np.searchsorted(scaled.confidence_edges_E, confidence_N, side="right")
    inputs_KX = np.tile(inputs_NX.mean(axis=0), (scaled.num_classes, 1))
    shares_KB = np.tile(np.bincount(bins_N, minlength=NUM_BINS) / len(bins_N), (scaled.num_classes, 1))
    for k in np.unique(truth_N):
        rows_N = truth_N == k
        inputs_KX[k] = inputs_NX[rows_N].mean(axis=0)
        shares_KB[k] = np.bincount(bins_N[rows_N], minlength=NUM_BINS) / rows_N.sum()
    counts_K = np.bincount(truth_N, minlength=scaled.num_classes)
    return {"class_inputs_KX": inputs_KX, "class_confidence_KB": shares_KB, "class_counts_K": counts_K}


def _fit_features(draft: Baseline, reference: Sample, normal: Sample) -> dict[str, Any]:
    """Feature means of both worlds, class-conditional means, and what the tests measure by."""
    rng = np.random.default_rng(_SEED)
    reference_NM = fourier_features(draft, reference.embedding_ND)
    normal_NM = reference_NM if normal is reference else fourier_features(draft, normal.embedding_ND)
    truth_N = true_classes(reference)
    means_KM = np.tile(reference_NM.mean(axis=0), (draft.num_classes, 1))
    for k in np.unique(truth_N):
        means_KM[k] = reference_NM[truth_N == k].mean(axis=0)
    return {
        "normal_mean_M": normal_NM.mean(axis=0),
        "reference_mean_M": reference_NM.mean(axis=0),
        "normal_count": len(normal_NM),
        "reference_count": len(reference_NM),
        "outputs": _fit_outputs_stick(draft, normal, normal_NM, rng),
        "inputs": _fit_inputs_stick(draft, normal, rng),
        "classes_table_T": gaussian_table(np.ones(max(draft.num_classes - 1, 1)), rng),
        "class_means_KM": means_KM.astype(np.float32),
    }


def _fit_outputs_stick(draft: Baseline, normal: Sample, normal_NM: Array, rng: np.random.Generator) -> Yardstick:
    entropy_N1 = entropies(probabilities(normal.logits_NK, draft.temperature))[:, None]
    raw_NV = np.concatenate([normal_NM, entropy_N1], axis=1)
    predicted_N, truth_N = normal.logits_NK.argmax(axis=1), true_classes(normal)
    means_KV = class_means(raw_NV, predicted_N, truth_N, draft.num_classes)
    weights_V = score_weights(raw_NV - means_KV[predicted_N], ENTROPY_SHARE)
    return fit_yardstick(raw_NV, weights_V, predicted_N, truth_N, draft.num_classes, TOLERANCE, rng)


def _fit_inputs_stick(draft: Baseline, normal: Sample, rng: np.random.Generator) -> Yardstick | None:
    if draft.num_channels > MAX_TESTED_CHANNELS:
        return None
    raw_NV = np.concatenate(standardised_channels(draft, normal.checks()), axis=1)
    predicted_N, truth_N = normal.logits_NK.argmax(axis=1), true_classes(normal)
    mix_VW = whitening_mix(raw_NV)
    if not mix_VW.shape[1]:
        return None
    return fit_yardstick(raw_NV, mix_VW, predicted_N, truth_N, draft.num_classes, INPUT_TOLERANCE, rng)
