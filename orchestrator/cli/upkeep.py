"""Commands that remove what a service keeps: adapters nobody can serve again, traffic past its time or to be erased.

They work on the storage, beside a running service or without one: whatever it may still serve stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import typer

from orchestrator.cli.console import Json, Reason, Where, existing, finish, given, out, show_json
from orchestrator.cli.notes import write_note
from orchestrator.drift.baseline import baseline_key
from orchestrator.errors import NotFound, SpecError, StorageError
from orchestrator.journal import Journal
from orchestrator.messages import BASE
from orchestrator.registry import list_adapters, read_stable
from orchestrator.storage import Storage

DAY_S = 86400.0

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")]


# ------------------------------------------------------------ adapters


def adapters_gc(
    storage: Where,
    reason: Reason,
    older_than: Annotated[float, typer.Option(min=0, help="Days since the traffic it was made from.")] = 7.0,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Remove adapters that no rollback may name: neither stable, nor promoted before, nor of the open episode."""
    why, place = given(reason), existing(storage)
    removed = removable_adapters(place, time.time() - older_than * DAY_S)
    if not dry_run:
        for digest, base in removed.items():
            remove_adapter(place, digest, base)
        if removed:
            write_note(place, "adapters gc", why, {"removed": sorted(removed)})
    if as_json:
        show_json({"removed": sorted(removed), "dry_run": dry_run})
    else:
        for digest in sorted(removed):
            out.print(digest)
        out.print(f"{len(removed)} adapters {'would be' if dry_run else 'were'} removed")


def removable_adapters(storage: Storage, before_s: float) -> dict[str, str]:
    """Digest -> base of the adapters that nothing needs and whose data ended before `before_s`.

    Raises:
        NotFound: there is no journal, so nobody knows which are needed.
    """
    entries = Journal(storage, None).entries()
    if not entries:
        raise NotFound(f"a storage must hold a journal that says which adapters are needed; {storage.uri} has none")
    state, stable = entries[-1].state, read_stable(storage)
    episode = state.get("episode") or {}
    needed = {BASE, state["stable"], state.get("previous"), state.get("candidate"), episode.get("winner")}
    needed |= {*state.get("promoted", ()), stable["digest"] if stable else BASE}
    found = {}
    for manifest in list_adapters(storage):
        is_open = bool(episode) and str(manifest.get("episode", "")).startswith(episode["id"])
        made_s = float((manifest.get("data") or {}).get("until_s") or 0.0)
        if manifest["digest"] not in needed and not is_open and made_s < before_s:
            found[manifest["digest"]] = str(manifest.get("base", ""))
    return found


def remove_adapter(storage: Storage, digest: str, base: str) -> None:
    """Remove an adapter, its manifest first (what has none was never published), and its drift baseline."""
    keys = storage.list(f"adapters/{digest}/")
    for key in sorted(keys, key=lambda key: not key.endswith("/manifest.json")):
        storage.delete(key)
    storage.delete(baseline_key(base, digest))


# ------------------------------------------------------------ traffic


