"""Sampled traffic and late labels, written to the storage as Parquet by a thread of their own.

Called by `Healable` on the request path, so `offer` never blocks and never raises: a full queue drops and counts, a
broken storage costs samples and nothing else. Searches read what is written here.
"""

from __future__ import annotations

import io
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.errors import StorageError
from orchestrator.storage import Storage
from serve_app.protocol import softmax

FLUSH_ROWS = 256
FLUSH_S = 1.0
MAX_QUEUED_BYTES = 64 << 20  # inputs waiting to be written; above it rows are dropped
MAX_QUEUED_LABELS = 100_000

log = logging.getLogger("rayheal")


@dataclass(frozen=True)
class Rows:
    """Instances of one request as they were answered; `inputs` and `logits` are numpy or tensors, (N, ...)."""

    ids: tuple[str, ...]
    time_s: float
    segment: str
    digest: str
    generation: int
    inputs: Any
    logits: Any

    @property
    def num_bytes(self) -> int:
        """Memory held by the inputs."""
        return int(self.inputs.nbytes)


class TrafficLog:
    """Writes `traffic/base=<base>/date=<day>/<replica>-<n>.parquet` and `traffic/labels/base=<base>/...`.

    Args:
        storage: the service's storage.
        base: digest of the base model.
        replica_tag: part of file names; with `incarnation` it is unique.
        incarnation: of this process.
        store: "inputs", or "none": nothing but labels is written.
    """

    def __init__(
        self, storage: Storage, base: str, replica_tag: str, *, incarnation: str = "0", store: str = "inputs"
    ) -> None:
        if store not in ("inputs", "none"):
            raise ValueError(f"store must be inputs or none; got {store!r}")
        self.dropped = 0  # rows lost to a full queue or a broken storage
        self.problem = ""  # why the last write failed; empty when it did not
        self.store = store
        self._storage, self._base = storage, base
        self._name = f"{_safe(replica_tag)}-{incarnation[:8]}"
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._rows: deque[Rows] = deque()
        self._labels: deque[tuple[str, int, float]] = deque()
        self._num_rows = self._num_bytes = 0
        self._oldest_s: float | None = None  # monotonic time of the first unwritten offer
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="traffic", daemon=True)
        self._thread.start()

    def offer(self, rows: Rows) -> bool:
        """Take rows for writing; False when they were dropped (or `store` is none, which is not counted)."""
        if self.store == "none":
            return False
        with self._changed:
            if self._closing or self._num_bytes + rows.num_bytes > MAX_QUEUED_BYTES:
                self.dropped += len(rows.ids)
                return False
            self._rows.append(rows)
            self._num_rows += len(rows.ids)
            self._num_bytes += rows.num_bytes
            self._noted()
        return True

    def offer_labels(self, labels: Sequence[tuple[str, int]], time_s: float) -> None:
        """Take true labels (instance id, class) that arrived at `time_s`; the surplus is dropped and counted."""
        with self._changed:
            room = max(MAX_QUEUED_LABELS - len(self._labels), 0)
            self._labels.extend((instance, label, time_s) for instance, label in labels[:room])
            self.dropped += len(labels) - len(labels[:room])
            self._noted()

    def _noted(self) -> None:
        if self._oldest_s is None:
            self._oldest_s = time.monotonic()
            self._changed.notify()
        elif self._num_rows >= FLUSH_ROWS:
            self._changed.notify()

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what is queued and end the thread; later offers are dropped."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._due():
                    self._changed.wait(self._patience_s())  # woken by the first offer, to time out on its age
                rows, self._rows = self._rows, deque()
                labels, self._labels = self._labels, deque()
                self._num_rows, self._oldest_s = 0, None
                closing = self._closing
            self._write(rows, labels)
            if closing:
                return

    def _due(self) -> bool:
        aged = self._oldest_s is not None and time.monotonic() - self._oldest_s >= FLUSH_S
        return self._closing or self._num_rows >= FLUSH_ROWS or aged

    def _patience_s(self) -> float | None:
        return None if self._oldest_s is None else max(self._oldest_s + FLUSH_S - time.monotonic(), 0.0)

    def _write(self, rows: deque[Rows], labels: deque[tuple[str, int, float]]) -> None:
        for day, part in _parts(rows):
            self._put(f"traffic/base={self._base}/date={day}", _traffic_table, part, sum(len(r.ids) for r in part))
        if labels:
            self._put(f"traffic/labels/base={self._base}", _label_table, list(labels), len(labels))
        with self._changed:  # only now: rows being written still hold memory
            self._num_bytes -= sum(r.num_bytes for r in rows)

    def _put(self, folder: str, table_of: Any, values: list[Any], count: int) -> None:
        try:
            self._storage.put(f"{folder}/{self._name}-{next(self._numbers):08d}.parquet", table_of(values))
        except (StorageError, OSError, pa.ArrowException, ValueError, RuntimeError) as error:
            problem = f"{type(error).__name__}: {error}"
            with self._changed:
                self.dropped += count
            if problem != self.problem:  # say a cause once, not once a second
                log.warning("traffic is not being stored: %s", problem)
            self.problem = problem
        else:
            if self.problem:
                log.info("traffic is being stored again")
            self.problem = ""


