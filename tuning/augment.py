"""Views of an image that show the same thing, as far as the base model can tell on its own reference.

A flip is a cat for a cat and another letter for a letter. So nothing is assumed: a view is used where the base, asked
about the labelled reference, is right about it as often as before, within MAX_LOSS. Tables have no views.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

MAX_SHIFT = 1 / 16  # of the side, in both directions: 2 pixels of 32
MAX_LOSS = 0.02  # accuracy that a view may cost the base on the reference
Accuracy = Callable[[np.ndarray], float]


@dataclass(frozen=True)
class Views:
    """Which views are allowed.

    Attributes:
        flip: left and right may be exchanged.
        shift: the image may be moved by up to MAX_SHIFT of its side, its edge pixels repeated.
        layout: HWC or CHW.
    """

    flip: bool = False
    shift: bool = False
    layout: str = "HWC"

    def draw(self, inputs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One random view of each image: same shape and type; the inputs themselves where nothing is allowed."""
        if self.flip:
            inputs = np.where(_by_row(rng.random(len(inputs)) < 0.5, inputs), flipped(inputs, self.layout), inputs)
        if self.shift:
            height, width = _sides(inputs, self.layout)
            reach_y, reach_x = int(height * MAX_SHIFT), int(width * MAX_SHIFT)
            dy_N = rng.integers(-reach_y, reach_y + 1, len(inputs))
            dx_N = rng.integers(-reach_x, reach_x + 1, len(inputs))
            inputs = shifted(inputs, dy_N, dx_N, self.layout)
        return inputs


def find_views(inputs: np.ndarray, layout: str, accuracy: Accuracy) -> Views:
    """The views that the model does not mind.

    Args:
        inputs: (N, *shape) labelled reference rows.
        layout: HWC, CHW or F.
        accuracy: of the model on such rows, 0..1, with the labels of `inputs`.
    """
    if layout == "F" or inputs.ndim != 4 or len(inputs) == 0:
        return Views()
    least = accuracy(inputs) - MAX_LOSS
    reach_y, reach_x = (int(side * MAX_SHIFT) for side in _sides(inputs, layout))
    sign_N = np.where(np.arange(len(inputs)) % 2, 1, -1)
    moved = shifted(inputs, sign_N * reach_y, np.roll(sign_N, 1) * reach_x, layout)
    return Views(
        flip=accuracy(flipped(inputs, layout)) >= least,
        shift=min(reach_y, reach_x) > 0 and accuracy(moved) >= least,
        layout=layout,
    )


def flipped(inputs: np.ndarray, layout: str) -> np.ndarray:
    """Left and right exchanged."""
    return np.flip(inputs, axis=3 if layout == "CHW" else 2)


def shifted(inputs: np.ndarray, dy_N: np.ndarray, dx_N: np.ndarray, layout: str) -> np.ndarray:
    """Each image moved by its own number of pixels, down and to the right; edges are repeated."""
    height, width = _sides(inputs, layout)
    y_NH = np.clip(np.arange(height) - dy_N[:, None], 0, height - 1)
    x_NW = np.clip(np.arange(width) - dx_N[:, None], 0, width - 1)
    rows = np.arange(len(inputs))
    if layout == "CHW":
        channels = np.arange(inputs.shape[1])
        index = (rows[:, None, None, None], channels[:, None, None], y_NH[:, None, :, None], x_NW[:, None, None, :])
        return np.asarray(inputs[index])
    return np.asarray(inputs[rows[:, None, None], y_NH[:, :, None], x_NW[:, None, :]])


def _sides(inputs: np.ndarray, layout: str) -> tuple[int, int]:
    return (inputs.shape[2], inputs.shape[3]) if layout == "CHW" else (inputs.shape[1], inputs.shape[2])


def _by_row(mask_N: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    return mask_N.reshape(-1, *(1,) * (inputs.ndim - 1))