def traffic_purge(
    storage: Where,
    reason: Reason,
    older_than: Annotated[float | None, typer.Option(min=0, help="Days: purge what was served before.")] = None,
    instance: Annotated[list[str] | None, typer.Option("--id", help="Request or instance id; repeatable.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Purge all of it.")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Remove stored traffic and its labels: past its time, by id (erasure), or all. Exit code 1: an id is unknown."""
    why, place = given(reason), existing(storage)
    if (older_than is not None) + bool(instance) + everything != 1:
        raise SpecError("traffic purge needs one of --older-than DAYS, --id ID or --all")
    before_s = np.inf if everything else time.time() - older_than * DAY_S if older_than is not None else None
    found = purge(place, before_s, tuple(instance or ()), dry_run)
    if not dry_run and (found["instances"] or found["labels"]):
        # Not the ids: who asks to be forgotten must not be remembered here.
        rule = {"older_than_days": older_than, "all": everything, "ids": len(instance or ())}
        write_note(place, "traffic purge", why, rule | {k: found[k] for k in ("instances", "labels", "adapters")})
    if as_json:
        show_json(found | {"dry_run": dry_run})
    else:
        verb = "would be" if dry_run else "were"
        out.print(f"{found['instances']} instances and {found['labels']} labels {verb} removed")
        for digest in found["adapters"]:
            out.print(
                f"adapter {digest} may have learned from them: `heal rollback`, then `heal adapters gc`, removes it"
            )
        for name in found["unknown"]:
            out.print(f"no instance of {name}", markup=False, highlight=False)
    finish(1 if found["unknown"] else 0)


def purge(storage: Storage, before_s: float | None, ids: tuple[str, ...], dry_run: bool = False) -> dict[str, Any]:
    """Remove instances served before `before_s`, or those of the given ids, and their labels.

    Returns:
        `instances` and `labels` removed; `adapters`: digests whose buffer was read from a time and base of removed
        instances, so that they may have learned from them; `unknown`: ids that nothing was stored under.

    Raises:
        StorageError: a file is no traffic file, or cannot be replaced.
    """
    seen: set[str] = set()
    times: dict[str, list[np.ndarray]] = {}  # of removed instances, by base
    base = ""

    def chosen(table: pa.Table) -> np.ndarray:
        rows = picked(table)
        if base:
            times.setdefault(base, []).append(table["time_s"].to_numpy()[rows])
        return rows

    def picked(table: pa.Table) -> np.ndarray:
        if before_s is not None:
            return np.asarray(table["time_s"].to_numpy() < before_s)
        rows = np.zeros(len(table), dtype=bool)
        for name in ids:
            hits = pc.equal(table["id"], name)
            for mark in "/~":  # rows of a request; the service's own suffix to a client's id
                hits = pc.or_(hits, pc.starts_with(table["id"], name + mark))
            found = np.asarray(hits.to_numpy(zero_copy_only=False), dtype=bool)
            seen.update([name] if found.any() else [])
            rows |= found
        return rows

    labels = instances = 0
    for key in storage.list("traffic/"):
        if key.endswith(".parquet"):
            base = key.split("/")[1].removeprefix("base=") if key.startswith("traffic/base=") else ""
            count = _rewrite(storage, key, chosen, dry_run)
            if key.startswith("traffic/labels/"):
                labels += count
            else:
                instances += count
    unknown = [name for name in ids if name not in seen]
    adapters = _learned_from(storage, {name: np.concatenate(parts) for name, parts in times.items()})
    return {"instances": instances, "labels": labels, "adapters": adapters, "unknown": unknown}


def _learned_from(storage: Storage, times: dict[str, np.ndarray]) -> list[str]:
    """Adapters of these bases whose buffer's window holds any of these times."""
    found = []
    for manifest in list_adapters(storage):
        data, when_s = manifest.get("data", {}), times.get(str(manifest.get("base")), np.empty(0))
        since_s, until_s = float(data.get("since_s", -np.inf)), float(data.get("until_s", np.inf))
        if ((when_s >= since_s) & (when_s <= until_s)).any():
            found.append(str(manifest["digest"]))
    return found


def _rewrite(storage: Storage, key: str, chosen: Callable[[pa.Table], np.ndarray], dry_run: bool) -> int:
    """Take the chosen rows out of a file; how many they were. A file is written once, so nobody writes meanwhile."""
    try:
        data = storage.get(key)
    except NotFound:  # another purge was quicker
        return 0
    try:
        rows = chosen(pq.read_table(pa.BufferReader(data), columns=["id", "time_s"], partitioning=None))
        if rows.any() and not rows.all() and not dry_run:
            kept = pq.read_table(pa.BufferReader(data), partitioning=None).filter(pa.array(~rows))
            sink = pa.BufferOutputStream()
            pq.write_table(kept, sink, compression="snappy")
            storage.put(key, sink.getvalue().to_pybytes())
    except (pa.ArrowException, KeyError, OSError) as error:
        raise StorageError(f"{storage.uri}: {key} must be a traffic file; {error}; remove it by hand") from error
    if rows.size and rows.all() and not dry_run:
        storage.delete(key)
    return int(rows.sum())
