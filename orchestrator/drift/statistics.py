"""What a window of traffic is reduced to: one vector of integers that adds up.

Replicas fill it (`serve_app.probe`, in torch), the monitor merges and reads it. `summarise` is the same computation in
numpy float64: the oracle of the probe and the way offline data is reduced. Integers, because sums of floats depend on
their order. Must not know torch, Ray, clock or disk.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.messages import Window
from orchestrator.settings import FEATURE_SCALE, FOURIER_FEATURES, FOURIER_SCALE

if TYPE_CHECKING:
    from orchestrator.drift.baseline import Baseline

Array = NDArray[Any]

NUM_BINS = 16  # of the confidence and the entropy histogram; edges are reference quantiles
MAX_PRODUCT_CHANNELS = 4  # cross-products of channel means up to this many channels (RGBA), none above
EMBEDDING_CLIP = 10.0  # projected embeddings are clipped to +- this many scales, which bounds the phases
CHANNEL_CLIP = 1.0e3  # standardised channel means are clipped to +- this, squares to its square
SKETCH_CLIP = 1.0e2  # standardised sketch values are clipped to +- this
CHECKS = ("nan", "invalid", "constant", "out_of_range", "duplicates")  # order of the input-check counters
CELLS = 16  # a 4 x 4 grid over the image
# Order of an image's sketch. Brightness is of a cell less the image's own; flat is 1 where a cell has one value only.
SKETCH = (
    "gradient_x", "gradient_y", "contrast", "low", "high", "grey",
    *(f"brightness_{cell}" for cell in range(CELLS)), *(f"flat_{cell}" for cell in range(CELLS)),
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Where each statistic lies in the vector of a window.

    Args:
        num_classes: width K of the logits, >= 1.
        num_channels: channels C of the input (columns of a table), >= 1.
        num_sketch: width S of the input sketch: len(SKETCH) for images, 0 for anything else.
    """

    num_classes: int
    num_channels: int
    num_sketch: int = 0

    @cached_property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Channel pairs (i, j), i <= j, whose products of instance means are summed; empty above 4 channels."""
        if self.num_channels > MAX_PRODUCT_CHANNELS:
            return ()
        return tuple((i, j) for i in range(self.num_channels) for j in range(i, self.num_channels))

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Every part by name, in the order of the vector."""
        parts = {
            "features": FOURIER_FEATURES,
            "classes": self.num_classes,
            "confidence": NUM_BINS,
            "entropy": NUM_BINS,
            "confidence_sum": 1,
            "entropy_sum": 1,
            "channel_means": self.num_channels,
            "channel_squares": self.num_channels,
            "channel_products": len(self.pairs),
            "sketch": self.num_sketch,
            "checks": len(CHECKS),
        }
        ends = np.cumsum(list(parts.values())).tolist()
        return {name: slice(end - width, end) for (name, width), end in zip(parts.items(), ends, strict=True)}

    @property
    def size(self) -> int:
        """Length of the vector."""
        return int(self.slices["checks"].stop)


@dataclass(frozen=True)
class InputChecks:
    """What is known of N raw inputs without keeping them.

    `channel_means_NC` and `channel_squares_NC` are means of x and of x*x over all positions of a channel, in input
    units; `input_min_N` and `input_max_N` are over all values, NaN ignored; `nan_N` is > 0 where an input holds a
    non-finite value; `hashes_N` are integers that are equal for equal inputs, or None when not computed; `sketch_NS`
    says how an image is laid out (see SKETCH, input units), (N, 0) for anything else.
    """

    channel_means_NC: Array
    channel_squares_NC: Array
    input_min_N: Array
    input_max_N: Array
    nan_N: Array
    hashes_N: Array | None = None
    sketch_NS: Array | None = None


def probabilities(logits_NK: Array, temperature: float = 1.0) -> Array:
    """Softmax of logits / temperature: float64 (N, K); rows of non-finite logits are NaN. N may be 0."""
    with np.errstate(invalid="ignore", over="ignore"):
        scaled_NK = np.asarray(logits_NK, dtype=np.float64) / temperature
        exp_NK = np.exp(scaled_NK - scaled_NK.max(axis=1, keepdims=True))
        return np.asarray(exp_NK / exp_NK.sum(axis=1, keepdims=True))


def entropies(probabilities_NK: Array) -> Array:
    """Entropy in nats of each row: float64 (N,); 0 log 0 is 0."""
    return np.asarray(-(probabilities_NK * np.log(np.maximum(probabilities_NK, 1e-30))).sum(axis=1))


def squared_gap(features_NM: Array, mean_M: Array, mean_variance: float = 0.0) -> float:
    """Squared distance of a sample's mean features to a mean, less its expectation by chance; at least 0.

    Args:
        features_NM: features of the sample, N >= 1.
        mean_M: what they are compared with.
        mean_variance: summed variance of `mean_M` itself; 0 where it is taken as exact.
    """
    gap_M = features_NM.mean(axis=0) - mean_M
    chance = float(features_NM.var(axis=0).sum()) / len(features_NM) + mean_variance
    return max(0.0, float(gap_M @ gap_M) - chance)


