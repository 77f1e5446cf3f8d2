"""A sample of traffic as one model sees it: what baselines are fitted on. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.drift.statistics import InputChecks

Array = NDArray[Any]


@dataclass(frozen=True)
class Sample:
    """N instances as one model (base or adapter) sees them; the channel and range columns as in InputChecks.

    `labels_N` are true classes where known: -1 or None elsewhere.
    """

    embedding_ND: Array
    logits_NK: Array
    channel_means_NC: Array
    channel_squares_NC: Array
    input_min_N: Array
    input_max_N: Array
    labels_N: Array | None = None
    sketch_NS: Array | None = None

    def checks(self) -> InputChecks:
        """The same inputs as the probe describes them; an instance counts as NaN where a channel mean is not finite."""
        nan_N = np.asarray(~np.isfinite(self.channel_means_NC).all(axis=1), dtype=np.int64)
        return InputChecks(
            self.channel_means_NC,
            self.channel_squares_NC,
            self.input_min_N,
            self.input_max_N,
            nan_N,
            sketch_NS=self.sketch_NS,
        )


def rows_of(sample: Sample, rows: Any) -> Sample:
    """The same columns, some rows: an index array, a mask or a slice."""
    kept: dict[str, Any] = {}
    for name in (f.name for f in fields(Sample)):
        value = getattr(sample, name)
        kept[name] = None if value is None else np.asarray(value)[rows]
    return Sample(**kept)


def labelled(sample: Sample) -> tuple[Array, Array]:
    """Labels and where they are known: int64 (N,), bool (N,)."""
    if sample.labels_N is None:
        labels_N = np.full(len(sample.logits_NK), -1, dtype=np.int64)
    else:
        labels_N = np.asarray(sample.labels_N, dtype=np.int64)
    return labels_N, labels_N >= 0


def true_classes(sample: Sample) -> Array:
    """The label where it is known, else the predicted class: int64 (N,)."""
    labels_N, known_N = labelled(sample)
    return np.where(known_N, labels_N, sample.logits_NK.argmax(axis=1))
