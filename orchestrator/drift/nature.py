"""What light, weather, noise, blur and lenses leave intact, and a broken pipeline does not.

Whatever they do, an image remains a picture of the same world: the mean image keeps its layout up to one gain; what
contrast there is comes from that layout's world, from grain (which raises the gradients of both directions) or from a
veil (which takes contrast away); grey levels do not pile up at two ends; channels brighten and darken together. None
of the rules knows a fault: one that they meet is `unknown`, with the invariant that it breaks. Called by `diagnosis`
after everything that has a name; pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from orchestrator.drift.case import BRIGHTNESS, Array, Case, Finding
from orchestrator.messages import Kind

# Limits lie between what 19 blends of 6 corruptions and 13 other drifts of CIFAR-10 reach and what 8 faults do.
MAX_STRAY_LAYOUT = 0.08  # squared length of the mean layout that no gain explains, in its own (drifts <= 0.07)
STRAY_NOISE = 3.0  # and in what sampling alone leaves
MIN_KEPT_LAYOUT = 0.55  # gain of the layout in that of the contrast (drifts >= 0.58, sampling error on top) ...
LAYOUT_SIGMAS = 2.0  # ... by as many standard errors of that gain
MAX_SPREAD = 0.36  # contrast without grain in the images' extent: 0.29 for even grey levels, 0.5 for two of them
MIN_CORRELATION = 0.1  # of two channels' means over instances, where it is > NORMAL_CORRELATION in normal traffic
NORMAL_CORRELATION = 0.5


@dataclass(frozen=True)
class Picture:
    """Gains of the image against normal traffic, each in that of one of its properties."""

    contrast: float
    signal: float  # contrast without grain
    layout: float  # of the mean layout
    layout_error: float  # its standard error
    stray: float  # squared length of the layout that no gain explains, less what sampling leaves, input units
    noise: float  # what sampling leaves
    length: float  # squared length of the layout


def find_unnatural(case: Case) -> Finding | None:
    """Images of which no change of the world makes what is seen."""
    return find_misplaced(case) or find_misshapen(case)


def find_misplaced(case: Case) -> Finding | None:
    """Parts of the image are not where they were."""
    if not case.has_sketch:
        return None
    seen = picture_of(case)
    if seen.stray > MAX_STRAY_LAYOUT * seen.length and seen.stray > (STRAY_NOISE - 1.0) * seen.noise:
        share = seen.stray / seen.length
        return _unknown("layout", f"no gain explains {share:.2f} > {MAX_STRAY_LAYOUT} of the mean layout", share)
    return None


def find_misshapen(case: Case) -> Finding | None:
    """Grey levels and colours are not those of a picture any more, wherever they lie."""
    if not case.has_sketch:
        return None
    seen = picture_of(case)
    kept = (seen.layout + LAYOUT_SIGMAS * seen.layout_error) / max(seen.contrast, 1e-9)
    if kept < MIN_KEPT_LAYOUT:
        words = f"the layout keeps at most {kept:.2f} < {MIN_KEPT_LAYOUT} of what the contrast keeps"
        return _unknown("kept_layout", words, kept)
    spread = seen.signal * case.sketched("contrast")[1] / max(case.sketched("high")[0] - case.sketched("low")[0], 1e-9)
    if spread > MAX_SPREAD:
        return _unknown("spread", f"grey levels lie at two ends: spread {spread:.2f} > {MAX_SPREAD}", spread)
    return _find_parted(case)


def picture_of(case: Case) -> Picture:
    """Measure the gains.

    White grain of variance s adds s to the squared contrast and 2 s to the squared gradients; without it both have the
    signal's gain. The two equations give that gain. Blur takes gradients, so it looks like a little more signal.
    """
    (contrast, before), (across, before_across) = case.sketched("contrast"), case.sketched("gradient_x")
    down, before_down = case.sketched("gradient_y")
    smooth = 2.0 * contrast**2 - 0.5 * (across**2 + down**2)
    smooth_before = 2.0 * before**2 - 0.5 * (before_across**2 + before_down**2)
    signal = math.sqrt(max(smooth, 0.0) / max(smooth_before, 1e-9)) if smooth_before > 0 else 0.0
    now_G, normal_G, sd_G = (part_S[BRIGHTNESS] for part_S in case.sketch)
    views = normal_G, case.mixed_grid_G  # other classes have another layout
    gain, left, view_G = min((_fit(now_G, view_G) for view_G in views), key=lambda fit: fit[1])
    variance = float((sd_G**2).sum()) * max(signal, 0.1) ** 2 * case.inflation / case.summary.count
    length = max(float(view_G @ view_G), 1e-9)
    return Picture(
        contrast=contrast / max(before, 1e-9),
        signal=signal,
        layout=gain,
        # Cells of an image vary together, about a third of it along the mean layout itself.
        layout_error=math.sqrt(variance / 3.0 / length),
        stray=left - variance,
        noise=variance,
        length=max(float(now_G @ now_G), 1e-9),
    )


def _fit(now_G: Array, view_G: Array) -> tuple[float, float, Array]:
    """Best gain >= 0 of one layout, the squared length it leaves, and the layout."""
    gain = max(float(now_G @ view_G) / max(float(view_G @ view_G), 1e-9), 0.0)
    gap_G = now_G - gain * view_G
    return gain, float(gap_G @ gap_G), view_G


def _find_parted(case: Case) -> Finding | None:
    """Channels whose instance means went together and do not any more."""
    baseline, summary = case.baseline, case.summary
    now_P = _correlations(case, summary.channel_means_C, summary.channel_products_P)
    normal_P = _correlations(case, baseline.normal_channels_3C[0], baseline.channel_products_P)
    error = 2.0 / math.sqrt(max(summary.count, 1))
    parted_P = (normal_P > NORMAL_CORRELATION) & (now_P + error < MIN_CORRELATION)
    if not parted_P.any():
        return None
    now = float(now_P[parted_P].min())
    return _unknown("parted_channels", f"channels do not go together: {now:.2f} + {error:.2f} < {MIN_CORRELATION}", now)


def _correlations(case: Case, means_C: Array, products_P: Array) -> Array:
    """Correlation over instances of each pair of different channels' means; 1 where a channel does not vary."""
    pairs = case.baseline.layout.pairs
    values = dict(zip(pairs, products_P.tolist(), strict=True))
    covariance = {(i, j): value - means_C[i] * means_C[j] for (i, j), value in values.items()}
    found = []
    for i, j in (pair for pair in pairs if pair[0] != pair[1]):
        scale = math.sqrt(max(covariance[i, i], 0.0) * max(covariance[j, j], 0.0))
        found.append(covariance[i, j] / scale if scale > 1e-6 else 1.0)
    return np.array(found, dtype=np.float64)


def _unknown(check: str, words: str, value: float) -> Finding:
    reason = f"no light, weather, noise, blur or lens does this to images: {words}"
    return Finding(Kind.UNKNOWN, reason, {"check": check, check: float(value)})
