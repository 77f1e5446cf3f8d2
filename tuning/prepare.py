"""Measures the base model once: its drift baseline, from its reference but for the part that reports are made on.

The gate part may join in: what is normal is no choice that the gate judges, and the reference's size is what limits how
small a part of the traffic may drift unseen.

Called in a task of its own by the live orchestrator, and directly by a rehearsal.
"""

from __future__ import annotations

from orchestrator.datasets import concatenate, read_dataset, split_reference
from orchestrator.drift.baseline import Baseline, fit_baseline, load_baseline, save_baseline
from orchestrator.messages import BASE
from orchestrator.models import fetch_model, load_published_spec
from orchestrator.storage import Storage, open_storage
from tuning.base_model import build_module, collect_sample, feature_tap, resolve_device


def prepare_base(storage: Storage | str, base: str, device: str = "auto") -> Baseline:
    """The base's baseline; measured and stored when the storage does not hold it yet.

    Raises:
        SpecError, DataError, StorageError: the model or its reference cannot be used.
    """
    store = open_storage(storage) if isinstance(storage, str) else storage
    stored = load_baseline(store, BASE, base)
    if stored is not None:
        return stored
    folder = fetch_model(store, base)
    spec = load_published_spec(folder)
    parts = split_reference(read_dataset(folder / "reference.parquet", spec))
    known = concatenate([parts["fit"], parts["gate"]])
    module = build_module(folder, spec)
    target = resolve_device(device)
    module.to(target)
    tap = feature_tap(module, spec, known.inputs[:2])
    sample = collect_sample(module, tap, known.inputs, target, labels=known.labels, layout=spec.layout)
    baseline = fit_baseline(base, BASE, sample, None, None, num_channels=sample.channel_means_NC.shape[1])
    save_baseline(store, baseline)
    return baseline
