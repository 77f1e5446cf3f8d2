"""The buffer takes the newest distinct traffic, splits it for good, and reads labels only where it may."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.messages import Kind, SearchRequest
from orchestrator.storage import open_storage
from tuning.buffer import Buffer, collect

REQUEST = SearchRequest(
    episode="e1",
    base="b" * 8,
    storage="",
    since_s=100.0,
    until_s=1e9,
    max_instances=50,
    labels="none",
    kind=Kind.COVARIATE_HARMFUL,
    seed=0,
    budget_s=60,
    num_trials=1,
    epochs=1,
    trial_device="cpu",
)


def write(storage, name, inputs, times, predictions=None, labels=None, base=REQUEST.base, segments=None, drop=()):
    """One traffic file; without `labels` it has no label column at all."""
    n = len(inputs)
    tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(inputs))
    columns = {
        "id": [f"{name}-{i}" for i in range(n)],
        "time_s": np.asarray(times, float),
        "segment": segments or ["all"] * n,
        "digest": ["base"] * n,
        "generation": [0] * n,
        "prediction": np.zeros(n, int) if predictions is None else predictions,
        "confidence": np.ones(n, np.float32),
        "input": tensor,
    }
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
    columns = {key: values for key, values in columns.items() if key not in drop}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    storage.put(f"traffic/base={base}/date=1970-01-01/{name}.parquet", sink.getvalue().to_pybytes())


def images(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)


@pytest.fixture
def storage(tmp_path):
    return open_storage(str(tmp_path))


def test_only_the_window_is_read_newest_first_and_capped(storage):
    write(storage, "a", images(40), range(80, 120))
    write(storage, "b", images(40, 1), range(120, 160))
    buffer = collect(storage, dataclasses.replace(REQUEST, max_instances=45))
    assert len(buffer) == 45
    assert set(buffer.ids) == {f"b-{i}" for i in range(40)} | {f"a-{i}" for i in range(35, 40)}
    assert np.array_equal(buffer.inputs[buffer.ids == "b-7"][0], images(40, 1)[7])


def test_repeated_inputs_count_once(storage):
    write(storage, "a", np.repeat(images(5), 6, axis=0), range(100, 130))
    assert len(collect(storage, REQUEST)) == 5


def test_no_predicted_class_crowds_the_others_out(storage):
    predictions = np.r_[np.tile([1, 2, 3], 40), np.zeros(380, int)]
    write(storage, "a", images(500), np.arange(100, 600), predictions)
    buffer = collect(storage, dataclasses.replace(REQUEST, max_instances=200))
    kept = predictions[[int(i.split("-")[1]) for i in buffer.ids]]
    assert len(buffer) == 200
    assert (kept != 0).sum() > 60


def test_an_empty_storage_gives_an_empty_buffer(storage):
    assert len(collect(storage, REQUEST)) == 0


def test_without_labels_the_label_column_is_never_read(storage):
    write(storage, "a", images(10), range(100, 110), labels=None)  # no such column: reading it would fail
    assert collect(storage, REQUEST).num_labelled == 0


def test_late_labels_join_by_id_and_the_first_wins(storage):
    write(storage, "a", images(10), range(100, 110), labels=[None] * 9 + [7])
    late = pa.table({"id": ["a-1", "a-1", "a-2", "other"], "label": [3, 4, 5, 6], "time_s": [2.0, 1.0, 1.0, 1.0]})
    sink = pa.BufferOutputStream()
    pq.write_table(late, sink)
    storage.put(f"traffic/labels/base={REQUEST.base}/r-0.parquet", sink.getvalue().to_pybytes())
    buffer = collect(storage, dataclasses.replace(REQUEST, labels="all"))
    known = {i: int(y) for i, y in zip(buffer.ids, buffer.labels, strict=True) if y >= 0}
    assert known == {"a-1": 4, "a-2": 5, "a-9": 7}


def test_a_number_of_labels_keeps_a_seeded_choice(storage):
    write(storage, "a", images(50), range(100, 150), labels=np.arange(50) % 3)
    few = dataclasses.replace(REQUEST, labels="12")
    first, again = collect(storage, few), collect(storage, few)
    assert first.num_labelled == 12
    assert np.array_equal(first.labels, again.labels)
    other = collect(storage, dataclasses.replace(few, seed=1))
    assert not np.array_equal(first.labels, other.labels)


def test_the_split_depends_on_contents_alone():
    inputs = images(2000)
    whole = Buffer(inputs, np.full(2000, -1), *[np.arange(2000).astype(str)] * 2).split()
    shuffled = np.random.default_rng(0).permutation(2000)
    again = Buffer(inputs[shuffled], np.full(2000, -1), *[shuffled.astype(str)] * 2).split()
    for part in ("train", "choose", "gate"):
        assert set(whole[part].ids) == set(again[part].ids)
    assert sum(len(p) for p in whole.values()) == 2000
    assert len(whole["train"]) == pytest.approx(1400, abs=80)
    assert len(whole["gate"]) == pytest.approx(300, abs=60)


def test_few_labels_choose_and_judge_and_do_not_train():
    inputs = np.arange(400, dtype=np.int64)[:, None]
    labels = np.where(np.arange(400) % 20 == 0, 1, -1)
    parts = Buffer(inputs, labels, *[np.arange(400).astype(str)] * 2).split()
    assert parts["train"].num_labelled == 0
    assert parts["choose"].num_labelled + parts["gate"].num_labelled == 20
    assert sum(len(part) for part in parts.values()) == 400
    many = Buffer(inputs, np.ones(400, np.int64), *[np.arange(400).astype(str)] * 2).split()
    assert many["train"].num_labelled == len(many["train"]) > 200


def test_segments_travel_with_their_rows_and_older_files_have_none(storage):
    write(storage, "old", images(4), np.arange(200, 204), drop=("segment",))
    write(storage, "new", images(6, seed=1), np.arange(300, 306), segments=["north", "south"] * 3)
    buffer = collect(storage, REQUEST)
    assert dict(zip(buffer.ids.tolist(), buffer.segments.tolist(), strict=True)) == {
        **{f"old-{i}": "" for i in range(4)},
        **{f"new-{i}": ("north", "south")[i % 2] for i in range(6)},
    }
    assert buffer.take(buffer.segments == "north").ids.tolist() == ["new-4", "new-2", "new-0"]
