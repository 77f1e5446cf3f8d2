"""The parts of a baseline that need nothing but a sample: coordinates of the embedding, calibration of the outputs.

Called by `baseline.fit_baseline` only. Pure and deterministic.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.drift.sample import Sample, labelled
from orchestrator.drift.statistics import NUM_BINS, SKETCH, entropies, probabilities
from orchestrator.settings import FOURIER_FEATURES, PCA_DIMENSIONS

Array = NDArray[Any]

BANDWIDTH_PAIRS = 4096  # random pairs behind the median heuristic
ROWS_PER_DIMENSION = 16  # of the PCA, at least
MIN_HELD_SHARE = 0.95  # of the variance along directions chosen on other rows, from which they are believed
LEAST_SCALE = 0.01  # of a sketch value, in the reference's mean extent (largest less smallest value of an image)
LEAST_SHARE_SCALE = 0.1  # of a sketch value that is 0 or 1
_SEED = 20240229


def fit_coordinates(reference: Sample) -> dict[str, Any]:
    """PCA to at most 64 whitened dimensions, and Gaussian frequencies for a kernel as wide as the median distance.

    Whitened by its own covariance, a sample looks narrower than fresh traffic ever will, by 1 + P / N in variance to
    first order: the scale makes up for it, and few rows get few dimensions. Directions that were chosen for their
    variance look wider than they are on top of that, unless they lead by far; where they do not, random ones are taken.
    """
    rng = np.random.default_rng(_SEED)
    embedding_ND = np.asarray(reference.embedding_ND, dtype=np.float64)
    num = len(embedding_ND)
    center_D = embedding_ND.mean(axis=0)
    keep = min(PCA_DIMENSIONS, max(1, num // ROWS_PER_DIMENSION), embedding_ND.shape[1])
    values_P, vectors_DP = _directions(embedding_ND - center_D, keep)
    used_P = values_P > max(1e-6 * values_P[0], 1e-12)
    used_P[0] = True  # a constant embedding keeps one dimension, of zeros
    scale_P = np.where(values_P > 1e-12, 1.0 / np.sqrt(np.maximum(values_P, 1e-12)), 0.0)[used_P]
    projection_DP = vectors_DP[:, used_P] * scale_P / np.sqrt(1.0 + used_P.sum() / num)
    z_NP = (embedding_ND - center_D) @ projection_DP
    pairs_2N = rng.integers(0, len(z_NP), size=(2, BANDWIDTH_PAIRS))
    distance_N = np.linalg.norm(z_NP[pairs_2N[0]] - z_NP[pairs_2N[1]], axis=1)
    width = float(np.median(distance_N[distance_N > 0])) if (distance_N > 0).any() else 1.0
    frequencies_PF = rng.standard_normal((projection_DP.shape[1], FOURIER_FEATURES // 2)) / width
    as32 = {"center_D": center_D, "projection_DP": projection_DP, "frequencies_PF": frequencies_PF}
    return {name: value.astype(np.float32) for name, value in as32.items()}  # what probes compute in


def _directions(centred_ND: Array, keep: int) -> tuple[Array, Array]:
    """Variances (P,), largest first, and orthonormal directions (D, P) of what is kept of an embedding."""
    values_P, vectors_DP = _leading(centred_ND, keep)
    if keep == centred_ND.shape[1] or _held_share(centred_ND, keep) >= MIN_HELD_SHARE:
        return values_P, vectors_DP
    rng = np.random.default_rng(_SEED + 1)
    basis_DP = np.linalg.qr(rng.standard_normal((centred_ND.shape[1], keep)))[0]
    values_P, turned_PP = _leading(centred_ND @ basis_DP, keep)
    return values_P, basis_DP @ turned_PP


def _leading(centred_ND: Array, keep: int) -> tuple[Array, Array]:
    """The `keep` largest eigenvalues of the covariance, and their eigenvectors."""
    values_D, vectors_DD = np.linalg.eigh(np.atleast_2d(np.cov(centred_ND, rowvar=False)))
    return values_D[::-1][:keep], vectors_DD[:, ::-1][:, :keep]


def _held_share(centred_ND: Array, keep: int) -> float:
    """Variance along the leading directions of one half of the rows, on the other half, in that on the first."""
    order_N = np.random.default_rng(_SEED + 2).permutation(len(centred_ND))
    first_N, second_N = np.array_split(order_N, 2)
    values_P, vectors_DP = _leading(centred_ND[first_N], keep)
    used_P = values_P > 1e-12
    seen_P = (centred_ND[second_N] @ vectors_DP).var(axis=0)
    return float((seen_P[used_P] / values_P[used_P]).mean()) if used_P.any() else 1.0


def fit_temperature(logits_NK: Array, labels_N: Array) -> float:
    """Temperature of least negative log likelihood among 121 in [0.1, 10]; 1.0 without labels.

    Source: Guo et al. 2017, On calibration of modern neural networks.
    """
    if len(labels_N) == 0:
        return 1.0
    candidates = np.geomspace(0.1, 10.0, 121)
    rows = np.arange(len(labels_N))
    losses = [-np.log(np.maximum(probabilities(logits_NK, t)[rows, labels_N], 1e-12)).mean() for t in candidates]
    return float(candidates[int(np.argmin(losses))])


def fit_outputs(reference: Sample, normal: Sample) -> dict[str, Any]:
    """Class shares, confusion, calibration and histogram edges."""
    labels_N, known_N = labelled(reference)
    num_classes = reference.logits_NK.shape[1]
    temperature = fit_temperature(reference.logits_NK[known_N], labels_N[known_N])
    probs_NK = probabilities(reference.logits_NK, temperature)
    predicted_N, confidence_N = probs_NK.argmax(axis=1), probs_NK.max(axis=1)
    truth_N = np.where(known_N, labels_N, predicted_N)
    confusion_KK = np.zeros((num_classes, num_classes))
    np.add.at(confusion_KK, (predicted_N, truth_N), 1.0 / len(truth_N))
    accuracy = float((predicted_N == labels_N)[known_N].mean()) if known_N.any() else float("nan")
    grid = np.arange(1, NUM_BINS) / NUM_BINS
    edges_E = np.quantile(confidence_N, grid)
    atc = float("nan")
    if known_N.any():  # the nearest edge moves onto the threshold, so that histograms give its share exactly
        atc = float(np.quantile(confidence_N, 1.0 - accuracy))
        edges_E[int(np.argmin(np.abs(grid - (1.0 - accuracy))))] = atc
        edges_E.sort()
    bins_N = np.searchsorted(edges_E, confidence_N, side="right")
    score_N = np.where(known_N, predicted_N == labels_N, confidence_N)
    weight_B = np.bincount(bins_N, minlength=NUM_BINS)
    prior = accuracy if known_N.any() else float(confidence_N.mean())
    entropy_edges_E = np.quantile(entropies(probs_NK), grid)
    normal_NK = probabilities(normal.logits_NK, temperature)
    normal_bins_N = np.searchsorted(edges_E, normal_NK.max(axis=1), side="right")
    entropy_bins_N = np.searchsorted(entropy_edges_E, entropies(normal_NK), side="right")
    return {
        "class_shares_K": np.bincount(normal_NK.argmax(axis=1), minlength=num_classes) / len(normal_NK),
        "reference_class_shares_K": np.bincount(predicted_N, minlength=num_classes) / len(predicted_N),
        "confusion_KK": confusion_KK,
        "temperature": temperature,
        "accuracy": accuracy,
        "mean_confidence": float(normal_NK.max(axis=1).mean()),
        "reference_confidence": float(confidence_N.mean()),
        "confidence_edges_E": edges_E,
        "entropy_edges_E": entropy_edges_E,
        "confidence_shares_B": np.bincount(normal_bins_N, minlength=NUM_BINS) / len(normal_NK),
        "entropy_shares_B": np.bincount(entropy_bins_N, minlength=NUM_BINS) / len(normal_NK),
        "bin_accuracy_B": (np.bincount(bins_N, score_N, NUM_BINS) + prior) / (weight_B + 1.0),
        "atc_threshold": atc,
    }


def fit_sketch(sketch_NS: Array | None) -> dict[str, Array]:
    """Mean and scale of the reference's sketch; what hardly varies gets the scale of what would be seen by eye."""
    if sketch_NS is None or sketch_NS.shape[1] == 0:
        return {"sketch_mean_S": np.zeros(0), "sketch_scale_S": np.zeros(0)}
    rows_NS = np.asarray(sketch_NS, dtype=np.float64)
    usable_N = np.isfinite(rows_NS).all(axis=1)
    rows_NS = rows_NS[usable_N] if usable_N.any() else np.zeros((1, rows_NS.shape[1]))
    mean_S = rows_NS.mean(axis=0)
    extent = mean_S[SKETCH.index("high")] - mean_S[SKETCH.index("low")]
    yes_or_no_S = np.array([name == "grey" or name.startswith("flat") for name in SKETCH])
    floor_S = np.where(yes_or_no_S, LEAST_SHARE_SCALE, max(LEAST_SCALE * extent, 1e-9))
    return {"sketch_mean_S": mean_S, "sketch_scale_S": np.maximum(rows_NS.std(axis=0), floor_S)}
