"""Parquet datasets: the reference, recorded traffic, evaluation sets; and the fixed split of the reference.

Called by the launcher, the rehearsal, the searches and the command line. Rows are `input` (`arrow.fixed_shape_tensor`)
and `label` (int64, nullable). No loop over pixels: tensors come out of Arrow without a copy. A run without labels must
not even read the label column, so that it cannot peek.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.errors import DataError

if TYPE_CHECKING:
    from orchestrator.spec import ModelSpec

NO_LABEL = -1  # stands where a label is null
PARTS = (("fit", 0.6), ("gate", 0.2), ("report", 0.2))  # of the reference, as shares of its distinct rows
_ROW_GROUP = 1024


@dataclass(frozen=True)
class Dataset:
    """Instances and, where they were read, their labels.

    Attributes:
        inputs: (N, *shape), read-only where they come straight from Arrow.
        labels: int64 (N,), -1 where unknown; None: not read.
    """

    inputs: np.ndarray
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, rows: np.ndarray) -> Dataset:
        """The instances at `rows` (indices or a mask), in that order, labels with them."""
        return Dataset(self.inputs[rows], None if self.labels is None else self.labels[rows])


def read_dataset(path: str | Path, spec: ModelSpec | None = None, with_labels: bool = True) -> Dataset:
    """Read a Parquet file.

    Args:
        path: the file.
        spec: what shape, dtype and classes must be; None: whatever the file holds.
        with_labels: read the label column too. False does not touch it.

    Returns:
        At least one instance.

    Raises:
        DataError: the file is no Parquet file or empty, a column is missing or of another type, holds nulls (`input`),
            or does not fit the spec; the message names both sides.
    """
    name = str(path)
    columns = ["input", "label"] if with_labels else ["input"]
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(name, file.schema_arrow, columns)
            if file.metadata.num_rows == 0:
                raise DataError(f"a dataset must hold at least one row; {name} has none")
            _check_input_type(name, file.schema_arrow.field("input").type, spec)
            table = file.read(columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"a dataset must be a readable Parquet file; {name}: {error}; check the path") from error
    inputs = _inputs(name, table["input"], spec)
    return Dataset(inputs, _labels(name, table["label"], spec) if with_labels else None)


def has_labels(path: str | Path) -> bool:
    """Whether a Parquet file has a label column; False also for what is no Parquet file."""
    try:
        return "label" in pq.read_schema(path).names
    except (OSError, pa.ArrowException):
        return False


def write_dataset(path: str | Path, inputs: np.ndarray, labels: np.ndarray | None = None) -> None:
    """Write a Parquet file: whole or not at all.

    Args:
        path: replaced if it is there; its folder is made.
        inputs: (N, *shape), N >= 1, bool or numbers. Arrow has no bool tensors: they are stored as uint8.
        labels: int (N,), -1 or None (all of them): null.

    Raises:
        DataError: the arrays do not fit each other or the format, or the file cannot be written.
    """
    if inputs.ndim < 2 or len(inputs) == 0 or 0 in inputs.shape:
        raise DataError(f"inputs must have shape [N, ...] with N >= 1 and no empty axis; got {list(inputs.shape)}")
    values = np.full(len(inputs), NO_LABEL) if labels is None else np.asarray(labels)
    if values.shape != (len(inputs),) or values.dtype.kind not in "iu":
        got = f"{values.dtype} {list(values.shape)}"
        raise DataError(f"labels must be whole numbers, one for each of {len(inputs)} inputs; got {got}")
    if values.min() < NO_LABEL:
        raise DataError(f"labels must be >= 0, or -1 for unknown; got {values.min()}")
    stored = inputs.view(np.uint8) if inputs.dtype == np.bool_ else inputs
    target = Path(path)
    temporary = target.with_name(f".{target.name}-{secrets.token_hex(6)}")
    try:
        table = pa.table(
            {
                "input": pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(stored)),
                "label": pa.array(values.astype(np.int64), mask=values == NO_LABEL),
            }
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, temporary, row_group_size=_ROW_GROUP, compression="zstd")
        os.replace(temporary, target)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot write the dataset {target}: {error}; check inputs, path and free space") from error
    finally:
        temporary.unlink(missing_ok=True)


def split_reference(reference: Dataset) -> dict[str, Dataset]:
    """Split into `fit` (60%), `gate` (20%) and `report` (20%) by the content of each row.

    The same row always lands in the same part, in every file and run, and so do its duplicates: what trains never
    gates. The order of rows is kept.

    Raises:
        DataError: a part would be empty: there are too few distinct rows.
    """
    places = row_hashes(reference.inputs).astype(np.float64) / 2.0**64
    parts, start = {}, 0.0
    for name, share in PARTS:
        last = name == PARTS[-1][0]
        parts[name] = reference.take((places >= start) & ((places < start + share) | last))
        start += share
    if not all(len(part) for part in parts.values()):
        sizes = ", ".join(f"{name} {len(part)}" for name, part in parts.items())
        raise DataError(
            f"the reference must have rows for each of its parts; {len(reference)} rows split into {sizes}; add more"
        )
    return parts


def concatenate(parts: Sequence[Dataset]) -> Dataset:
    """All rows of data sets of one shape, in order; labels are kept where every part has them."""
    labels = [part.labels for part in parts if part.labels is not None]
    return Dataset(
        np.concatenate([part.inputs for part in parts]),
        np.concatenate(labels) if len(labels) == len(parts) else None,
    )


def row_hashes(inputs: np.ndarray) -> np.ndarray:
    """Content hash of each row, the same on every machine.

    Args:
        inputs: (N, ...) any dtype; N may be 0.

    Returns:
        uint64 (N,), uniform over its range; equal rows have equal hashes.

    Source: BLAKE2b, RFC 7693, first 8 bytes.
    """
    rows = np.ascontiguousarray(inputs, dtype=inputs.dtype.newbyteorder("<"))
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def _check_columns(name: str, schema: Any, columns: list[str]) -> None:
    for column in columns:
        if column not in schema.names:
            remedy = "add it (nulls are fine) or read without labels" if column == "label" else "see `heal convert`"
            raise DataError(
                f"a dataset must have a column {column!r}; {name} has {', '.join(schema.names) or 'none'}; {remedy}"
            )


def _check_input_type(name: str, kind: Any, spec: ModelSpec | None) -> None:
    if not isinstance(kind, pa.FixedShapeTensorType):
        raise DataError(f"column 'input' must be an arrow.fixed_shape_tensor; {name} has {kind}; see `heal convert`")
    if spec is None:
        return
    shape, dtype = tuple(kind.shape), np.dtype(kind.value_type.to_pandas_dtype())
    expected = np.dtype(np.uint8) if spec.numpy_dtype == np.bool_ else spec.numpy_dtype
    if shape != spec.input_shape or dtype != expected:
        needed = f"{expected} {list(spec.input_shape)}"
        raise DataError(f"column 'input' must be {needed} as in the model spec; {name} has {dtype} {list(shape)}")


def _inputs(name: str, column: Any, spec: ModelSpec | None) -> np.ndarray:
    if column.null_count:
        raise DataError(f"column 'input' must have no nulls; {name} has {column.null_count}; drop those rows")
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # too large for one chunk
        inputs = np.concatenate([chunk.to_numpy_ndarray() for chunk in array.chunks])
    else:
        inputs = array.to_numpy_ndarray()
    return inputs.astype(np.bool_) if spec is not None and spec.numpy_dtype == np.bool_ else inputs


def _labels(name: str, column: Any, spec: ModelSpec | None) -> np.ndarray:
    if not pa.types.is_int64(column.type) and not pa.types.is_null(column.type):
        raise DataError(f"column 'label' must be int64; {name} has {column.type}; cast it")
    values = column.cast(pa.int64())
    present = values.drop_null().to_numpy()
    limit = spec.num_classes if spec is not None else np.iinfo(np.int64).max
    if len(present) and (present.min() < 0 or present.max() >= limit):
        wrong = present[(present < 0) | (present >= limit)][0]
        allowed = f"in 0..{limit - 1}" if spec is not None else ">= 0"
        raise DataError(f"labels must be {allowed}, or null; {name} has {wrong}; check the order of classes")
    labels: np.ndarray = values.fill_null(NO_LABEL).to_numpy()
    return labels