def fourier_features(baseline: Baseline, embedding_ND: Array) -> Array:
    """Random Fourier features of the projected embedding.

    z = clip((embedding - center) @ projection, +-EMBEDDING_CLIP); [cos(z @ frequencies), sin(z @ frequencies)].

    Args:
        baseline: holds center_D, projection_DP and frequencies_PF.
        embedding_ND: floats (N, D), N >= 0; NaN in, NaN out.

    Returns:
        float64 (N, FOURIER_FEATURES), in [-1, 1], cosines first.

    Source: Rahimi & Recht 2007, Random features for large-scale kernel machines.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        centred_ND = np.asarray(embedding_ND, dtype=np.float64) - baseline.center_D
        z_NP = np.clip(centred_ND @ baseline.projection_DP, -EMBEDDING_CLIP, EMBEDDING_CLIP)
        phase_NF = (z_NP @ baseline.frequencies_PF).astype(np.float32)  # cosines to 1e-5, a tenth of the time
        return np.concatenate([np.cos(phase_NF), np.sin(phase_NF)], axis=1).astype(np.float64)


def standardised_channels(baseline: Baseline, checks: InputChecks) -> tuple[Array, Array]:
    """Channel means and second moments about the reference mean, in reference scales.

    means = (m - mu) / s; squares = (q - 2 mu m + mu^2) / s^2, so 0 and 1 on the reference. Clipped to +-CHANNEL_CLIP
    and to [0, CHANNEL_CLIP^2]; where an instance's mean or square is not finite: 0 and 1, that is no evidence.

    Returns:
        Two float64 arrays (N, C).
    """
    mean_NC = np.asarray(checks.channel_means_NC, dtype=np.float64)
    square_NC = np.asarray(checks.channel_squares_NC, dtype=np.float64)
    mu_C, scale_C = baseline.channel_mean_C, baseline.channel_scale_C
    with np.errstate(invalid="ignore", over="ignore"):
        usable_NC = np.isfinite(mean_NC) & np.isfinite(square_NC)
        z_NC = np.clip((mean_NC - mu_C) / scale_C, -CHANNEL_CLIP, CHANNEL_CLIP)
        v_NC = np.clip((square_NC - 2 * mu_C * mean_NC + mu_C**2) / scale_C**2, 0.0, CHANNEL_CLIP**2)
    return np.where(usable_NC, z_NC, 0.0), np.where(usable_NC, v_NC, 1.0)


def standardised_sketch(baseline: Baseline, sketch_NS: Array) -> Array:
    """(sketch - mean) / scale of the reference, clipped to +-SKETCH_CLIP; 0 where not finite: float64 (N, S)."""
    with np.errstate(invalid="ignore", over="ignore"):
        z_NS = (np.asarray(sketch_NS, dtype=np.float64) - baseline.sketch_mean_S) / baseline.sketch_scale_S
        return np.where(np.isfinite(z_NS), np.clip(z_NS, -SKETCH_CLIP, SKETCH_CLIP), 0.0)


def standardised_inputs(baseline: Baseline, checks: InputChecks) -> Array:
    """All that is known of the inputs side by side: channel means, squares, sketch; standardised, float64 (N, X)."""
    parts = [*standardised_channels(baseline, checks)]
    if checks.sketch_NS is not None and len(baseline.sketch_mean_S):
        parts.append(standardised_sketch(baseline, checks.sketch_NS))
    return np.concatenate(parts, axis=1)


def _histogram(values_N: Array, edges_E: Array) -> Array:
    return np.bincount(np.searchsorted(edges_E, values_N, side="right"), minlength=NUM_BINS)


def _quantise(values_NX: Array, scale: int = FEATURE_SCALE) -> Array:
    return np.asarray(np.rint(values_NX * scale).astype(np.int64).sum(axis=0))


def summarise(
    baseline: Baseline, layout: Layout, embedding_ND: Array, logits_NK: Array, checks: InputChecks
) -> NDArray[np.int64]:
    """Reduce N instances to the vector of a window.

    Every real quantity is rounded to 1 / FEATURE_SCALE (features: FOURIER_SCALE) per instance, then summed, so that any
    grouping into batches gives the same sums; only duplicates depend on it: they are counted within one call. A row
    whose embedding or logits are not finite counts as `invalid` and adds nothing to features, classes and histograms.

    Args:
        baseline: of the digest that answered.
        layout: of the same model.
        embedding_ND: floats (N, D), N >= 0.
        logits_NK: floats (N, K).
        checks: of the same N inputs.

    Returns:
        int64 (layout.size,); zeros for N = 0.
    """
    sums = np.zeros(layout.size, dtype=np.int64)
    if len(logits_NK) == 0:
        return sums
    at = layout.slices
    valid_N = np.isfinite(embedding_ND).all(axis=1) & np.isfinite(logits_NK).all(axis=1)
    probs_NK = probabilities(logits_NK[valid_N], baseline.temperature)
    confidence_N = probs_NK.max(axis=1)
    sums[at["features"]] = _quantise(fourier_features(baseline, embedding_ND[valid_N]), FOURIER_SCALE)
    sums[at["classes"]] = np.bincount(logits_NK[valid_N].argmax(axis=1), minlength=layout.num_classes)
    sums[at["confidence"]] = _histogram(confidence_N, baseline.confidence_edges_E)
    entropy_N = entropies(probs_NK)
    sums[at["entropy"]] = _histogram(entropy_N, baseline.entropy_edges_E)
    sums[at["entropy_sum"]] = _quantise(entropy_N)
    sums[at["confidence_sum"]] = _quantise(confidence_N)
    z_NC, v_NC = standardised_channels(baseline, checks)
    sums[at["channel_means"]] = _quantise(z_NC)
    sums[at["channel_squares"]] = _quantise(v_NC)
    if layout.pairs:
        sums[at["channel_products"]] = _quantise(np.stack([z_NC[:, i] * z_NC[:, j] for i, j in layout.pairs], axis=1))
    if layout.num_sketch and checks.sketch_NS is not None:
        sums[at["sketch"]] = _quantise(standardised_sketch(baseline, checks.sketch_NS))
    sums[at["checks"]] = count_checks(baseline, checks, int((~valid_N).sum()))
    return sums


def count_checks(baseline: Baseline, checks: InputChecks, num_invalid: int) -> list[int]:
    """Numbers of anomalous inputs in the order of CHECKS; `baseline` gives the reference range of values."""
    low_N, high_N = checks.input_min_N, checks.input_max_N
    outside_N = (low_N < baseline.input_low) | (high_N > baseline.input_high)  # False for NaN: counted as nan
    duplicates = 0 if checks.hashes_N is None else len(checks.hashes_N) - len(np.unique(checks.hashes_N))
    nan = int((np.asarray(checks.nan_N) > 0).sum())
    return [nan, num_invalid, int((low_N == high_N).sum()), int(outside_N.sum()), duplicates]


@dataclass(frozen=True)
class Summary:
    """The vector of a window as means and shares. `num_valid` instances have finite outputs; 0 of them gives zeros."""

    count: int
    num_valid: int
    feature_mean_M: Array
    class_shares_K: Array
    confidence_shares_B: Array
    entropy_shares_B: Array
    mean_confidence: float
    channel_means_C: Array
    channel_squares_C: Array
    channel_products_P: Array
    sketch_S: Array  # standardised: 0 where as on the reference
    check_counts: dict[str, int]


def read(layout: Layout, window: Window) -> Summary:
    """Means and shares of a window; raises ValueError when its vector has another length than the layout."""
    if len(window.sums) != layout.size:
        raise ValueError(f"a window's vector must have {layout.size} entries; got {len(window.sums)}")
    at, sums = layout.slices, window.sums
    checks = dict(zip(CHECKS, (int(v) for v in sums[at["checks"]]), strict=True))
    valid = max(window.count - checks["invalid"], 0)
    per_valid, per_count = 1.0 / max(valid, 1), 1.0 / max(window.count, 1)
    return Summary(
        count=window.count,
        num_valid=valid,
        feature_mean_M=sums[at["features"]] * (per_valid / FOURIER_SCALE),
        class_shares_K=sums[at["classes"]] * per_valid,
        confidence_shares_B=sums[at["confidence"]] * per_valid,
        entropy_shares_B=sums[at["entropy"]] * per_valid,
        mean_confidence=float(sums[at["confidence_sum"]][0]) * per_valid / FEATURE_SCALE,
        channel_means_C=sums[at["channel_means"]] * (per_count / FEATURE_SCALE),
        channel_squares_C=sums[at["channel_squares"]] * (per_count / FEATURE_SCALE),
        channel_products_P=sums[at["channel_products"]] * (per_count / FEATURE_SCALE),
        sketch_S=sums[at["sketch"]] * (per_count / FEATURE_SCALE),
        check_counts=checks,
    )


def merge(windows: Iterable[Window]) -> Window:
    """Add windows of one (base, digest) up; exact, associative and commutative.

    Args:
        windows: at least one; where segments differ the result's segment is "*".

    Raises:
        ValueError: no window, or windows of different base or digest.
    """
    parts = list(windows)
    if not parts:
        raise ValueError("merge needs at least one window; got none")
    keys = {(w.base, w.digest) for w in parts}
    if len(keys) > 1:
        raise ValueError(f"windows to merge must share base and digest; got {sorted(keys)}")
    segments = {w.segment for w in parts}
    return Window(
        base=parts[0].base,
        digest=parts[0].digest,
        segment=segments.pop() if len(segments) == 1 else "*",
        count=sum(w.count for w in parts),
        first_s=min(w.first_s for w in parts),
        last_s=max(w.last_s for w in parts),
        sums=np.asarray(np.sum([w.sums for w in parts], axis=0, dtype=np.int64)),
    )
