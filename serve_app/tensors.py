"""Tensors of the Open Inference Protocol to and from numpy, without a Python loop over values.

Called by `protocol`. Knows datatypes, shapes and bytes; nothing of models, requests or Ray.
"""

from __future__ import annotations

from array import array
from itertools import chain
from math import prod
from typing import Any

import numpy as np

from orchestrator.errors import RequestError

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
# Codes of `array.array`: it refuses strings, null, fractions for integers and values out of range, at C speed.
_ARRAY_CODES = {
    "BOOL": "B",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP16": "d",
    "FP32": "d",
    "FP64": "d",
}


def from_json(data: Any, shape: tuple[int, ...], datatype: str) -> np.ndarray:
    """Numbers of a JSON list, flat in row-major order or nested like `shape`.

    Args:
        data: what the JSON parser gave for `data`.
        shape: as declared by the request, every entry >= 0.
        datatype: a key of DTYPES.

    Returns:
        Array of `shape`; not necessarily writable.

    Raises:
        RequestError: not a list, ragged, another count, or a value that the datatype cannot hold.
    """
    if not isinstance(data, list):
        raise RequestError(f"data of input must be a list of numbers; got {_kind(data)}")
    flat = _flatten(data, shape)
    if len(flat) != prod(shape):
        raise RequestError(f"data of input must hold {prod(shape)} values for shape {list(shape)}; got {len(flat)}")
    try:
        packed = array(_ARRAY_CODES[datatype], flat)
    except (TypeError, ValueError):
        raise RequestError(f"data of input must be numbers that fit {datatype}; got a value of another kind") from None
    except OverflowError:
        raise RequestError(f"data of input must be numbers that fit {datatype}; got a value out of its range") from None
    values = np.frombuffer(packed, dtype=np.dtype(packed.typecode))
    if datatype == "BOOL" and len(values) and values.max() > 1:
        raise RequestError("data of input must be true or false for BOOL; got a number above 1")
    with np.errstate(over="ignore"):
        return values.astype(DTYPES[datatype], copy=False).reshape(shape)


def _flatten(data: list[Any], shape: tuple[int, ...]) -> list[Any]:
    """Flat list; a nested one is opened level by level, each level checked against `shape`."""
    if not data or not isinstance(data[0], list):
        return data
    level: list[Any] = data
    if len(level) != shape[0]:
        raise RequestError(f"nested data of input must have shape {list(shape)}; got {len(level)} rows")
    for depth, length in enumerate(shape[1:], start=1):
        if any(kind is not list for kind in set(map(type, level))) or set(map(len, level)) != {length}:
            raise RequestError(
                f"nested data of input must have shape {list(shape)}; ragged or another length at depth {depth}"
            )
        level = list(chain.from_iterable(level))
    return level


def from_bytes(raw: memoryview, shape: tuple[int, ...], datatype: str) -> np.ndarray:
    """Row-major little-endian bytes as a read-only view of shape `shape`, without a copy.

    Raises:
        RequestError: another number of bytes than shape and datatype need.
    """
    dtype = DTYPES[datatype]
    wanted = prod(shape) * dtype.itemsize
    if len(raw) != wanted:
        raise RequestError(
            f"binary data of input must be {wanted} bytes for shape {list(shape)} of {datatype}; got {len(raw)}"
        )
    return np.frombuffer(raw, dtype=np.uint8 if datatype == "BOOL" else dtype).astype(dtype, copy=False).reshape(shape)


def require_finite(values: np.ndarray) -> None:
    """RequestError when a floating input holds NaN or infinity; integers always pass."""
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        count = int(values.size - np.isfinite(values).sum())
        raise RequestError(f"input must be finite; got NaN or infinity in {count} of {values.size} values")


def _kind(value: Any) -> str:
    """JSON's name of a value's type, for messages."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


describe = _kind
