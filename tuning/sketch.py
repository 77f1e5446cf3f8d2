"""How an image is laid out, in a few numbers per instance: what tells a broken pipeline from a change of the world.

Called by `serve_app.probe` on the request's device and by `base_model.collect_sample`: both must see alike. Read from
the middle channel alone, which costs a third of all three and says as much. Tables and sequences have no sketch.
"""

from __future__ import annotations

import torch

from orchestrator.drift.statistics import SKETCH

GRID = 4  # cells per side
_FLAT = 1e-4  # variance within a cell, in that of the image, up to which a cell counts as flat


def sketch_size(shape: torch.Size | tuple[int, ...], layout: str) -> int:
    """Width S of the sketch of inputs (N, *shape): len(SKETCH) for images of >= 4 x 4 pixels, else 0."""
    if layout == "F" or len(shape) != 4:
        return 0
    height, width = (shape[2], shape[3]) if layout == "CHW" else (shape[1], shape[2])
    return len(SKETCH) if min(height, width) >= GRID else 0


def image_sketch(inputs: torch.Tensor, layout: str, low_N: torch.Tensor, high_N: torch.Tensor) -> torch.Tensor:
    """Sketch of each image, in the order of `SKETCH`, input units.

    Gradients are root mean squares of differences between neighbours, contrast the standard deviation over the image.

    Args:
        inputs: (N, H, W, C) or (N, C, H, W), any number type.
        layout: HWC or CHW.
        low_N: smallest value of each image, float.
        high_N: largest.

    Returns:
        float32 (N, S); (N, 0) where `sketch_size` is 0. NaN in, NaN out.
    """
    if not sketch_size(inputs.shape, layout):
        return inputs.new_zeros((len(inputs), 0), dtype=torch.float32)
    axis = 1 if layout == "CHW" else 3
    channels = inputs.shape[axis]
    x_NHW = inputs.select(axis, channels // 2).float()
    mean_N = x_NHW.mean((1, 2))
    gradient_x_N = (x_NHW[:, :, 1:] - x_NHW[:, :, :-1]).square_().mean((1, 2)).sqrt()
    gradient_y_N = (x_NHW[:, 1:] - x_NHW[:, :-1]).square_().mean((1, 2)).sqrt()
    x_NHW = x_NHW - mean_N[:, None, None]
    height, width = (size // GRID * GRID for size in x_NHW.shape[1:])
    cells = x_NHW[:, :height, :width].reshape(len(x_NHW), GRID, height // GRID, GRID, width // GRID)
    brightness_NG = cells.mean((2, 4)).flatten(1)
    squares_NG = cells.square().mean((2, 4)).flatten(1)
    variance_N = squares_NG.mean(1)
    flat_NG = squares_NG - brightness_NG.square() <= _FLAT * variance_N[:, None]
    grey_N = (inputs.select(axis, 0) == inputs.select(axis, channels - 1)).flatten(1).all(1)
    single = [gradient_x_N, gradient_y_N, variance_N.sqrt(), low_N.float(), high_N.float(), grey_N.float()]
    return torch.cat([torch.stack(single, dim=1), brightness_NG, flat_NG.float()], dim=1)
