"""Datasets: what is read, what is rejected, and the split that no row can cross."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from orchestrator.datasets import Dataset, read_dataset, row_hashes, split_reference, write_dataset
from orchestrator.errors import DataError
from orchestrator.spec import DTYPES, ModelSpec

SPEC = ModelSpec("net:build", (2, 3), "UINT8", ("a", "b", "c"), "reference.parquet")
INPUTS = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
TENSORS = pa.FixedShapeTensorArray.from_numpy_ndarray(INPUTS)


def _write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_what_was_written_is_read_back(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "new" / "d.parquet"
    inputs = (INPUTS % 2).astype(DTYPES[dtype])
    write_dataset(path, inputs, np.array([0, 2, -1, 1]))
    read = read_dataset(path, ModelSpec("net:build", (2, 3), dtype, ("a", "b", "c"), "r"))
    assert read.inputs.dtype == inputs.dtype
    np.testing.assert_array_equal(read.inputs, inputs)
    assert read.labels is not None
    assert read.labels.tolist() == [0, 2, -1, 1]
    assert pq.read_table(path)["label"].null_count == 1
    assert [p.name for p in path.parent.iterdir()] == ["d.parquet"]


def test_several_row_groups_come_back_in_order(tmp_path: Path) -> None:
    inputs = np.arange(5000, dtype=np.float32).reshape(2500, 2)
    write_dataset(tmp_path / "d", inputs, np.arange(2500))
    read = read_dataset(tmp_path / "d")
    np.testing.assert_array_equal(read.inputs, inputs)
    np.testing.assert_array_equal(read.labels, np.arange(2500))


def test_without_labels_the_column_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "d", INPUTS, np.zeros(4, np.int64))
    asked = []
    read = pq.ParquetFile.read
    monkeypatch.setattr(pq.ParquetFile, "read", lambda file, columns: asked.append(columns) or read(file, columns))
    assert read_dataset(tmp_path / "d", SPEC, with_labels=False).labels is None
    assert asked == [["input"]]


def test_without_labels_the_column_may_be_absent_or_nonsense(tmp_path: Path) -> None:
    assert len(read_dataset(_write(tmp_path / "a", input=TENSORS), SPEC, with_labels=False)) == 4
    nonsense = _write(tmp_path / "b", input=TENSORS, label=["x"] * 4)
    assert len(read_dataset(nonsense, SPEC, with_labels=False)) == 4


def test_unknown_labels_are_minus_one(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", INPUTS)
    nulls = _write(tmp_path / "n", input=TENSORS, label=pa.nulls(4))
    for path in (tmp_path / "d", nulls):
        labels = read_dataset(path, SPEC).labels
        assert labels is not None
        assert labels.tolist() == [-1] * 4


def _tensors(inputs: np.ndarray) -> Any:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(inputs)


_HOLED = pa.ExtensionArray.from_storage(
    TENSORS.type, pa.array([[1] * 6, None, [1] * 6, [1] * 6], TENSORS.type.storage_type)
)
_LABELS = [0, 1, 2, 0]
REJECTED = [
    ({"label": _LABELS}, r"must have a column 'input'; .* has label"),
    ({"input": TENSORS}, r"must have a column 'label'; .* has input; add it"),
    ({"input": [1, 2, 3, 4], "label": _LABELS}, r"must be an arrow.fixed_shape_tensor; .* has int64"),
    ({"input": _HOLED, "label": _LABELS}, r"must have no nulls; .* has 1"),
    ({"input": _tensors(INPUTS.reshape(4, 3, 2)), "label": _LABELS}, r"must be uint8 \[2, 3\] .*has uint8 \[3, 2\]"),
    ({"input": _tensors(INPUTS.astype("f4")), "label": _LABELS}, r"must be uint8 \[2, 3\] .*has float32 \[2, 3\]"),
    ({"input": TENSORS, "label": pa.array(_LABELS, pa.int32())}, r"'label' must be int64; .* has int32"),
    ({"input": TENSORS, "label": ["a"] * 4}, r"'label' must be int64; .* has string"),
    ({"input": TENSORS, "label": [0, 3, 1, 0]}, r"labels must be in 0..2, or null; .* has 3"),
    ({"input": TENSORS, "label": [0, -1, 1, None]}, r"labels must be in 0..2, or null; .* has -1"),
    ({"input": TENSORS[:0], "label": pa.array([], pa.int64())}, r"at least one row"),
]


@pytest.mark.parametrize(("columns", "message"), REJECTED)
def test_a_dataset_that_does_not_fit_is_rejected_with_both_sides(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_dataset(_write(tmp_path / "d.parquet", **columns), SPEC)


def test_a_negative_label_is_rejected_even_without_a_spec(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="labels must be >= 0"):
        read_dataset(_write(tmp_path / "d", input=TENSORS, label=[0, -1, 0, 0]))


@pytest.mark.parametrize("content", [None, b"", b"PAR1 not really PAR1"])
def test_a_missing_or_broken_file_is_a_data_error(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "d").write_bytes(content)
    with pytest.raises(DataError, match="readable Parquet file"):
        read_dataset(tmp_path / "d")


@pytest.mark.parametrize(
    ("inputs", "labels"),
    [
        (np.zeros((0, 2)), None),
        (np.zeros(3), None),
        (np.zeros((3, 0)), None),
        (np.zeros((3, 2)), np.zeros(2, np.int64)),
        (np.zeros((3, 2)), np.zeros(3)),
        (np.zeros((3, 2)), np.full(3, -2)),
        (np.zeros((3, 2), complex), None),
    ],
)
def test_arrays_that_cannot_be_a_dataset_are_not_written(
    tmp_path: Path, inputs: np.ndarray, labels: np.ndarray | None
) -> None:
    with pytest.raises(DataError):
        write_dataset(tmp_path / "d", inputs, labels)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "d", INPUTS)
    before = (tmp_path / "d").read_bytes()

    def full(table: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(DataError, match="disk full"):
        write_dataset(tmp_path / "d", INPUTS + 1)
    assert (tmp_path / "d").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_the_split_has_the_promised_shares() -> None:
    rows = np.arange(20_000, dtype=np.int32).reshape(-1, 2)
    parts = split_reference(Dataset(rows))
    assert list(parts) == ["fit", "gate", "report"]
    assert [len(part) / 10_000 for part in parts.values()] == pytest.approx([0.6, 0.2, 0.2], abs=0.02)


def test_too_small_a_reference_is_rejected_with_the_sizes() -> None:
    with pytest.raises(DataError, match="rows for each of its parts; 2 rows split into fit"):
        split_reference(Dataset(np.zeros((2, 3)), np.zeros(2, np.int64)))


@settings(max_examples=40)
@given(st.permutations(range(60)), st.lists(st.integers(0, 59), max_size=20))
def test_a_row_lands_in_the_same_part_whatever_its_order_and_its_duplicates(order: list[int], again: list[int]) -> None:
    rows = np.arange(120, dtype=np.float32).reshape(60, 2)
    labels = np.arange(60)
    home = {}
    for name, part in split_reference(Dataset(rows, labels)).items():
        assert part.labels is not None
        home |= dict.fromkeys(part.labels.tolist(), name)
    assert sorted(home) == list(range(60))
    shuffled = np.array([*order, *again])
    parts = split_reference(Dataset(rows[shuffled], labels[shuffled]))
    for name, part in parts.items():
        assert part.labels is not None
        np.testing.assert_array_equal(part.inputs, rows[part.labels])
        assert {home[label] for label in part.labels.tolist()} <= {name}
    assert sum(len(part) for part in parts.values()) == len(shuffled)


def test_row_hashes_are_pinned_so_that_splits_never_move() -> None:
    assert row_hashes(np.zeros((1, 4), np.uint8)).tolist() == [PINNED]
    assert row_hashes(np.zeros((0, 4), np.uint8)).shape == (0,)


PINNED = 11387576302567392334  # BLAKE2b-64 of four zero bytes, little endian


@settings(max_examples=30)
@given(hnp.arrays(np.int16, st.tuples(st.integers(1, 5), st.just(3))))
def test_row_hashes_do_not_depend_on_memory_order_or_byte_order(rows: np.ndarray) -> None:
    expected = row_hashes(rows).tolist()
    assert row_hashes(np.asfortranarray(rows)).tolist() == expected
    assert row_hashes(rows.astype(">i2")).tolist() == expected
    assert [row_hashes(row[None])[0] for row in rows] == expected
