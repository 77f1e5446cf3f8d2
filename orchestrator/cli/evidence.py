"""What a verdict rests on, in one document that can be handed on: `heal evidence`.

Pure but for the storage it may read: an episode's record in, a dictionary out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from orchestrator.errors import HealError
from orchestrator.journal import Journal, verify_journal
from orchestrator.registry import load_adapter
from orchestrator.storage import Storage


def bundle(record: Mapping[str, Any], storage: Storage | None) -> dict[str, Any]:
    """The evidence of one episode.

    Args:
        record: of the episode.
        storage: holds its adapter and its journal; None: those two are null, and `problems` is empty.
    """
    search = record["search"] or {}
    gate = record["gate"] or {}
    named = [dict(zip(("check", "value", "limit", "passed"), row, strict=True)) for row in gate.get("checks", ())]
    found: dict[str, Any] = {
        "episode": record["id"],
        "verdict": record["verdict"],
        "reason": record["reason"],
        "provisional": record["provisional"],
        "alarm": record["alarm"],
        "diagnosis": record["diagnosis"],
        "data": {"since_s": record["since_s"], "until_s": record["until_s"], "instances": search.get("buffered")},
        "trials": search.get("trials", []),
        "measured": record["evidence"],
        "gate": {"analysis": gate.get("analysis"), "message": gate.get("message", ""), "checks": named},
        "adapter": None,
        "journal": None,
        "problems": [],
    }
    if storage is not None:
        if record["winner"]:
            found["adapter"] = _adapter(storage, record["winner"], found["problems"])
        found["journal"] = _journal(storage, record["id"], found["problems"])
    return found


def _adapter(storage: Storage, digest: str, problems: list[str]) -> dict[str, Any]:
    try:
        manifest = load_adapter(storage, digest)[2]
    except HealError as error:
        problems.append(str(error))
        return {"digest": digest, "manifest": None}
    return {"digest": digest, "manifest": manifest}


def _journal(storage: Storage, episode: str, problems: list[str]) -> list[dict[str, Any]]:
    """Number, time, event and hash of every entry that was written while the episode was open."""
    problems += verify_journal(storage).problems
    found = []
    for entry in Journal(storage, None).entries():
        is_open = (entry.state.get("episode") or {}).get("id") == episode
        if is_open or episode in (entry.body.get("id"), entry.body.get("episode")):
            sha256 = hashlib.sha256(storage.get(f"journal/{entry.seq:010d}.json")).hexdigest()
            found.append({"seq": entry.seq, "time_s": entry.time_s, "event": entry.event, "sha256": sha256})
    return found


def checks(found: Mapping[str, Any]) -> list[str]:
    """The document for people: one line for each figure that counted."""
    provisional = " (provisional)" if found["provisional"] else ""
    lines = [f"{found['episode']}: {found['verdict'] or 'open'}{provisional}: {found['reason']}"]
    if alarm := found["alarm"]:
        lines.append(f"alarm: statistic {_figure(alarm['statistic'])}, threshold {_figure(alarm['threshold'])}")
    if diagnosis := found["diagnosis"]:
        lines.append(f"diagnosis: {diagnosis['kind']}, {diagnosis['reason']}")
        lines += [f"  {name} {_figure(value)}" for name, value in diagnosis["evidence"].items()]
    lines.append(f"data: {found['data']['instances'] or 0} instances, {len(found['trials'])} trials")
    for row in found["gate"]["checks"]:
        passed = "ok" if row["passed"] else "NO"
        lines.append(f"  {passed} {row['check']} {_figure(row['value'])}, limit {_figure(row['limit'])}")
    if found["gate"]["analysis"]:
        lines.append(f"gate: {found['gate']['analysis']}: {found['gate']['message']}")
    if found["adapter"]:
        lines.append(f"adapter: {found['adapter']['digest']}")
    if found["journal"]:
        lines.append(f"journal: entries {found['journal'][0]['seq']} to {found['journal'][-1]['seq']}")
    return lines + [f"PROBLEM: {problem}" for problem in found["problems"]]


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
