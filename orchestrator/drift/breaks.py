"""Broken inputs by name: which check fires, which channels are swapped, which gain, which way up.

A pipeline that breaks does so exactly, and on top of whatever the world does: a swap exchanges the channels' colours
whether or not there is fog. So a transform is believed when it explains what the plain order cannot, up to one common
gain and offset, which is all that light and lenses change in the long run. Called by `diagnosis`; pure.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from orchestrator.drift.case import BRIGHTNESS, FLAT, Array, Case, Finding
from orchestrator.drift.evidence import tolerated_rates
from orchestrator.drift.nature import find_misshapen
from orchestrator.drift.statistics import CHECKS, MAX_PRODUCT_CHANNELS
from orchestrator.messages import Kind

CHECK_SIGMAS = 4.0  # standard errors above the tolerated rate that make an input check speak
MIN_CHECK_SHARE = 0.05  # a rarer defect does not explain an alarm
GAIN_RANGE = (0.05, 8.0)  # input spread against normal: outside, a scale was forgotten or applied twice
COMMON_GAIN = (0.04, 1.6)  # by which light and lenses scale a contrast; a break is looked for on top of it
MIN_EXPLAINED = 30.0  # squared standard errors that a transform must explain and the plain order must not
MAX_LEFT = 0.2  # part of the plain layout's misfit that a turn may leave ...
MAX_LEFT_SWAP = 0.1  # ... and of the plain order's a swap: three channels have few ways to differ
TINT_TOLERANCE = 0.002  # squared log spreads by which a swap may fit worse than the plain order
KNOWN_SCALINGS = {  # name: channel means and standard deviations, for inputs in 0..1
    "mean 0.5, sd 0.5": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR-10's": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
SCALING_TOLERANCE = 0.08  # of the predicted means (in spreads) and of the spread
MIN_SPREAD = 0.02  # of a channel's normal spread: with less it is missing
FLAT_RISE = 0.5  # share of images in which a cell turned flat
GREY_RISE = 0.25  # share of images whose channels became equal
SCRAMBLED = 0.9  # gradient of an image, in that of unrelated pixels, from which nothing of it is left
TORN = 1.6  # how far the gradients of the two directions may come apart (rain 1.5, motion blur 1.8) ...
GROWN = 1.35  # ... while one of them grows against the contrast (rain 1.8, motion blur 0.9)


def find_bad_values(case: Case) -> Finding | None:
    """NaN, non-finite outputs, constant (black) inputs, values out of range, repeated inputs."""
    num = max(case.summary.count, 1)
    for name, tolerated in zip(CHECKS, tolerated_rates(case.baseline).tolist(), strict=True):
        share = case.summary.check_counts[name] / num
        limit = max(tolerated + CHECK_SIGMAS * math.sqrt(tolerated * (1.0 - tolerated) / num), MIN_CHECK_SHARE)
        if share > limit:
            reason = f"share of inputs with check '{name.replace('_', ' ')}' {share:.3f} > {limit:.3f}"
            return _broken(reason, name, share=share, limit=limit)
    return None


def find_gain(case: Case) -> Finding | None:
    """A forgotten or repeated normalisation: a well-known one fits, or the spread changes out of all measure."""
    mean_C, spread_C, normal_C, normal_spread_C = case.channels
    used_C = normal_spread_C > 1e-9 * (1.0 + np.abs(case.baseline.channel_mean_C))
    if not used_C.any():
        return None
    gain = float(np.median(spread_C[used_C] / normal_spread_C[used_C]))
    for name, predicted_C, predicted_spread_C in _scalings(normal_C, normal_spread_C):
        off_C = np.abs(mean_C - predicted_C) / predicted_spread_C
        ratio_C = np.abs(np.log(np.maximum(spread_C, 1e-12) / predicted_spread_C))
        if max(float(off_C.max()), float(ratio_C.max())) <= SCALING_TOLERANCE:
            return _broken(f"inputs look as if {name}: spread is {gain:.4g} of normal", "gain", gain=gain)
    if GAIN_RANGE[0] <= gain <= GAIN_RANGE[1]:
        return None
    low, high = GAIN_RANGE
    return _broken(f"spread of input values is {gain:.4g} of normal, outside [{low:g}, {high:g}]", "gain", gain=gain)


def _scalings(normal_C: Array, spread_C: Array) -> Iterator[tuple[str, Array, Array]]:
    """What the channels would be after a well-known mistake: name, means, spreads; those that hardly move left out."""
    known = {n: (np.array(m), np.array(s)) for n, (m, s) in KNOWN_SCALINGS.items() if len(normal_C) == len(m)}
    known["the division by 255"] = (np.zeros_like(normal_C), np.full_like(normal_C, 1 / 255))
    for name, (mean_C, sd_C) in known.items():
        yield from (
            (f"{words} ({name})", moved_C, moved_spread_C)
            for words, moved_C, moved_spread_C in (
                ("normalisation was left out", normal_C * sd_C + mean_C, spread_C * sd_C),
                ("normalisation and scaling were left out", 255 * (normal_C * sd_C + mean_C), 255 * spread_C * sd_C),
                ("normalisation was applied twice", (normal_C - mean_C) / sd_C, spread_C / sd_C),
            )
            if float(np.abs(np.log(moved_spread_C / np.maximum(spread_C, 1e-12))).min()) > math.log(1.5)
        )


def find_missing_channel(case: Case) -> Finding | None:
    """A channel that carries nothing any more, or channels that became copies of one another."""
    _, spread_C, _, normal_C = case.channels
    kept_C = spread_C / np.maximum(normal_C, 1e-12)
    if 1 < len(kept_C) <= MAX_PRODUCT_CHANNELS and kept_C.max() > 0.1:
        missing = np.flatnonzero((kept_C < MIN_SPREAD) & (normal_C > 1e-9)).tolist()
        if missing:
            return _broken(f"input channels {missing} carry nothing any more", "missing_channel", channels=str(missing))
    if case.has_sketch and case.baseline.num_channels > 1:
        now, before = case.sketched("grey")
        if now - before > GREY_RISE:
            reason = f"share of images with equal channels {now:.3f} > {before + GREY_RISE:.3f}"
            return _broken(reason, "grey", share=now)
    return None


def find_swap(case: Case) -> Finding | None:
    """Channels in another order: their colour contrasts fit normal ones in that order, and only in that order.

    A tint moves a channel's mean and spread the same way, a swap need not: the spreads must not contradict. Nor may it
    be no image any more: broken colours fit some order by chance.
    """
    num_channels = case.baseline.num_channels
    if not 2 <= num_channels <= MAX_PRODUCT_CHANNELS or find_misshapen(case) is not None:
        return None
    mean_C, spread_C, normal_C, normal_spread_C = case.channels
    weights_CC = _contrast_weights(case)
    now_C, before_C = mean_C - mean_C.mean(), normal_C - normal_C.mean()
    tint_C = _contrast(np.log(np.maximum(spread_C, 1e-12)))
    normal_tint_C = _contrast(np.log(np.maximum(normal_spread_C, 1e-12)))
    same = tuple(range(num_channels))
    orders: dict[Any, Array] = {order: before_C[list(order)] for order in itertools.permutations(same)}
    mixed_C = case.baseline.channel_scale_C * case.mixed_X[:num_channels] + case.baseline.channel_mean_C
    plain = {same: orders.pop(same), "classes": _contrast(mixed_C)}
    best = _explain(case, now_C, orders, plain, weights_CC, MAX_LEFT_SWAP)
    if best is None:
        return None
    order, words = best
    against = ((tint_C - normal_tint_C[list(order)]) ** 2).sum() - ((tint_C - normal_tint_C) ** 2).sum()
    if against > TINT_TOLERANCE:
        return None
    return _broken(
        f"input channels fit normal in the order {list(order)}: {words}", "swapped_channels", order=str(list(order))
    )


def _contrast(values_C: Array) -> Array:
    return np.asarray(values_C - values_C.mean())


def _contrast_weights(case: Case) -> Array:
    """Inverse covariance (pseudo) of the channels' contrasts over normal instances, input units: (C, C)."""
    baseline = case.baseline
    size = baseline.num_channels
    products_CC = np.zeros((size, size))
    for (i, j), value in zip(baseline.layout.pairs, baseline.channel_products_P, strict=True):
        products_CC[i, j] = products_CC[j, i] = value
    z_C = baseline.normal_channels_3C[0]
    scale_C = baseline.channel_scale_C
    covariance_CC = (products_CC - np.outer(z_C, z_C)) * np.outer(scale_C, scale_C)
    centre_CC = np.eye(size) - 1.0 / size
    least = 1e-6 * float((scale_C**2).mean())  # equal channels have no contrast to judge by
    values_C, vectors_CC = np.linalg.eigh(centre_CC @ covariance_CC @ centre_CC)
    inverse_C = np.where(values_C > least, 1.0 / np.maximum(values_C, least), 0.0)
    return np.asarray((vectors_CC * inverse_C) @ vectors_CC.T)


