"""Files named by what they hold: digests, canonical JSON, create-if-absent. Used by `models` and `registry`."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import numpy as np

from orchestrator.errors import AlreadyExists, IntegrityError
from orchestrator.storage import Storage

MANIFEST_FILE = "manifest.json"  # written last: what has none was never published
DIGEST = re.compile(r"[0-9a-f]{64}")


def sha256(data: bytes) -> str:
    """Hex digest of bytes."""
    return hashlib.sha256(data).hexdigest()


def check_digest(digest: str) -> None:
    """IntegrityError unless it is 64 hex digits."""
    if not DIGEST.fullmatch(digest):
        raise IntegrityError(f"a digest must be 64 hex digits; got {digest!r}")


def to_json(value: dict[str, Any]) -> bytes:
    """JSON with sorted keys; numpy values and sets become plain ones, anything else raises TypeError."""

    def plain(item: Any) -> Any:
        if isinstance(item, np.generic | np.ndarray):
            return item.tolist()
        if isinstance(item, set | frozenset):
            return sorted(item)
        raise TypeError(f"a registry file must hold JSON values; got {type(item).__name__}")

    return json.dumps(value, sort_keys=True, indent=2, default=plain).encode()


def parse_object(data: bytes, name: str) -> dict[str, Any]:
    """JSON object from bytes; IntegrityError names what is damaged."""
    try:
        value = json.loads(data)
    except ValueError as error:
        raise IntegrityError(f"{name} must be a JSON object; it is damaged: {error}") from error
    if not isinstance(value, dict):
        raise IntegrityError(f"{name} must be a JSON object; got {type(value).__name__}")
    return value


def create_same(storage: Storage, key: str, data: bytes) -> None:
    """Create `key`; taken with these very bytes (an earlier attempt) is fine."""
    try:
        storage.create(key, data)
    except AlreadyExists as error:
        if storage.get(key) != data:
            raise IntegrityError(f"{key} must be what its digest says; other bytes are there; delete them") from error
