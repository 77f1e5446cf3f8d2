"""`heal labels import`: true labels that come late, from a file, to a running service or onto its storage."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer
import yaml

from orchestrator.cli.client import connect
from orchestrator.cli.console import FINE, NOT_FINE, Json, Service, StorageUri, Url, existing, finish, out, show_json
from orchestrator.cli.notes import write_note
from orchestrator.errors import DataError, NotFound, SpecError, StorageError
from orchestrator.spec import load_spec
from orchestrator.storage import Storage
from serve_app.traffic import TrafficLog

CHUNK = 1000  # labels in one feedback request

Counts = dict[str, int]


def labels_import(
    source: Annotated[Path, typer.Argument(help="CSV or Parquet: token (or id), label, optionally index.")],
    url: Url = None,
    service: Service = None,
    storage: StorageUri = None,
    model: Annotated[Path | None, typer.Option(help="Model spec: its name and class names, with --url.")] = None,
    reason: Annotated[str, typer.Option("--reason", help="Where the labels come from; kept with --storage.")] = "",
    as_json: Json = False,
) -> None:
    """Send true labels to a running service (column token), or write them onto its storage (column id).

    A label is a class name or number. `token` is a reply's feedback_token, `index` the instance's row in that request;
    `id` is an instance's id as the stored traffic has it. A search reads both; a running service counts tokens only.
    Exit code 1 when a label was not accepted.
    """
    rows = read_labels(source, "id" if storage else "token")
    counts = to_storage(existing(storage), rows, reason) if storage else to_service(url, service, rows, model)
    if as_json:
        show_json(counts)
    else:
        out.print(", ".join(f"{name} {count}" for name, count in counts.items()))
    finish(FINE if counts["accepted"] == len(rows) else NOT_FINE)


def read_labels(path: Path, key: str) -> list[tuple[str, int, str]]:
    """(token or id, row, label as text) of each line.

    Args:
        path: .csv with a header, or .parquet.
        key: name of the column that says which instance is meant.

    Raises:
        DataError: no such file, a column is missing, or a cell is empty or no number; the message names line and value.
    """
    table = _table(path)
    columns = list(table[0]) if table else []
    for name in (key, "label"):
        if name not in columns:
            remedy = "--storage takes ids, --url takes tokens"
            raise DataError(f"{path} must have rows and a column {name!r}; it has {', '.join(columns)}; {remedy}")
    found = []
    for line, row in enumerate(table, start=1):
        index, label = str(row.get("index") or 0).strip(), str("" if row["label"] is None else row["label"]).strip()
        if not row[key] or not label:
            raise DataError(f"{path}: row {line} must have {key} and label; got {row[key]!r} and {row['label']!r}")
        if not index.isdecimal():
            raise DataError(f"{path}: index of row {line} must be a whole number >= 0; got {index!r}")
        found.append((str(row[key]), int(index), label))
    return found


def _table(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            rows: list[dict[str, Any]] = pq.read_table(path, partitioning=None).to_pylist()
            return rows
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8") as file:
                return [dict(row) for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise DataError(f"{path} must be a readable CSV or Parquet file: {error}") from error
    raise SpecError(f"labels must come in a .csv or a .parquet; got {path}")


def class_number(label: str, classes: list[str] | None) -> int:
    """A class by its name, or by its number; without `classes` by number only.

    Raises:
        DataError: it is neither.
    """
    if classes is None:
        if not label.isdecimal():
            raise DataError(f"a label must be a class number; got {label!r}; give --model to use names")
        return int(label)
    if label in classes:
        return classes.index(label)
    if label.isdecimal() and int(label) < len(classes):
        return int(label)
    raise DataError(f"a label must be one of {', '.join(classes)} or 0..{len(classes) - 1}; got {label!r}")


def to_service(url: str | None, service: str | None, rows: list[tuple[str, int, str]], model: Path | None) -> Counts:
    """Send labels as feedback; counts of accepted, unknown, expired and conflicting.

    Raises:
        ServiceError: nobody answers there, no token of this machine is known there, or the model has another name.
        DataError: a label is no class of that model.
    """
    spec = load_spec(model) if model else None
    classes = list(spec.classes) if spec else None
    labels = [(token, row, class_number(label, classes)) for token, row, label in rows]
    client = connect(url, service)
    try:
        name = spec.name if spec else str(client.state()["service"])
        total: Counts = dict.fromkeys(("accepted", "unknown", "expired", "conflicting"), 0)
        for start in range(0, len(labels), CHUNK):
            for outcome, count in client.feedback(name, labels[start : start + CHUNK]).items():
                total[outcome] = total.get(outcome, 0) + count
        return total
    finally:
        client.close()


def to_storage(storage: Storage, rows: list[tuple[str, int, str]], reason: str) -> Counts:
    """Write labels beside the traffic they belong to; counts of accepted, unknown and conflicting.

    Raises:
        DataError: a label is no class of the instance's model. Nothing is written then.
        StorageError: the traffic cannot be read, or the labels not be written.
    """
    counts = dict.fromkeys(("accepted", "unknown", "conflicting"), 0)
    where, known = _bases(storage), _known(storage)
    classes: dict[str, list[str]] = {}
    fresh: dict[str, list[tuple[str, int]]] = {}
    for name, _, label in rows:
        base = where.get(name)
        if base is None:
            counts["unknown"] += 1
            continue
        if base not in classes:
            classes[base] = published_spec(storage, base)["classes"]
        number = class_number(label, classes[base])
        if known.setdefault(name, number) != number:
            counts["conflicting"] += 1
            continue
        counts["accepted"] += 1
        fresh.setdefault(base, []).append((name, number))
    for base, labels in fresh.items():
        _write(storage, base, labels)
    if fresh:
        write_note(storage, "labels import", reason, counts)
    return counts


def published_spec(storage: Storage, base: str) -> dict[str, Any]:
    """Name and classes of a published base.

    Raises:
        NotFound: it is not there.
    """
    values: dict[str, Any] = yaml.safe_load(storage.get(f"models/{base}/spec.yaml"))
    return values | {"classes": [str(name) for name in values["classes"]]}


def _write(storage: Storage, base: str, labels: list[tuple[str, int]]) -> None:
    log = TrafficLog(storage, base, "import", incarnation=f"{time.time_ns() // 1_000_000_000:x}")
    log.offer_labels(labels, time.time())
    log.close(timeout_s=60.0)
    if log.dropped:
        raise StorageError(f"labels could not be written to {storage.uri}: {log.problem or 'too many at once'}")


def _bases(storage: Storage) -> dict[str, str]:
    """Instance id -> base of all stored traffic."""
    found: dict[str, str] = {}
    for key in storage.list("traffic/base="):
        base = key.split("/")[1].removeprefix("base=")
        found |= dict.fromkeys(_column(storage, key, ["id"])["id"], base)
    return found


def _known(storage: Storage) -> Counts:
    """Instance id -> its first label."""
    first: dict[str, tuple[float, int]] = {}
    for key in storage.list("traffic/labels/"):
        columns = _column(storage, key, ["id", "label", "time_s"])
        for name, label, time_s in zip(columns["id"], columns["label"], columns["time_s"], strict=True):
            first[name] = min(first.get(name, (time_s, label)), (time_s, label))
    return {name: label for name, (_, label) in first.items()}


def _column(storage: Storage, key: str, columns: list[str]) -> dict[str, list[Any]]:
    try:
        table = pq.read_table(pa.BufferReader(storage.get(key)), columns=columns, partitioning=None)
    except NotFound:  # purged meanwhile
        return {name: [] for name in columns}
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"{storage.uri}: {key} must be a traffic file; {error}") from error
    found: dict[str, list[Any]] = table.to_pydict()
    return found
