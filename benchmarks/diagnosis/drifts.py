"""Changes of the world - light, weather, lens, sensor, compression - as functions of uint8 images (N, H, W, 3).

`DEVELOPED` were looked at while the diagnosis was written, `HELD_OUT` were not. Blends with the shared CIFAR-10-C sets
are made in `passes`.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
Change = Callable[[Images, np.random.Generator], Images]


def clip(values: NDArray[Any]) -> Images:
    """Rounded to uint8."""
    return np.asarray(np.rint(values.clip(0, 255)), dtype=np.uint8)


def part_of(change: Change, share: float) -> Change:
    """A milder change: its image blended into the original."""

    def milder(x: Images, rng: np.random.Generator) -> Images:
        return clip((1.0 - share) * x.astype(np.float32) + share * change(x, rng))

    return milder


def tint(*gains: float) -> Change:
    """A coloured light: each channel times its gain."""
    return lambda x, _: clip(x.astype(np.float64) * np.array(gains))


def gamma(power: float) -> Change:
    """Under- or overexposure."""
    return lambda x, _: clip(255.0 * (x / 255.0) ** power)


def light(offset: float, gain: float = 1.0) -> Change:
    """Brighter or darker by as much everywhere."""
    return lambda x, _: clip(x * gain + offset)


def speckle(sigma: float) -> Change:
    """Noise in proportion to the light."""
    return lambda x, rng: clip(x * (1.0 + sigma * rng.standard_normal(x.shape)))


def noise(sigma: float) -> Change:
    """Additive noise, in grey levels."""
    return lambda x, rng: clip(x + sigma * rng.standard_normal(x.shape))


def impulses(share: float) -> Change:
    """Salt and pepper."""

    def change(x: Images, rng: np.random.Generator) -> Images:
        hit = rng.random(x.shape[:3]) < share
        return np.where(hit[..., None], 255 * rng.integers(0, 2, x.shape[:3])[..., None], x).astype(np.uint8)

    return change


def motion_blur(length: int, axis: int = 2) -> Change:
    """The camera moves sideways (axis 2) or up and down (1)."""

    def change(x: Images, _: np.random.Generator) -> Images:
        return clip(np.mean([np.roll(x.astype(np.float32), k, axis=axis) for k in range(length)], axis=0))

    return change


def pixelate(factor: int) -> Change:
    """A coarser sensor."""

    def change(x: Images, _: np.random.Generator) -> Images:
        small = x.reshape(len(x), x.shape[1] // factor, factor, x.shape[2] // factor, factor, 3).mean(axis=(2, 4))
        return clip(small.repeat(factor, axis=1).repeat(factor, axis=2))

    return change


def haze(share: float) -> Change:
    """Even mist: the image fades into light grey."""
    return lambda x, _: clip((1.0 - share) * x.astype(np.float32) + share * 220.0)


def rain(images: Images, rng: np.random.Generator) -> Images:
    """Thin bright streaks, nearly upright, at random places."""
    drops = (rng.random(images.shape[:3]) < 0.02).astype(np.float32)
    streaks = sum(np.roll(drops, (k, k // 4), axis=(1, 2)) for k in range(6))
    return clip(images + 90.0 * np.minimum(streaks, 1.0)[..., None])


DEVELOPED: dict[str, Change] = {
    "warm_light": tint(1.25, 1.0, 0.7),
    "cool_light": tint(0.75, 1.0, 1.3),
    "underexposed": gamma(2.2),
    "overexposed": gamma(0.45),
    "night": light(0.0, 0.3),
    "speckle": speckle(0.45),
    "impulses": impulses(0.12),
    "motion_blur": motion_blur(6),
    "motion_blur_y": motion_blur(5, axis=1),
    "pixelate": pixelate(4),
    "haze": haze(0.6),
    "rain": rain,
    "sensor_noise": noise(16.0),
}
GENTLE: dict[str, Change] = {  # hardly any harm; the true loss is measured
    "slightly_dark": gamma(1.15),
    "slightly_bright": gamma(0.88),
    "slightly_warm": tint(1.06, 1.0, 0.93),
    "slightly_cool": tint(0.95, 1.0, 1.06),
    "brighter": light(10.0),
    "dimmer": light(0.0, 0.88),
    "thin_haze": haze(0.08),
    "faint_noise": noise(2.5),
    "faint_speckle": speckle(0.03),
}


def zoom_blur(images: Images, _: np.random.Generator) -> Images:
    """Mean of enlargements up to 1.3 times."""
    from scipy.ndimage import zoom

    total = images.astype(np.float32)
    factors = np.arange(1.06, 1.31, 0.06)
    for factor in factors:
        large = zoom(images.astype(np.float32), (1, factor, factor, 1), order=1)
        top, left = ((large.shape[axis] - images.shape[axis]) // 2 for axis in (1, 2))
        total += large[:, top : top + images.shape[1], left : left + images.shape[2]]
    return clip(total / (len(factors) + 1))


def snow(images: Images, rng: np.random.Generator) -> Images:
    """Blurred bright flakes over a paler image."""
    from scipy.ndimage import gaussian_filter

    seeds = (rng.random(images.shape[:3]) < 0.05).astype(np.float32)
    fallen = np.sum([np.roll(seeds, (k, k), axis=(1, 2)) for k in range(3)], axis=0)
    flakes = gaussian_filter(np.minimum(fallen, 1.0), (0, 0.5, 0.5))
    grey = images.mean(axis=3, keepdims=True)
    pale = 0.7 * images + 0.3 * np.maximum(images, 1.5 * grey * 0.5 + 64.0)
    return clip(pale + 200.0 * flakes[..., None])


def frost(images: Images, rng: np.random.Generator) -> Images:
    """A pane of ice flowers, seen at random places."""
    from scipy.ndimage import gaussian_filter

    pane = sum(gaussian_filter(rng.standard_normal((256, 256)), s, mode="wrap") * s for s in (1.0, 3.0, 8.0))
    pane = 255.0 * (pane - pane.min()) / np.ptp(pane)
    rows, columns = rng.integers(0, 256 - 32, (2, len(images)))
    ice = np.stack([pane[r : r + 32, c : c + 32] for r, c in zip(rows, columns, strict=True)])
    return clip(0.65 * images + 0.5 * ice[..., None] * np.array([0.9, 1.0, 1.05]))


def elastic(images: Images, rng: np.random.Generator) -> Images:
    """Smooth random warps of some two pixels."""
    from scipy.ndimage import gaussian_filter, map_coordinates

    out = np.empty_like(images)
    grid = np.meshgrid(np.arange(32), np.arange(32), indexing="ij")
    for i, image in enumerate(images):
        moves = [gaussian_filter(rng.uniform(-1, 1, (32, 32)), 3.0) * 22.0 for _ in range(2)]
        at = [g + m for g, m in zip(grid, moves, strict=True)]
        warped = [map_coordinates(image[..., c].astype(np.float32), at, order=1, mode="reflect") for c in range(3)]
        out[i] = clip(np.stack(warped, axis=2))
    return out


def jpeg(quality: int) -> Change:
    """Strong compression."""

    def change(x: Images, _: np.random.Generator) -> Images:
        from PIL import Image

        out = np.empty_like(x)
        for i, image in enumerate(x):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "JPEG", quality=quality)
            out[i] = np.asarray(Image.open(buffer))
        return out

    return change


def shot_noise(images: Images, rng: np.random.Generator) -> Images:
    """Few photons."""
    return clip(255.0 * rng.poisson(images / 255.0 * 30.0) / 30.0)


def spatter(images: Images, rng: np.random.Generator) -> Images:
    """Mud on the lens: brown blots at random places."""
    from scipy.ndimage import gaussian_filter

    blots = gaussian_filter(rng.standard_normal(images.shape[:3]), (0, 2.0, 2.0))
    mud = (blots > np.quantile(blots, 0.85))[..., None]
    return np.where(mud, clip(0.2 * images + np.array([63, 42, 20])), images).astype(np.uint8)


def saturate(images: Images, _: np.random.Generator) -> Images:
    """Garish colours."""
    grey = images.mean(axis=3, keepdims=True)
    return clip(grey + 3.0 * (images - grey))


HELD_OUT: dict[str, Change] = {
    "zoom_blur": zoom_blur,
    "snow": snow,
    "frost": frost,
    "elastic": elastic,
    "jpeg": jpeg(10),
    "shot_noise": shot_noise,
    "spatter": spatter,
    "saturate": saturate,
}
