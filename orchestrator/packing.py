"""Vectors of integers in little more than the bits they hold, for what every replica sends twice a second.

Called by `messages`. Lossless Rice code: of each value the low bits as they are, their number chosen by block, and the
rest in unary. For the sums of a window it takes a few percent more than their entropy. Bottom layer.

Source: Rice & Plaunt 1971, IEEE Trans. Commun. Technol. 19:889.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK = 32  # values that share a number of low bits
_LOW_BITS = np.arange(64, dtype=np.uint64)
_ONE = np.uint64(1)


def pack(values_X: NDArray[np.int64]) -> bytes:
    """Pack int64 (X,), X >= 0; small magnitudes, of either sign, take few bits."""
    blocks_BV = np.zeros((_num_blocks(len(values_X)), BLOCK), dtype=np.uint64)
    blocks_BV.reshape(-1)[: len(values_X)] = ((values_X << 1) ^ (values_X >> 63)).view(np.uint64)
    unary_BL = (blocks_BV[:, :, None] >> _LOW_BITS).sum(axis=1, dtype=np.float64)
    low_B = (unary_BL + BLOCK * _LOW_BITS.astype(np.float64)).argmin(axis=1).astype(np.uint8)
    bits_BV64 = np.unpackbits(blocks_BV.astype("<u8").view(np.uint8).reshape(-1, BLOCK, 8), axis=2, bitorder="little")
    low_bits = bits_BV64[_kept(low_B, len(values_X))]
    high_X = (blocks_BV >> low_B[:, None].astype(np.uint64)).astype(np.int64).reshape(-1)[: len(values_X)]
    ends_X = np.cumsum(high_X + 1) - 1  # each value's zeros, then a one
    high_bits = np.zeros(ends_X[-1] + 1 if len(ends_X) else 0, dtype=np.uint8)
    high_bits[ends_X] = 1
    bits = np.packbits(np.concatenate([low_bits, high_bits]), bitorder="little")
    return bytes(low_B.tobytes() + bits.tobytes())


def unpack(packed: bytes, size: int) -> NDArray[np.int64]:
    """The int64 (size,) that `pack` was given.

    Raises:
        ValueError: `packed` holds another number of values, or is damaged.
    """
    raw, num_blocks = np.frombuffer(packed, dtype=np.uint8), _num_blocks(size)
    low_B, bits = raw[:num_blocks], np.unpackbits(raw[num_blocks:], bitorder="little")
    num_low = int(low_B.repeat(BLOCK)[:size].sum(dtype=np.int64))
    ends_X = np.flatnonzero(bits[num_low:])
    needed = num_low + (int(ends_X[-1]) + 1 if len(ends_X) else 0)
    if (
        len(low_B) < num_blocks
        or low_B.max(initial=0) > 63
        or len(ends_X) != size
        or len(bits) - needed not in range(8)
    ):
        raise ValueError(f"{len(packed)} packed bytes do not hold {size} values")
    bits_BV64 = np.zeros((num_blocks, BLOCK, 64), dtype=np.uint8)
    bits_BV64[_kept(low_B, size)] = bits[:num_low]
    low_BV = np.packbits(bits_BV64, axis=2, bitorder="little").view("<u8").reshape(num_blocks, BLOCK)
    high_BV = np.zeros((num_blocks, BLOCK), dtype=np.uint64)
    high_BV.reshape(-1)[:size] = np.diff(ends_X, prepend=-1) - 1
    zigzag_X = (low_BV | (high_BV << low_B[:, None].astype(np.uint64))).reshape(-1)[:size]
    return np.asarray((zigzag_X >> _ONE).view(np.int64) ^ -(zigzag_X & _ONE).view(np.int64))


def _num_blocks(size: int) -> int:
    return -(-size // BLOCK)


def _kept(low_B: NDArray[np.uint8], size: int) -> NDArray[np.bool_]:
    """Which of each value's 64 bits are kept as they are: bool (B, BLOCK, 64), none of what fills the last block."""
    low_X = low_B.repeat(BLOCK)
    low_X[size:] = 0
    return np.asarray(np.arange(64) < low_X[:, None]).reshape(len(low_B), BLOCK, 64)
