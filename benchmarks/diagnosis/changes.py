"""Changes of the world and faults of the pipeline, as functions of uint8 images (N, H, W, 3).

`DRIFTS` are changes that an adapter may learn, `BROKEN` are faults that were looked at while the diagnosis was written,
and `UNSEEN` are faults that were not: what is not recognised among them must come out as `unknown`, not as a heal.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
Change = Callable[[Images, np.random.Generator], Images]


def _clip(values: NDArray[np.float64]) -> Images:
    return np.asarray(values.clip(0, 255).round(), dtype=np.uint8)


def tint(*gains: float) -> Change:
    """A coloured light: each channel times its gain."""
    return lambda x, _: _clip(x.astype(np.float64) * np.array(gains))


def gamma(power: float) -> Change:
    """Under- or overexposure."""
    return lambda x, _: _clip(255.0 * (x / 255.0) ** power)


def speckle(sigma: float) -> Change:
    """Noise in proportion to the light."""
    return lambda x, rng: _clip(x * (1.0 + sigma * rng.standard_normal(x.shape)))


def impulses(share: float) -> Change:
    """Salt and pepper."""

    def change(x: Images, rng: np.random.Generator) -> Images:
        hit = rng.random(x.shape[:3]) < share
        return np.where(hit[..., None], 255 * rng.integers(0, 2, x.shape[:3])[..., None], x).astype(np.uint8)

    return change


def motion_blur(length: int) -> Change:
    """The camera moves sideways."""

    def change(x: Images, _: np.random.Generator) -> Images:
        return _clip(np.mean([np.roll(x.astype(np.float64), k, axis=2) for k in range(length)], axis=0))

    return change


def pixelate(factor: int) -> Change:
    """A coarser sensor."""

    def change(x: Images, _: np.random.Generator) -> Images:
        small = x.reshape(len(x), x.shape[1] // factor, factor, x.shape[2] // factor, factor, 3).mean(axis=(2, 4))
        return _clip(small.repeat(factor, axis=1).repeat(factor, axis=2))

    return change


DRIFTS: dict[str, Change] = {
    "warm_light": tint(1.25, 1.0, 0.7),
    "cool_light": tint(0.75, 1.0, 1.3),
    "underexposed": gamma(2.2),
    "speckle": speckle(0.45),
    "impulses": impulses(0.12),
    "motion_blur": motion_blur(6),
    "pixelate": pixelate(4),
}


def order(*channels: int) -> Change:
    """Channels in another order."""
    return lambda x, _: x[..., list(channels)]


def black(share: float) -> Change:
    """Black frames among the others."""

    def change(x: Images, rng: np.random.Generator) -> Images:
        return np.where((rng.random(len(x)) < share)[:, None, None, None], 0, x).astype(np.uint8)

    return change


def frozen(images: Images, rng: np.random.Generator) -> Images:
    """The same eight frames over and over."""
    return images[rng.integers(0, 8, len(images))]


def dropped(images: Images, _: np.random.Generator) -> Images:
    """The last channel is missing."""
    return np.concatenate([images[..., :2], np.zeros_like(images[..., 2:])], axis=3)


def half(images: Images, _: np.random.Generator) -> Images:
    """The lower half is missing."""
    out = images.copy()
    out[:, images.shape[1] // 2 :] = 0
    return out


def scrambled(images: Images, rng: np.random.Generator) -> Images:
    """Pixels in another order."""
    flat = images.reshape(len(images), -1, 3)
    return flat[:, rng.permutation(flat.shape[1])].reshape(images.shape)


BROKEN: dict[str, Change] = {
    "bgr": order(2, 1, 0),
    "gbr": order(1, 2, 0),
    "black_30": black(0.3),
    "black_all": black(1.0),
    "frozen": frozen,
    "unscaled": lambda x, _: (x // 255).astype(np.uint8),
    "inverted": lambda x, _: 255 - x,
    "upside_down": lambda x, _: x[:, ::-1],
    "grey": lambda x, _: x[..., 1:2].repeat(3, axis=3),
    "dropped": dropped,
    "half": half,
    "scrambled": scrambled,
}


def torn(images: Images, _: np.random.Generator) -> Images:
    """Every row is shifted by its number: a wrong stride."""
    return np.stack([np.roll(images[:, row], 3 * row, axis=1) for row in range(images.shape[1])], axis=1)


def overflowed(images: Images, _: np.random.Generator) -> Images:
    """A gain of two without saturation."""
    return (images.astype(np.uint16) * 2 % 256).astype(np.uint8)


def interleaved(images: Images, _: np.random.Generator) -> Images:
    """Planes read as if the channels were last."""
    return images.transpose(0, 3, 1, 2).reshape(images.shape)


def quantised(images: Images, _: np.random.Generator) -> Images:
    """One bit a channel."""
    return ((images > 127) * 255).astype(np.uint8)


def shifted_half(images: Images, _: np.random.Generator) -> Images:
    """The left and right halves have changed places."""
    return np.roll(images, images.shape[2] // 2, axis=2)


UNSEEN: dict[str, Change] = {
    "torn": torn,
    "overflowed": overflowed,
    "interleaved": interleaved,
    "quantised": quantised,
    "shifted_half": shifted_half,
}
