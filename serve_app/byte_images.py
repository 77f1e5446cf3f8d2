"""What the probe needs to know of images of bytes, in few passes over the pixels.

Called by `serve_app.probe`; images of other types, and tables, take its general path. Values less 128 are small
integers, so their float32 sums are exact in any order: equal images give equal numbers in every bit, and moments about
any centre follow without cancellation. Agrees with `tuning.sketch.image_sketch` and `base_model.input_moments`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from orchestrator.drift.statistics import CELLS
from tuning.sketch import GRID, sketch_size

CENTRE = 128.0
HASHED_VALUES = 512  # of an image, beside its extremes, that two must share to count as duplicates
GREY_PIXELS = 256  # compared channel by channel; the sums of all pixels must agree too
_HASHES = 4  # sums with random weights in -63 .. 63: 512 * 128 * 63 < 2^24
FLAT_SHARE = 1e-4  # of an image's variance, up to which a cell is flat; as in `tuning.sketch`
_LANE = 256  # values summed side by side, about
_SEED = 977


@dataclass(frozen=True)
class Seen:
    """Of N images; all float64. Means and squares are about CENTRE, the sketch is in input units."""

    means_NC: torch.Tensor
    squares_NC: torch.Tensor
    low_N: torch.Tensor
    high_N: torch.Tensor
    hash_N: torch.Tensor
    sketch_NS: torch.Tensor


class ByteImages:
    """Reads images of one shape.

    Args:
        shape: of a batch of uint8, (N, H, W, C) or (N, C, H, W); N does not matter.
        layout: HWC or CHW.
        device: where the batches are.
    """

    def __init__(self, shape: torch.Size, layout: str, device: torch.device) -> None:
        self._first = layout == "CHW"
        self._channels = shape[1] if self._first else shape[3]
        self._height, self._width = (shape[2], shape[3]) if self._first else (shape[1], shape[2])
        self._pixels = self._height * self._width
        self._has_sketch = sketch_size(shape, layout) > 0
        values = self._pixels * self._channels
        self._step = max(1, values // HASHED_VALUES) | 1  # odd: not one channel of an image of 4
        while self._step % self._channels == 0 and self._channels > 1:
            self._step += 2
        draw = torch.Generator().manual_seed(_SEED)
        hashed = len(range(0, values, self._step))
        self._weights = torch.randint(-63, 64, (_HASHES, hashed), generator=draw).float().to(device)
        self._mix = torch.rand(_HASHES, generator=draw, dtype=torch.float64).to(device)
        self._lane = self._channels * _divisor(self._pixels, _LANE // self._channels)
        self._cells_GP = self._cells().to(device)

    def _cells(self) -> torch.Tensor:
        """(16, H * W): what averages a plane over the cells of the grid; rows and columns that do not fit are out."""
        cells = torch.zeros(CELLS, self._height, self._width)
        high, wide = self._height // GRID, self._width // GRID
        for cell in range(CELLS):
            row, column = divmod(cell, GRID)
            cells[cell, row * high : (row + 1) * high, column * wide : (column + 1) * wide] = 1.0
        return cells.flatten(1)

    def read(self, inputs: torch.Tensor) -> Seen:
        """One batch of N >= 1 images."""
        flat_NV = inputs.flatten(1)
        y_NV = (flat_NV ^ 128).view(torch.int8).float()
        squares_NV = y_NV.square()
        sums_NC, squares_NC = self._by_channel(y_NV), self._by_channel(squares_NV)
        low_N, high_N = flat_NV.amin(dim=1).double(), flat_NV.amax(dim=1).double()
        hashes_NH = linear(y_NV[:, :: self._step], self._weights).double()
        hash_N = (hashes_NH * self._mix).sum(dim=1) + low_N * 0.123456789 + high_N * 0.987654321
        if self._has_sketch:
            sketch_NS = self._sketch(y_NV, squares_NV, sums_NC, squares_NC, low_N, high_N)
        else:
            sketch_NS = low_N.new_zeros((len(low_N), 0))
        return Seen(sums_NC / self._pixels, squares_NC / self._pixels, low_N, high_N, hash_N, sketch_NS)

    def _by_channel(self, values_NV: torch.Tensor) -> torch.Tensor:
        """Sums over the pixels of each channel, float64 (N, C); in lanes, which are read in the order of memory."""
        if self._first:
            return values_NV.view(len(values_NV), self._channels, -1).sum(dim=2).double()
        lanes_NL = values_NV.view(len(values_NV), -1, self._lane).sum(dim=1)
        return lanes_NL.double().view(len(values_NV), -1, self._channels).sum(dim=1)

    def _plane(self, values_NV: torch.Tensor, channel: int) -> torch.Tensor:
        shape = (-1, self._channels, self._pixels) if self._first else (-1, self._pixels, self._channels)
        return values_NV.view(shape).select(1 if self._first else 2, channel)

    def _sketch(
        self,
        y_NV: torch.Tensor,
        squares_NV: torch.Tensor,
        sums_NC: torch.Tensor,
        squares_NC: torch.Tensor,
        low_N: torch.Tensor,
        high_N: torch.Tensor,
    ) -> torch.Tensor:
        """As `image_sketch`: of the middle channel."""
        middle, last = self._channels // 2, self._channels - 1
        plane_NP = self._plane(y_NV, middle).contiguous()
        image_NHW = plane_NP.view(-1, self._height, self._width)
        rough_N2 = torch.stack(
            [
                _root_mean_square(image_NHW[:, :, 1:] - image_NHW[:, :, :-1]),
                _root_mean_square(image_NHW[:, 1:] - image_NHW[:, :-1]),
            ],
            dim=1,
        )
        in_cell = (self._height // GRID) * (self._width // GRID)
        mean_NG = linear(plane_NP, self._cells_GP).double() / in_cell
        square_NG = linear(plane_NP.square_(), self._cells_GP).double() / in_cell
        mean_N1 = sums_NC[:, middle, None] / self._pixels
        variance_N1 = (square_NG - (2 * mean_N1) * mean_NG).mean(dim=1, keepdim=True) + mean_N1.square()
        flat_NG = square_NG - mean_NG.square() <= FLAT_SHARE * variance_N1
        step = max(1, self._pixels // GREY_PIXELS) | 1
        apart_NP = self._plane(y_NV, 0)[:, ::step] - self._plane(y_NV, last)[:, ::step]
        grey_N = (
            (torch.linalg.vector_norm(apart_NP, dim=1) == 0.0)
            & (sums_NC[:, 0] == sums_NC[:, last])
            & (squares_NC[:, 0] == squares_NC[:, last])
        )
        contrast_N1 = variance_N1.clamp_min(0.0).sqrt()
        extremes_N3 = torch.stack([low_N, high_N, grey_N.double()], dim=1)
        return torch.cat([rough_N2.double(), contrast_N1, extremes_N3, mean_NG - mean_N1, flat_NG.double()], dim=1)


def _root_mean_square(values_NHW: torch.Tensor) -> torch.Tensor:
    flat_NP = values_NHW.flatten(1)
    lengths_N: torch.Tensor = torch.linalg.vector_norm(flat_NP, dim=1)
    return lengths_N / math.sqrt(flat_NP.shape[1])


def _divisor(number: int, limit: int) -> int:
    """Largest divisor of `number` that is at most `limit`."""
    return max(d for d in range(1, max(1, min(number, limit)) + 1) if number % d == 0)
