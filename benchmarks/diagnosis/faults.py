"""Faults of the pipeline as functions of uint8 images (N, H, W, 3).

`NAMED` are faults that the diagnosis knows by name. It must answer `unknown` (or, where a check fits, `data_quality`)
to the others: `DEVELOPED` were looked at while it was written, `HELD_OUT` were not.
"""

from __future__ import annotations

import numpy as np

from benchmarks.diagnosis.drifts import Change, Images, clip


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


def normalised_twice(images: Images, _: np.random.Generator) -> Images:
    """Normalised by the client already, then stored as bytes: (x / 255 - mean) / sd, shifted to be positive."""
    return clip((images / 255.0 - 0.5) / 0.25 + 2.0)


NAMED: dict[str, Change] = {
    "bgr": order(2, 1, 0),
    "gbr": order(1, 2, 0),
    "black_10": black(0.1),
    "black_30": black(0.3),
    "black_all": black(1.0),
    "frozen": frozen,
    "unscaled": lambda x, _: (x // 255).astype(np.uint8),
    "normalised_twice": normalised_twice,
    "inverted": lambda x, _: 255 - x,
    "upside_down": lambda x, _: x[:, ::-1],
    "grey": lambda x, _: x[..., 1:2].repeat(3, axis=3),
    "dropped": dropped,
    "half": half,
    "scrambled": scrambled,
}
PIPELINE = ("bgr", "gbr", "unscaled", "normalised_twice", "black_10", "black_30", "black_all")  # must never be searched


def torn(images: Images, _: np.random.Generator) -> Images:
    """Every row is shifted by its number: a wrong stride."""
    return np.stack([np.roll(images[:, row], 3 * row, axis=1) for row in range(images.shape[1])], axis=1)


def interleaved(images: Images, _: np.random.Generator) -> Images:
    """Planes read as if the channels were last."""
    return images.transpose(0, 3, 1, 2).reshape(images.shape)


def shuffled_blocks(images: Images, rng: np.random.Generator) -> Images:
    """Blocks of 8 x 8 pixels in another order."""
    blocks = images.reshape(len(images), 4, 8, 4, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(len(images), 16, 8, 8, 3)
    moved = blocks[:, rng.permutation(16)].reshape(len(images), 4, 4, 8, 8, 3)
    return moved.transpose(0, 1, 3, 2, 4, 5).reshape(images.shape)


def checkerboard(images: Images, _: np.random.Generator) -> Images:
    """Every other pixel is black."""
    odd = np.indices(images.shape[1:3]).sum(axis=0) % 2 == 1
    return np.where(odd[..., None], images, 0).astype(np.uint8)


DEVELOPED: dict[str, Change] = {
    "torn": torn,
    "overflowed": lambda x, _: (x.astype(np.uint16) * 2 % 256).astype(np.uint8),
    "interleaved": interleaved,
    "quantised": lambda x, _: ((x > 127) * 255).astype(np.uint8),
    "shifted_half": lambda x, _: np.roll(x, x.shape[2] // 2, axis=2),
    "shuffled_blocks": shuffled_blocks,
    "checkerboard": checkerboard,
    "high_bit_dropped": lambda x, _: np.bitwise_and(x, np.uint8(0x7F)),
}


def nibbles(images: Images, _: np.random.Generator) -> Images:
    """The wrong byte order, within a byte: high and low half exchanged."""
    return ((images << 4) | (images >> 4)).astype(np.uint8)


def byte_shift(images: Images, _: np.random.Generator) -> Images:
    """The buffer is read from one byte too late: channels wander, the last value is missing."""
    flat = images.reshape(len(images), -1)
    return np.roll(flat, -1, axis=1).reshape(images.shape)


def wrong_width(images: Images, _: np.random.Generator) -> Images:
    """Rows of 32 pixels read as rows of 30: the picture leans, the end is filled with what comes next."""
    flat = images.reshape(len(images), -1, 3)
    index = (np.arange(32)[:, None] * 30 + np.arange(32)[None, :]) % (32 * 32)
    return flat[:, index]


def cropped(images: Images, _: np.random.Generator) -> Images:
    """The upper left quarter and a half of it, padded with black."""
    out = np.zeros_like(images)
    out[:, :22, :22] = images[:, 10:, 10:]
    return out


def mirrored_halves(images: Images, _: np.random.Generator) -> Images:
    """The right half is the left half's mirror image."""
    return np.concatenate([images[:, :, :16], images[:, :, 15::-1]], axis=2)


def late_channel(images: Images, _: np.random.Generator) -> Images:
    """Two channels are late by one and two rows."""
    return np.stack([images[..., 0], np.roll(images[..., 1], 2, axis=1), np.roll(images[..., 2], 4, axis=1)], axis=3)


def four_times(images: Images, _: np.random.Generator) -> Images:
    """The upper left quadrant four times."""
    quadrant = images[:, :16, :16]
    return np.tile(quadrant, (1, 2, 2, 1))


def yuv(images: Images, _: np.random.Generator) -> Images:
    """Luma and chroma read as red, green and blue."""
    x = images.astype(np.float32)
    y = x @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return clip(np.stack([y, 128.0 + 0.564 * (x[..., 2] - y), 128.0 + 0.713 * (x[..., 0] - y)], axis=3))


def stripes(images: Images, _: np.random.Generator) -> Images:
    """Every third column of the sensor is dead."""
    dead = np.arange(images.shape[2]) % 3 == 0
    return np.where(dead[None, None, :, None], 0, images).astype(np.uint8)


def rolled_rows(images: Images, _: np.random.Generator) -> Images:
    """The frame begins a third too late."""
    return np.roll(images, images.shape[1] // 3, axis=1)


HELD_OUT: dict[str, Change] = {
    "nibbles": nibbles,
    "byte_shift": byte_shift,
    "wrong_width": wrong_width,
    "cropped": cropped,
    "mirrored_halves": mirrored_halves,
    "late_channel": late_channel,
    "four_times": four_times,
    "yuv": yuv,
    "stripes": stripes,
    "rolled_rows": rolled_rows,
}
