"""Which model and data a demo or a rehearsal runs on: the embedded digits, or files that the user names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orchestrator.datasets import Dataset, has_labels, read_dataset, split_reference
from orchestrator.errors import SpecError
from orchestrator.spec import ModelSpec, load_spec

MAX_EVAL_ROWS = 1000  # of a clean set: enough for one point, and half a minute less on two cores
HELD_OUT = 0.25  # of the drifted rows measure when no --eval is given


@dataclass(frozen=True)
class DemoInputs:
    """Model and data sets of one demo; `evals` never streams, `streams` never measures."""

    model: Path
    spec: ModelSpec
    clean: Dataset
    drifted: Dataset
    eval_clean: Dataset
    eval_drifted: Dataset
    embedded: bool


def demo_inputs(model: Path | None, clean: Path | None, drifted: Path | None, evaluation: Path | None) -> DemoInputs:
    """Read and check everything before anything is started.

    Raises:
        SpecError, DataError: a file does not fit; the message names it.
    """
    if model is None:
        if clean or drifted or evaluation:
            raise SpecError("--clean, --drifted and --eval need --model; without it the embedded digits are used")
        return _digits()
    if drifted is None:
        raise SpecError("--model needs --drifted, a Parquet file of drifted traffic; see `heal convert`")
    spec = load_spec(model)
    moved = read_dataset(drifted, spec, with_labels=evaluation is None or has_labels(drifted))
    cut = len(moved) if evaluation else int(len(moved) * (1 - HELD_OUT))
    measured = read_dataset(evaluation, spec) if evaluation else moved.take(np.arange(cut, len(moved)))
    parts = reference_parts(spec)
    still = (
        read_dataset(clean, spec, with_labels=has_labels(clean)) if clean else _joined(parts["gate"], parts["report"])
    )
    return DemoInputs(
        model=model,
        spec=spec,
        clean=still,
        drifted=moved.take(np.arange(cut)),
        eval_clean=still.take(np.arange(min(len(still), MAX_EVAL_ROWS))) if clean else parts["report"],
        eval_drifted=measured,
        embedded=False,
    )


def _digits() -> DemoInputs:
    from serve_app.digits.prepare import prepare

    demo = prepare()
    spec = load_spec(demo.model)
    clean, drifted, eval_clean, eval_drifted = (
        read_dataset(demo.path(name), spec) for name in ("clean", "drifted", "eval_clean", "eval_drifted")
    )
    return DemoInputs(demo.model, spec, clean, drifted, eval_clean, eval_drifted, embedded=True)


def reference_parts(spec: ModelSpec) -> dict[str, Dataset]:
    """The reference's fit, gate and report parts."""
    return split_reference(read_dataset(spec.locate(spec.reference), spec))


def _joined(first: Dataset, second: Dataset) -> Dataset:
    assert first.labels is not None
    assert second.labels is not None
    return Dataset(np.concatenate([first.inputs, second.inputs]), np.concatenate([first.labels, second.labels]))


def without_nulls(labels: np.ndarray | None) -> np.ndarray | None:
    """The labels, or None where none is known."""
    return None if labels is None or not (labels >= 0).any() else labels


def accuracy(predictions: np.ndarray, labels: np.ndarray | None) -> float | None:
    """Share of known labels that were predicted; None where none is known."""
    known = without_nulls(labels)
    if known is None:
        return None
    rows = known >= 0
    return float((predictions[rows] == known[rows]).mean())
