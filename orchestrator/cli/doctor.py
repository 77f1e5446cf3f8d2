"""`heal doctor`: can this model be served and healed from here? Checks spec, weights, embedding, reference, storage."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.cli.console import FINE, NOT_FINE, Json, StorageUri, finish, out, show_json
from orchestrator.errors import HealError, SpecError, StorageError
from orchestrator.models import fetch_model, load_published_spec, publish_model
from orchestrator.spec import load_spec
from orchestrator.storage import open_storage

SMALL_REFERENCE = 1000  # rows below which the drift test has to be less sensitive
LOW_ACCURACY = 0.5


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(doctor)


def doctor(
    model: Annotated[Path, typer.Option(help="Model spec (YAML).")],
    storage: StorageUri = None,
    as_json: Json = False,
) -> None:
    """Check a model and a storage before they go into production. Exit code 1 when something is wrong."""
    found: list[dict[str, str]] = []
    spec = _try(found, "spec", lambda: load_spec(model), lambda s: f"{s.name}: {s.input_dtype} {list(s.input_shape)}")
    if spec is not None:
        _check_model(found, spec)
    if storage is not None:
        _try(found, "storage", lambda: probe(storage), str)
    if as_json:
        show_json(found)
    else:
        for row in found:
            out.print(f"{row['status']:<5} {row['check']:<10} {row['message']}", markup=False, highlight=False)
    finish(NOT_FINE if any(row["status"] == "error" for row in found) else FINE)


def _try(found: list[dict[str, str]], check: str, attempt: Callable[[], Any], say: Callable[[Any], str]) -> Any:
    """Note how an attempt went; its value, or None."""
    try:
        value = attempt()
    except HealError as error:
        found.append({"check": check, "status": "error", "message": str(error)})
        return None
    message = say(value)
    found.append({"check": check, "status": "warn" if message.startswith("!") else "ok", "message": message})
    return value


def _check_model(found: list[dict[str, str]], spec: Any) -> None:
    from orchestrator.cli.inputs import accuracy
    from orchestrator.datasets import read_dataset, split_reference
    from tuning.base_model import collect_sample, feature_tap, resolve_device

    with tempfile.TemporaryDirectory(prefix="heal-doctor-") as scratch:  # published, as a replica would load it
        storage = open_storage(scratch)
        module = _try(found, "weights", lambda: _built(fetch_model(storage, publish_model(storage, spec))), _size)
    data = _try(found, "reference", lambda: read_dataset(spec.locate(spec.reference), spec), _reference)
    if module is None or data is None:
        return
    parts = _try(found, "parts", lambda: split_reference(data), lambda p: str({k: len(v) for k, v in p.items()}))
    device = resolve_device("auto")
    module.to(device)
    where = "the logits (no linear layer before them)"
    tap = _try(
        found,
        "embedding",
        lambda: feature_tap(module, spec, data.inputs[:2].copy()),
        lambda t: f"input of {t.name or where}",
    )
    if tap is None or parts is None:
        return
    sample = collect_sample(module, tap, data.inputs, device, layout=spec.layout)
    right = accuracy(sample.logits_NK.argmax(axis=1), data.labels)
    _try(found, "accuracy", lambda: right, _accuracy)


def _built(folder: Path) -> Any:
    from tuning.base_model import build_module

    try:
        return build_module(folder, load_published_spec(folder))
    except HealError:
        raise
    except Exception as error:  # whatever the user's own code raises
        raise SpecError(f"the factory must return a module; it raised {type(error).__name__}: {error}") from error


def _size(module: Any) -> str:
    return f"{sum(p.numel() for p in module.parameters()):,} parameters"


def _reference(data: Any) -> str:
    unlabelled = int((data.labels < 0).sum())
    if unlabelled:
        return f"! {unlabelled} of {len(data)} rows have no label; the reference should be labelled wholly"
    small = f"! {len(data)} rows; below {SMALL_REFERENCE} the drift test is less sensitive"
    return small if len(data) < SMALL_REFERENCE else f"{len(data)} labelled rows"


def _accuracy(value: float | None) -> str:
    if value is None:
        return "! not measured: the reference has no labels"
    low = "! " if value < LOW_ACCURACY else ""
    return f"{low}{value:.4f} on the reference{'; are the classes in the right order?' if low else ''}"


def probe(uri: str) -> str:
    """Write, read, create twice, list and delete on a storage; what was shown.

    Raises:
        StorageError: one of them does not work.
    """
    from orchestrator.errors import AlreadyExists
    from orchestrator.storage import open_storage

    storage = open_storage(uri)
    key, data = f"doctor/{secrets.token_hex(8)}", b"probe"
    storage.create(key, data)
    try:
        if storage.get(key) != data or key not in storage.list("doctor/"):
            raise StorageError(f"what is written at {storage.uri} must be readable and listed at once; it is not")
        try:
            storage.create(key, data)
        except AlreadyExists:
            return f"{storage.uri} can be written, read and listed, and creates only what is absent"
        raise StorageError(f"{storage.uri} must refuse to create what exists: the journal relies on it")
    finally:
        storage.delete(key)
