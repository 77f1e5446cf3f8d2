"""Traffic of one drift, one label regime and one seed, put on a storage as replicas put it there.

What a search then reads is what `tuning.buffer.collect` makes of it, so a buffer that a stream fools is fooled here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.datasets import Dataset, read_dataset
from orchestrator.messages import Kind, SearchRequest
from orchestrator.models import publish_model
from orchestrator.spec import load_spec
from orchestrator.storage import Storage, open_storage
from tuning.prepare import prepare_base

DRIFTS = ("gaussian_noise", "glass_blur", "contrast", "defocus_blur", "fog", "brightness")
TUNED_ON = DRIFTS[:3]  # recipes and limits were chosen on these; the other three were only looked at
STREAMS = ("iid", "sorted", "half", "label_shift")
LABELS = ("none", "20", "200", "all")
START_S = 1_700_000_000.0
KEPT_SHARE = 0.1  # of the rarer half of the classes, under label_shift


@dataclass(frozen=True)
class Scene:
    """One search: what the traffic shows, in what order, and how much of it is labelled."""

    drift: str
    stream: str = "iid"
    labels: str = "none"
    seed: int = 0


@dataclass(frozen=True)
class Limits:
    """Of a search: trials, epochs of each, seconds of all."""

    trials: int
    epochs: int
    budget_s: float


@dataclass(frozen=True)
class World:
    """A scene's storage and search, and what its outcome is scored on."""

    storage: Storage
    request: SearchRequest
    evaluation: Dataset  # under the drift; under label_shift with its class shares
    clean: Dataset
    evaluation_rows: np.ndarray  # int64, which rows of the eval files `evaluation` has; the same images in every set
    stream: Dataset  # the traffic in its order with all true labels: for scoring answers as they came, for nothing else
    stream_clean: np.ndarray  # the same images without the drift


def build(data: Path, folder: Path, scene: Scene, limits: Limits) -> World:
    """A storage with the model, its baseline and the scene's traffic.

    Args:
        data: the shared CIFAR-10 folder.
        folder: of the storage; model and baseline are kept there between scenes.
        scene: what to make.
        limits: of the search.
    """
    storage = open_storage(str(folder))
    base = publish_model(storage, load_spec(data / "model.yaml"))
    prepare_base(storage, base, "cpu")
    for key in storage.list("traffic/"):
        storage.delete(key)
    for key in storage.list("trials/"):
        storage.delete(key)
    rng = np.random.default_rng(scene.seed)
    drifted, clean = (read_dataset(data / f"{name}.traffic.parquet") for name in (scene.drift, "clean"))
    inputs, labels, order = _stream(scene.stream, drifted, clean, rng)
    _write(storage, base, inputs, labels)
    evaluation = read_dataset(data / f"{scene.drift}.eval.parquet")
    assert evaluation.labels is not None
    rows = np.arange(len(evaluation))
    if scene.stream == "label_shift":
        rows = _shifted_rows(evaluation.labels, rng)
    request = SearchRequest(
        episode="-".join((scene.drift, scene.stream, scene.labels, str(scene.seed))),
        base=base,
        storage=storage.uri,
        since_s=START_S - 1,
        until_s=START_S + len(inputs),
        max_instances=2000,
        labels=scene.labels,
        kind=Kind.COVARIATE_HARMFUL,
        seed=scene.seed,
        budget_s=limits.budget_s,
        num_trials=limits.trials,
        epochs=limits.epochs,
        trial_device="auto",
    )
    return World(
        storage=storage,
        request=request,
        evaluation=evaluation.take(rows),
        clean=read_dataset(data / "clean.eval.parquet"),
        evaluation_rows=rows,
        stream=Dataset(inputs, labels),
        stream_clean=clean.inputs[order],
    )


def _stream(
    stream: str, drifted: Dataset, clean: Dataset, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, labels and file rows of the traffic, in its order."""
    assert drifted.labels is not None
    order = rng.permutation(len(drifted))
    inputs, labels = drifted.inputs, drifted.labels
    if stream == "sorted":
        order = order[np.argsort(labels[order], kind="stable")]
    elif stream == "half":
        whole = rng.random(len(inputs)) < 0.5
        inputs = np.where(whole[:, None, None, None], clean.inputs, inputs)
    elif stream == "label_shift":
        order = order[_shifted_rows(labels[order], rng)]
    return inputs[order], labels[order], order


def _shifted_rows(labels_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows that leave the even classes whole and a tenth of the odd ones."""
    return np.flatnonzero((labels_N % 2 == 0) | (rng.random(len(labels_N)) < KEPT_SHARE))


def _write(storage: Storage, base: str, inputs: np.ndarray, labels: np.ndarray) -> None:
    """One file per 500 rows, a row a second; predictions are not known here and left at 0."""
    for start in range(0, len(inputs), 500):
        rows = slice(start, start + 500)
        num = len(inputs[rows])
        table = pa.table(
            {
                "id": [f"i{start + i}" for i in range(num)],
                "time_s": START_S + start + np.arange(num),
                "segment": ["all"] * num,
                "digest": ["base"] * num,
                "generation": [0] * num,
                "prediction": np.zeros(num, np.int64),
                "confidence": np.ones(num, np.float32),
                "input": pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(inputs[rows])),
                "label": pa.array(labels[rows], pa.int64()),
            }
        )
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        storage.put(f"traffic/base={base}/date=2023-11-14/r-{start}.parquet", sink.getvalue().to_pybytes())