def _explain(
    case: Case, now_X: Array, views: dict[Any, Array], plain: dict[Any, Array], weights_XX: Array, max_left: float
) -> tuple[Any, str] | None:
    """The view that fits what is seen, where the plain ones (normal, its classes as they are shared out now) do not.

    Each view is scaled by the common gain that fits best. Where light and lenses took contrast away they took the
    sampling error with it, so misfits are counted in that of the scaled view.
    """
    fits = {name: _misfit(now_X, view_X, weights_XX) for name, view_X in views.items()}
    best = min(fits, key=lambda name: fits[name][0])
    least = min(_misfit(now_X, view_X, weights_XX)[0] for view_X in plain.values())
    scale = case.summary.count / case.inflation / min(fits[best][1], 1.0) ** 2
    before, left = scale * least, scale * fits[best][0]
    if before - left < MIN_EXPLAINED or left > max_left * before:
        return None
    return best, f"misfit {left:.1f} <= {max_left} x {before:.1f}"


def _misfit(now_X: Array, expected_X: Array, weights_XX: Array) -> tuple[float, float]:
    """Smallest weighted squared distance of `now` to `expected` times a common gain, and that gain."""
    length = float(expected_X @ weights_XX @ expected_X)
    gain = float(now_X @ weights_XX @ expected_X) / length if length > 0 else 0.0
    gain = min(max(gain, COMMON_GAIN[0]), COMMON_GAIN[1])
    gap_X = now_X - gain * expected_X
    return float(gap_X @ weights_XX @ gap_X), gain


