"""Traffic reaches the storage as Parquet, and nothing that happens there reaches the request path."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from orchestrator.errors import StorageError
from orchestrator.storage import Storage, open_storage
from serve_app import traffic
from serve_app.traffic import Rows, TrafficLog

COLUMNS = ["id", "time_s", "segment", "digest", "generation", "prediction", "confidence", "input", "label"]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path))


def rows(count: int = 3, name: str = "r", time_s: float = 86_400.0 * 365) -> Rows:
    inputs = np.arange(count * 6, dtype=np.uint8).reshape(count, 2, 3)
    logits = np.eye(4, dtype=np.float32)[np.arange(count) % 4] * 9
    return Rows(tuple(f"{name}/{i}" for i in range(count)), time_s, "cam", "base", 7, inputs, logits)


def read(storage: Storage, prefix: str) -> list[pq.ParquetFile]:
    return [pq.ParquetFile(io.BytesIO(storage.get(key))) for key in storage.list(prefix)]


def test_rows_and_labels_are_written_with_the_agreed_columns(storage: Storage) -> None:
    log = TrafficLog(storage, "b1", "app#small#x1", incarnation="abcdef0123")
    assert log.offer(rows())
    log.offer_labels([("r/0", 2)], 5.0)
    log.close(30)
    (key,) = storage.list("traffic/base=b1/")
    assert key == "traffic/base=b1/date=1971-01-01/app-small-x1-abcdef01-00000000.parquet"
    table = read(storage, "traffic/base=b1/")[0].read()
    assert table.column_names == COLUMNS
    np.testing.assert_array_equal(table["input"].combine_chunks().to_numpy_ndarray(), rows().inputs)
    assert table["id"].to_pylist() == ["r/0", "r/1", "r/2"]
    assert table["prediction"].to_pylist() == [0, 1, 2]
    assert table["generation"].to_pylist() == [7, 7, 7]
    assert table["label"].null_count == 3
    assert min(table["confidence"].to_pylist()) > 0.99
    (labels,) = read(storage, "traffic/labels/base=b1/")
    assert labels.read().to_pylist() == [{"id": "r/0", "label": 2, "time_s": 5.0}]


def test_rows_are_written_after_a_second_without_being_asked(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "FLUSH_S", 0.05)
    written = threading.Event()
    put = storage.put
    monkeypatch.setattr(storage, "put", lambda key, data: (put(key, data), written.set()), raising=False)
    log = TrafficLog(storage, "b1", "r")
    log.offer(rows())
    assert written.wait(30)
    log.close(30)


def test_tensors_are_taken_as_they_come_from_the_device(storage: Storage) -> None:
    log = TrafficLog(storage, "b1", "r")
    given = rows()
    log.offer(
        Rows(
            given.ids,
            1.0,
            "",
            "base",
            0,
            torch.from_numpy(given.inputs),
            torch.from_numpy(given.logits).bfloat16().float(),
        )
    )
    log.close(30)
    assert read(storage, "traffic/base=b1/")[0].metadata.num_rows == 3


def test_full_queue_drops_and_counts_and_does_not_wait(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "MAX_QUEUED_BYTES", 40)
    gate = threading.Event()
    monkeypatch.setattr(storage, "put", lambda key, data: gate.wait(10), raising=False)
    log = TrafficLog(storage, "b1", "r")
    taken = [log.offer(rows()) for _ in range(5)]
    assert taken == [True, True, False, False, False]
    assert log.dropped == 9
    gate.set()
    log.close(30)


def test_broken_storage_costs_samples_only_and_its_cause_is_said_once(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def put(key: str, data: bytes) -> None:
        calls.append(key)
        raise StorageError("the disk is full")

    monkeypatch.setattr(storage, "put", put, raising=False)
    with caplog.at_level(logging.WARNING, "rayheal"):
        log = TrafficLog(storage, "b1", "r")
        for _ in range(3):
            log.offer(rows(256))
        log.offer_labels([("r/0", 1)], 1.0)
        log.close(30)
    assert len(calls) == 4
    assert log.dropped == 3 * 256 + 1
    assert "the disk is full" in log.problem
    assert len([r for r in caplog.records if "not being stored" in r.message]) == 1


def test_store_none_writes_labels_and_no_inputs(storage: Storage) -> None:
    log = TrafficLog(storage, "b1", "r", store="none")
    assert not log.offer(rows())
    log.offer_labels([("r/0", 1)], 1.0)
    log.close(30)
    assert storage.list("traffic/base=") == []
    assert len(storage.list("traffic/labels/")) == 1
    assert log.dropped == 0


def test_writing_does_not_import_pandas_into_a_replica() -> None:
    code = (
        "import sys, numpy as np; from serve_app.traffic import Rows, _traffic_table;"
        "_traffic_table([Rows(('a/0',), 1.0, '', 'base', 0, np.zeros((1, 2, 3), np.uint8), np.zeros((1, 4)))]);"
        "assert 'pandas' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(traffic.__file__).parents[1])
