"""A search's outcome on the storage, so that it outlives whoever ran it. Plain JSON; nan is written as null."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields
from typing import Any

from orchestrator.errors import NotFound
from orchestrator.messages import (
    Compared,
    GateEvidence,
    Kind,
    Placement,
    SearchRequest,
    SearchStatus,
    SegmentEstimate,
    TrialConfig,
    TrialResult,
)
from orchestrator.storage import Storage

_ROWS: dict[str, type] = {  # tuples of messages inside the evidence
    **dict.fromkeys(("classes", "labelled_classes", "labelled_segments"), Compared),
    "segments": SegmentEstimate,
}


def started_key(episode: str) -> str:
    """Key that is there once a search was started: its request."""
    return f"trials/{episode}/request.json"


def result_key(episode: str) -> str:
    """Key of the final status."""
    return f"trials/{episode}/result.json"


def evidence_key(episode: str, digest: str) -> str:
    """Key of the gate's evidence for one candidate."""
    return f"trials/{episode}/evidence-{digest}.json"


def encode(message: Any) -> bytes:
    """A message as JSON."""
    return json.dumps(plain(asdict(message)), indent=1).encode()


def plain(value: Any) -> Any:
    """Mappings, lists and numbers as JSON takes them: numbers that are not finite become None."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _filled(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Null back to nan where the field is a float."""
    floats = {f.name for f in fields(kind) if f.type == "float"}
    return {k: float("nan") if v is None and k in floats else v for k, v in values.items()}


def decode_trial(values: dict[str, Any]) -> TrialResult:
    """A TrialResult from its mapping."""
    config = values["config"]
    config = TrialConfig(**{**config, "placement": Placement(config["placement"])})
    return TrialResult(**{**_filled(TrialResult, values), "config": config})


def decode_request(values: dict[str, Any]) -> SearchRequest:
    """A SearchRequest from its mapping."""
    return SearchRequest(**{**values, "kind": Kind(values["kind"])})


def write_status(storage: Storage, episode: str, status: SearchStatus) -> None:
    """Keeps a final status; the first one stays: a search ends once."""
    if not storage.exists(result_key(episode)):
        storage.put(result_key(episode), encode(status))


def read_status(storage: Storage, episode: str) -> SearchStatus | None:
    """The final status, or None while there is none."""
    try:
        values = json.loads(storage.get(result_key(episode)))
    except NotFound:
        return None
    trials = tuple(decode_trial(t) for t in values["trials"])
    return SearchStatus(**{**_filled(SearchStatus, values), "trials": trials})


def write_evidence(storage: Storage, episode: str, evidence: GateEvidence) -> None:
    """Keeps what was measured about a candidate."""
    storage.put(evidence_key(episode, evidence.candidate), encode(evidence))


def read_evidence(storage: Storage, episode: str, digest: str) -> GateEvidence | None:
    """What was measured, or None while it is not there."""
    try:
        values = json.loads(storage.get(evidence_key(episode, digest)))
    except NotFound:
        return None
    rows = {
        name: tuple(kind(**_filled(kind, row)) for row in values[name])
        for name, kind in _ROWS.items()
        if name in values
    }
    ids = {"decisive": tuple(values.get("decisive", ()))}
    return GateEvidence(**{**_filled(GateEvidence, values), **rows, **ids})