def find_turned(case: Case) -> Finding | None:
    """Images upside down, turned, or inverted: the mean image fits normal's after that, and only after that."""
    if not case.has_sketch:
        return None
    now_S, normal_S, sd_S = case.sketch
    now_G, normal_G, sd_G = now_S[BRIGHTNESS], normal_S[BRIGHTNESS], sd_S[BRIGHTNESS]
    side = math.isqrt(len(normal_G))
    grid_GG = normal_G.reshape(side, side)
    weights_GG = np.diag(1.0 / np.maximum(sd_G, 1e-9) ** 2)
    views = {
        "flipped top to bottom": grid_GG[::-1],
        "turned by 180 degrees": np.rot90(grid_GG, 2),
        "turned by 90 degrees": np.rot90(grid_GG),
        "turned by 270 degrees": np.rot90(grid_GG, 3),
        "mirrored": grid_GG[:, ::-1],
        "inverted": -grid_GG,
    }
    flat = {name: np.asarray(view_GG).ravel() for name, view_GG in views.items()}
    plain = {"upright": normal_G, "classes": case.mixed_grid_G}
    found = _explain(case, now_G, flat, plain, weights_GG, MAX_LEFT)
    return None if found is None else _broken(f"images are {found[0]}: {found[1]}", "turned", how=found[0])


def find_structure(case: Case) -> Finding | None:
    """Parts of the image that hold nothing, or an image of which no structure is left."""
    if not case.has_sketch:
        return None
    now_S, normal_S, _ = case.sketch
    (contrast, normal_contrast) = case.sketched("contrast")
    blind = np.flatnonzero(now_S[FLAT] - normal_S[FLAT] > FLAT_RISE).tolist()
    if blind and len(blind) < len(normal_S[FLAT]) and contrast > 0.3 * normal_contrast:
        return _broken(f"cells {blind} of the image hold one value only", "blind_cells", cells=str(blind))
    unrelated = math.sqrt(2.0) * max(contrast, 1e-9)
    (across, before_across), (down, before_down) = case.sketched("gradient_x"), case.sketched("gradient_y")
    least = min(across, down) / unrelated
    before = min(before_across, before_down) / (math.sqrt(2.0) * max(normal_contrast, 1e-9))
    if least > SCRAMBLED and before < 0.7 * SCRAMBLED:
        return _broken(f"neighbouring pixels are unrelated: {least:.2f} > {SCRAMBLED}", "scrambled", gradient=least)
    apart = (across / max(down, 1e-9)) / (before_across / max(before_down, 1e-9))
    grown = across / max(before_across, 1e-9) if apart > 1 else down / max(before_down, 1e-9)
    grown *= normal_contrast / max(contrast, 1e-9)  # also where a veil takes contrast and gradients away
    if max(apart, 1 / max(apart, 1e-9)) > TORN and grown > GROWN:
        reason = f"gradients of the two directions came apart by {apart:.2f}, one grew {grown:.2f} times to contrast"
        return Finding(Kind.UNKNOWN, f"images look torn: {reason}", {"check": "torn", "apart": apart, "grown": grown})
    return None


def _broken(reason: str, check: str, **evidence: float | str) -> Finding:
    return Finding(Kind.DATA_QUALITY, reason, {"check": check, **evidence})