def _parts(rows: deque[Rows]) -> Iterator[tuple[str, list[Rows]]]:
    """Rows by day (UTC), at most about FLUSH_ROWS to a file."""
    by_day: dict[str, list[Rows]] = {}
    for item in rows:
        by_day.setdefault(time.strftime("%Y-%m-%d", time.gmtime(item.time_s)), []).append(item)
    for day, items in by_day.items():
        part: list[Rows] = []
        for item in items:
            part.append(item)
            if sum(len(r.ids) for r in part) >= FLUSH_ROWS:
                yield day, part
                part = []
        if part:
            yield day, part


def _numpy(values: Any) -> np.ndarray:
    return np.asarray(values if isinstance(values, np.ndarray) else values.detach().cpu().numpy())


def _traffic_table(rows: list[Rows]) -> bytes:
    inputs = np.ascontiguousarray(np.concatenate([_numpy(r.inputs) for r in rows]))
    if inputs.dtype == np.bool_:
        inputs = inputs.astype(np.uint8)
    logits_NK = np.concatenate([_numpy(r.logits).astype(np.float32) for r in rows])
    each = [r for r in rows for _ in r.ids]
    columns = {
        "id": _strings([i for r in rows for i in r.ids]),
        "time_s": _numbers([r.time_s for r in each], np.float64),
        "segment": _strings([r.segment for r in each]),
        "digest": _strings([r.digest for r in each]),
        "generation": _numbers([r.generation for r in each], np.int64),
        "prediction": _numbers(logits_NK.argmax(axis=1), np.int64),
        "confidence": _numbers(softmax(logits_NK).max(axis=1), np.float32),
        "input": _tensors(inputs),
        "label": pa.nulls(len(inputs), pa.int64()),
    }
    return _parquet(pa.table(columns), ["segment", "digest"])


def _label_table(labels: list[tuple[str, int, float]]) -> bytes:
    ids, classes, times = zip(*labels, strict=True)
    columns = {"id": _strings(ids), "label": _numbers(classes, np.int64), "time_s": _numbers(times, np.float64)}
    return _parquet(pa.table(columns), [])


# Arrow arrays are made from buffers: `pa.array` imports pandas at its first call, 1.4 CPU-seconds in every replica.


def _numbers(values: Any, dtype: Any) -> pa.Array:
    packed = np.ascontiguousarray(values, dtype=dtype)
    return pa.Array.from_buffers(pa.from_numpy_dtype(packed.dtype), packed.size, [None, pa.py_buffer(packed)])


def _strings(values: Sequence[str]) -> pa.Array:
    encoded = [value.encode() for value in values]
    offsets = np.zeros(len(encoded) + 1, dtype=np.int32)
    np.cumsum([len(text) for text in encoded], out=offsets[1:])
    return pa.StringArray.from_buffers(len(encoded), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded)))


def _tensors(values: np.ndarray) -> pa.Array:
    flat = _numbers(values.reshape(-1), values.dtype)
    kind = pa.fixed_shape_tensor(flat.type, values.shape[1:])
    return pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(flat, type=kind.storage_type))


def _parquet(table: pa.Table, dictionary: list[str]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, use_dictionary=dictionary or False, compression="snappy")
    return buffer.getvalue()


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
