"""Vectors of integers in as few bytes as their values need, for what every replica sends twice a second.

Called by `messages`. Lossless: blocks of values, each with the number of bits that its largest needs. Bottom layer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK = 16  # values that share a width; smaller follows the values better, larger costs fewer widths


def pack(values_X: NDArray[np.int64]) -> bytes:
    """Pack int64 (X,), X >= 0; small magnitudes, of either sign, take few bits."""
    zigzag_X = ((values_X << 1) ^ (values_X >> 63)).astype(np.int64).view(np.uint64)
    blocks_BV = np.zeros((-(-len(values_X) // BLOCK), BLOCK), dtype=np.uint64)
    blocks_BV.reshape(-1)[: len(values_X)] = zigzag_X
    bits_BV64 = np.unpackbits(blocks_BV.astype("<u8").view(np.uint8).reshape(-1, BLOCK, 8), axis=2, bitorder="little")
    widths_B = np.where(bits_BV64.any(axis=1), np.arange(1, 65), 0).max(axis=1, initial=0).astype(np.uint8)
    used_BV64 = np.broadcast_to((np.arange(64) < widths_B[:, None])[:, None, :], bits_BV64.shape)
    return widths_B.tobytes() + np.packbits(bits_BV64[used_BV64], bitorder="little").tobytes()


def unpack(packed: bytes, size: int) -> NDArray[np.int64]:
    """The int64 (size,) that `pack` was given.

    Raises:
        ValueError: `packed` holds another number of values, or is cut.
    """
    num_blocks = -(-size // BLOCK)
    raw = np.frombuffer(packed, dtype=np.uint8)
    widths_B = raw[:num_blocks]
    num_bits = int(widths_B.sum(dtype=np.int64)) * BLOCK
    if len(widths_B) < num_blocks or len(raw) - num_blocks != -(-num_bits // 8) or widths_B.max(initial=0) > 64:
        raise ValueError(f"{len(packed)} packed bytes do not hold {size} values")
    bits_BV64 = np.zeros((num_blocks, BLOCK, 64), dtype=np.uint8)
    used_BV64 = np.broadcast_to((np.arange(64) < widths_B[:, None])[:, None, :], bits_BV64.shape)
    bits_BV64[used_BV64] = np.unpackbits(raw[num_blocks:], count=num_bits, bitorder="little")
    zigzag_X = np.packbits(bits_BV64, axis=2, bitorder="little").view("<u8").reshape(-1)[:size]
    return np.asarray((zigzag_X >> np.uint64(1)).view(np.int64) ^ -(zigzag_X & np.uint64(1)).view(np.int64))
