"""A service's state as its records on the storage have it, in the shape that `/healing` answers: for `--storage`."""

from __future__ import annotations

from typing import Any

from orchestrator.cli.console import existing
from orchestrator.drift.monitor import Monitor
from orchestrator.errors import HealError, NotFound
from orchestrator.journal import Journal
from orchestrator.settings import HealSettings
from orchestrator.snapshots import Snapshots


def stored_state(uri: str) -> dict[str, Any]:
    """State after the last journal entry. Replicas are not on record; the drift tests are as last snapshotted.

    Raises:
        NotFound: there are no records, or no journal among them.
        IntegrityError: the last entry does not verify.
    """
    storage = existing(uri)
    entries = Journal(storage, None).entries()
    if not entries:
        raise NotFound(f"a service's journal must be on {storage.uri}; it is not")
    last = entries[-1]
    monitor, problem = Monitor(HealSettings().arl_instances), ""
    try:
        snapshot = Snapshots(storage, last.state["base"]).load()
        if snapshot is not None:
            monitor.restore(snapshot)
    except HealError as error:
        problem = str(error)
    return {
        "service": None,
        "storage": storage.uri,
        "time_s": last.time_s,
        "problem": problem,
        "replicas": [],
        "drift": monitor.statistic(),
        **last.state,
    }


def stored_episodes(uri: str) -> list[dict[str, Any]]:
    """Every episode's record, oldest first, the open one last.

    Raises:
        NotFound: there are no records.
        IntegrityError: an entry does not verify.
    """
    entries = Journal(existing(uri), None).entries()
    found = {e.body["id"]: e.body for e in entries if e.event == "episode_closed"}
    if entries and (still_open := entries[-1].state.get("episode")):
        found[still_open["id"]] = still_open
    return list(found.values())
