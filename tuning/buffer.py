"""The traffic a search learns from: read once, without duplicates, split for good.

Called by the search before its trials and by the gate. Knows the layout of `traffic/` on the storage and nothing of
models. A label-free search never reads a label column.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.datasets import row_hashes
from orchestrator.errors import NotFound, StorageError
from orchestrator.messages import SearchRequest
from orchestrator.storage import Storage

SHARES = {"train": 0.70, "choose": 0.15, "gate": 0.15}  # of the buffer, by content hash
SPARE_ROWS = 1.25  # read this many times the rows wanted, to make up for duplicates
CLASS_CAP = 2.0  # a predicted class takes at most this many times its even share while others can fill the buffer
FEW_LABELS = 64  # up to this many teach nothing: they choose and judge, which takes fewer
UNLABELLED = -1
OPTIONAL = ("segment",)  # columns that files of older releases, or of other writers, may lack


@dataclass(frozen=True)
class Buffer:
    """Instances of live traffic.

    Attributes:
        inputs: (N, *shape).
        labels: int64 (N,), -1 where unknown.
        ids: str (N,), the request's instance ids.
        segments: str (N,), "" where a file does not say.
    """

    inputs: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    segments: np.ndarray

    def __len__(self) -> int:
        """Number of instances."""
        return len(self.ids)

    @property
    def num_labelled(self) -> int:
        """Instances whose label is known."""
        return int((self.labels != UNLABELLED).sum())

    def take(self, rows: np.ndarray) -> Buffer:
        """The given rows, by index or mask."""
        return Buffer(self.inputs[rows], self.labels[rows], self.ids[rows], self.segments[rows])

    def split(self) -> dict[str, Buffer]:
        """Parts `train`, `choose` and `gate`; equal contents always fall into the same part.

        No label serves two ends. A few labels are of more use in choosing between trials than in training one, so rows
        with labels then leave `train` for `choose`.
        """
        places = row_hashes(self.inputs).astype(np.float64) / 2.0**64
        bounds = np.cumsum(list(SHARES.values()))[:-1]
        part = np.searchsorted(bounds, places, side="right")
        if self.num_labelled <= FEW_LABELS:
            part[(part == 0) & (self.labels != UNLABELLED)] = 1
        return {name: self.take(part == number) for number, name in enumerate(SHARES)}


def collect(storage: Storage, request: SearchRequest) -> Buffer:
    """The newest traffic of the request's window.

    Newest first, duplicates dropped, at most `max_instances`; where there is more, no predicted class takes more than
    twice its even share while others can fill the buffer. Equal requests on equal storage give equal buffers.

    Args:
        storage: holds `traffic/base=<digest>/`.
        request: window, size, seed and how many labels may be read.

    Returns:
        The buffer; empty when nothing was stored.

    Raises:
        StorageError: a traffic file cannot be read.
    """
    index = _read_index(storage, request)
    if index is None:
        no_text = np.empty((0,), np.str_)
        return Buffer(np.empty((0,), np.float32), np.empty((0,), np.int64), no_text, no_text)
    chosen = _choose(index, request.max_instances)
    inputs = _read_inputs(storage, index, chosen)
    ids, segments = (np.array([index[name][i] for i in chosen], dtype=np.str_) for name in ("id", "segment"))
    _, first = np.unique(row_hashes(inputs), return_index=True)
    keep = np.sort(first)[: request.max_instances]
    buffer = Buffer(inputs[keep], np.full(len(keep), UNLABELLED, np.int64), ids[keep], segments[keep])
    if request.labels == "none":
        return buffer
    stored = np.array([index["label"][i] for i in chosen], dtype=np.int64)[keep]
    return replace(buffer, labels=_join_labels(storage, request, buffer.ids, stored))


def _read_index(storage: Storage, request: SearchRequest) -> dict[str, list[object]] | None:
    """Everything but the inputs, newest first; `key` and `row` say where an instance lies."""
    columns = ["id", "time_s", "prediction", "segment"] + (["label"] if request.labels != "none" else [])
    tables = []
    for key in _traffic_keys(storage, request):
        table = _read(storage, key, columns)
        if table is None:
            continue
        table = _with_segments(table)
        if "label" in columns:
            filled = table["label"].cast(pa.int64()).fill_null(UNLABELLED)
            table = table.set_column(table.column_names.index("label"), "label", filled)
        table = table.append_column("key", pa.array([key] * len(table), pa.string()))
        table = table.append_column("row", pa.array(range(len(table)), pa.int64()))
        times = table["time_s"].to_numpy()
        tables.append(table.filter(pa.array((times >= request.since_s) & (times <= request.until_s))))
    if not tables or not sum(len(t) for t in tables):
        return None
    merged = pa.concat_tables(tables, promote_options="permissive")
    merged = merged.sort_by([("time_s", "descending"), ("id", "ascending")])
    return {name: merged[name].to_pylist() for name in merged.column_names}


def _traffic_keys(storage: Storage, request: SearchRequest) -> Iterator[str]:
    """Parquet files of the base whose day can lie in the window."""
    first, last = (datetime.fromtimestamp(max(0.0, min(s, 4e9)), UTC) for s in (request.since_s, request.until_s))
    low, high = (first - timedelta(days=1)).date().isoformat(), (last + timedelta(days=1)).date().isoformat()
    for key in storage.list(f"traffic/base={request.base}/"):
        day = re.search(r"/date=(\d{4}-\d{2}-\d{2})/", key)
        if key.endswith(".parquet") and (day is None or low <= day.group(1) <= high):
            yield key


def _read(storage: Storage, key: str, columns: list[str]) -> pa.Table | None:
    """Columns of a file, without those of OPTIONAL that it lacks; None where it is gone."""
    try:
        data = storage.get(key)
    except NotFound:  # retention or an erasure was quicker
        return None
    try:
        there = pq.read_schema(pa.BufferReader(data)).names
        wanted = [name for name in columns if name in there or name not in OPTIONAL]
        return pq.read_table(pa.BufferReader(data), columns=wanted, partitioning=None)
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
        raise StorageError(f"{storage.uri}: {key} is not a traffic file ({error}); remove it") from error


def _with_segments(table: pa.Table) -> pa.Table:
    """The table with a `segment` in every row; "" where it does not say."""
    if "segment" not in table.column_names:
        return table.append_column("segment", pa.array([""] * len(table), pa.string()))
    texts = table["segment"].cast(pa.string()).fill_null("")
    return table.set_column(table.column_names.index("segment"), "segment", texts)


def _choose(index: dict[str, list[object]], wanted: int) -> list[int]:
    """Rows to read: newest first, over-full classes last."""
    num_rows, budget = len(index["id"]), int(wanted * SPARE_ROWS)
    if num_rows <= budget:
        return list(range(num_rows))
    pool = range(min(num_rows, 2 * budget))
    predictions = index["prediction"]
    cap = CLASS_CAP * budget / len({predictions[i] for i in pool})
    taken: Counter[object] = Counter()
    within: list[int] = []
    beyond: list[int] = []
    for i in pool:
        taken[predictions[i]] += 1
        (within if taken[predictions[i]] <= cap else beyond).append(i)
    return (within + beyond)[:budget]


def _read_inputs(storage: Storage, index: dict[str, list[object]], chosen: list[int]) -> np.ndarray:
    by_key: dict[str, list[int]] = {}
    for place, i in enumerate(chosen):
        by_key.setdefault(str(index["key"][i]), []).append(place)
    inputs: np.ndarray | None = None
    for key, places in by_key.items():
        table = _read(storage, key, ["input"])
        if table is None:
            raise StorageError(f"{storage.uri}: {key} went away while it was read; search again")
        rows = table["input"].combine_chunks().to_numpy_ndarray()
        if inputs is None:
            inputs = np.empty((len(chosen), *rows.shape[1:]), rows.dtype)
        inputs[places] = rows[[index["row"][chosen[p]] for p in places]]
    assert inputs is not None
    return inputs


def _join_labels(storage: Storage, request: SearchRequest, ids: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """Late labels joined by id, the first one wins; a number keeps that many, drawn by seed."""
    found: dict[str, tuple[float, int]] = {}
    wanted = set(ids.tolist())
    for key in storage.list(f"traffic/labels/base={request.base}/"):
        table = _read(storage, key, ["id", "label", "time_s"]) if key.endswith(".parquet") else None
        for row in table.to_pylist() if table is not None else ():
            late = (row["time_s"], row["label"])
            if row["id"] in wanted and late < found.get(row["id"], (np.inf, 0)):
                found[row["id"]] = late
    labels = stored.copy()
    for i, name in enumerate(ids.tolist()):
        if labels[i] == UNLABELLED and name in found:
            labels[i] = found[name][1]
    if request.labels != "all":
        known = np.flatnonzero(labels != UNLABELLED)
        draw = sorted(known, key=lambda i: hashlib.blake2b(f"{request.seed}:{ids[i]}".encode()).digest())
        labels[draw[int(request.labels) :]] = UNLABELLED
    return labels
