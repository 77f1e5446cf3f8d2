"""The audit journal: every decision, hash-chained and signed, and the state to go on from after a crash.

Called by the controller (append, replay), the ingress and the command line (entries, verify). Entry `seq` is created
only if absent: a second orchestrator that writes the same one is thereby fenced off. `HEAD.json` names the last entry
under a signature, so that entries cut off the end are missed. It knows nothing of what events mean.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.errors import AlreadyExists, HealError, IntegrityError, NotFound, ServiceError
from orchestrator.keys import ServiceKeys, verify
from orchestrator.settings import SCHEMA_VERSION
from orchestrator.storage import Storage

_FOLDER = "journal/"
_HEAD = "journal/HEAD.json"
_FIRST = ""  # `prev` of entry 0


@dataclass(frozen=True)
class Entry:
    """One line of the journal: what happened (`event`, `body`) and the whole state after it."""

    seq: int
    time_s: float
    event: str
    body: dict[str, Any]
    state: dict[str, Any]


@dataclass(frozen=True)
class Audit:
    """Outcome of `verify_journal`: how many entries there are, and every problem in words (none: it verifies)."""

    entries: int
    problems: list[str]


class Journal:
    """Journal of one service on its storage.

    Args:
        storage: holds `journal/`.
        keys: sign and are pinned; None: for reading only, entries must then agree with the key of the first.
    """

    def __init__(self, storage: Storage, keys: ServiceKeys | None) -> None:
        self._storage = storage
        self._keys = keys
        self._public_key = keys.public_key if keys is not None else None
        self._writer = secrets.token_hex(8)
        self._next: int | None = None  # None: not looked yet
        self._prev = _FIRST

    def append(self, event: str, body: dict[str, Any], state: dict[str, Any], *, time_s: float | None = None) -> int:
        """Write the next entry, then the head.

        Args:
            event: what happened, past tense.
            body: its details, JSON values (numpy numbers are fine).
            state: all that `replay` needs to go on from here.
            time_s: seconds since the epoch; default now.

        Returns:
            The entry's sequence number; the first is 0.

        Raises:
            ServiceError: fenced: another orchestrator wrote this entry first; or opened without keys.
            StorageError: the entry or the head could not be written. In the latter case the entry stands.
        """
        if self._keys is None:
            raise ServiceError("the journal is open for reading only; open it with the service's keys to append")
        if self._next is None:
            self.replay()
        assert self._next is not None
        seq = self._next
        payload = {
            "schema_version": SCHEMA_VERSION,
            "seq": seq,
            "prev": self._prev,
            "time_s": time.time() if time_s is None else time_s,
            "event": event,
            "body": body,
            "state": state,
            "public_key": self._keys.public_key.hex(),
            "writer": self._writer,
        }
        data = _seal(payload, self._keys)
        self._create(seq, data)
        # Before the head: whatever becomes of that, entry `seq` exists and the next one follows it.
        self._next, self._prev = seq + 1, _digest(data)
        self._storage.put(_HEAD, _seal({"seq": seq, "hash": self._prev}, self._keys))
        return seq

    def replay(self) -> dict[str, Any] | None:
        """State of the last entry, None for an empty journal; later appends go on from there.

        Verifies the last entry, its link to the one before, and the head: cheap however long the journal.

        Raises:
            IntegrityError: one of them does not verify, entries are missing, or another key signed them.
            StorageError: it cannot be read.
        """
        seqs = _sequence(self._storage.list(_FOLDER))
        last = len(seqs) - 1
        if seqs != list(range(len(seqs))):
            missing = next(n for n in range(len(seqs)) if seqs[n] != n)
            raise IntegrityError(f"journal entries must be numbered without gaps; entry {missing} is missing{_REMEDY}")
        self._check_head(last)
        if last < 0:
            self._next, self._prev = 0, _FIRST
            return None
        payload, data = self._read(last)
        before = _digest(self._storage.get(_key(last - 1))) if last else _FIRST
        if payload["prev"] != before:
            raise IntegrityError(f"journal entry {last} must follow entry {last - 1}; their hashes differ{_REMEDY}")
        self._next, self._prev = last + 1, _digest(data)
        state: dict[str, Any] = payload["state"]
        return state

    def entries(self, after: int = -1, limit: int | None = None) -> list[Entry]:
        """Entries with a number above `after`, oldest first; each one's signature is checked, the chain is not.

        `limit` is how many are read at most; None: all.

        Raises:
            IntegrityError: a signature does not verify.
            StorageError: an entry cannot be read.
        """
        first = max(after + 1, 0)
        if self._next is not None:  # the writer knows its length: no listing
            seqs = list(range(first, self._next))
        else:
            seqs = [seq for seq in _sequence(self._storage.list(_FOLDER)) if seq >= first]
        return [_entry(self._read(seq)[0]) for seq in seqs[:limit]]

    def _create(self, seq: int, data: bytes) -> None:
        try:
            self._storage.create(_key(seq), data)
        except AlreadyExists as error:
            # An object store's client may repeat a request whose first answer was lost: then the entry is ours.
            if self._storage.get(_key(seq)) == data:
                return
            raise ServiceError(f"fenced: another orchestrator wrote journal entry {seq}; this one must stop") from error

    def _read(self, seq: int) -> tuple[dict[str, Any], bytes]:
        if self._public_key is None:
            self._public_key = _own_key(self._storage.get(_key(0)), "journal entry 0")
        data = self._storage.get(_key(seq))
        return _open_entry(data, seq, self._public_key), data

    def _check_head(self, last: int) -> None:
        """The head names the last entry, or (a crash between the two writes) an earlier one; never a later one."""
        try:
            data = self._storage.get(_HEAD)
        except NotFound:
            if last > 0:
                raise IntegrityError(f"{_HEAD} must name the last journal entry; it is missing{_REMEDY}") from None
            return
        if last < 0:
            raise IntegrityError(f"{_HEAD} is there but no entry is: the journal was cut off{_REMEDY}")
        if self._public_key is None:
            self._public_key = _own_key(self._storage.get(_key(0)), "journal entry 0")
        problem = _head_problem(self._storage, data, last, self._public_key)
        if problem:
            raise IntegrityError(problem + _REMEDY)


_REMEDY = "; run `heal audit verify` and restore the storage from a backup"


def verify_journal(storage: Storage, public_key: bytes | None = None) -> Audit:
    """Verify every entry, every link and the head.

    Args:
        storage: holds `journal/`.
        public_key: 32 bytes that must have signed everything; None: the key that entry 0 names is taken on trust.

    Raises:
        StorageError: the storage cannot be listed or read.
    """
    seqs = _sequence(storage.list(_FOLDER))
    last = seqs[-1] if seqs else -1
    problems = [f"entry {n} is missing" for n in sorted(set(range(last + 1)) - set(seqs))]
    prev: str | None = _FIRST  # None: unknown, the entry before is missing
    for position, seq in enumerate(seqs):
        if position and seqs[position - 1] != seq - 1:
            prev = None
        data = storage.get(_key(seq))
        try:
            if public_key is None:
                public_key = _own_key(data, f"journal entry {seq}")
            payload = _open_entry(data, seq, public_key)
            if prev is not None and payload["prev"] != prev:
                problems.append(f"entry {seq} does not follow entry {seq - 1}: their hashes differ")
        except IntegrityError as error:
            problems.append(str(error))
        prev = _digest(data)
    problems += _audit_head(storage, last, public_key)
    return Audit(len(seqs), problems)


def journal_key(storage: Storage) -> bytes | None:
    """The public key that entry 0 names, on trust; None where there is no journal.

    Raises:
        IntegrityError: entry 0 names none.
        StorageError: it cannot be read.
    """
    try:
        return _own_key(storage.get(_key(0)), "journal entry 0")
    except NotFound:
        return None


def _audit_head(storage: Storage, last: int, public_key: bytes | None) -> list[str]:
    try:
        data = storage.get(_HEAD)
    except NotFound:
        return [f"{_HEAD} is missing: entries may have been cut off the end"] if last > 0 else []
    if last < 0:
        return [f"{_HEAD} is there but no entry is: the journal was cut off"]
    if public_key is None:
        return [f"{_HEAD} cannot be verified: no entry names a key"]
    problem = _head_problem(storage, data, last, public_key)
    return [problem] if problem else []


def _head_problem(storage: Storage, data: bytes, last: int, public_key: bytes) -> str:
    """What is wrong with a head beside a journal whose last entry is `last` >= 0; empty: nothing."""
    try:
        head = _open(data, _HEAD, public_key)
    except IntegrityError as error:
        return str(error)
    seq, digest = head.get("seq"), head.get("hash")
    if type(seq) is not int or seq < 0:
        return f"{_HEAD} must name an entry; it names {seq!r}"
    if seq > last:
        return f"{_HEAD} names entry {seq} but the last one is {last}: entries were cut off the end"
    try:
        same = _digest(storage.get(_key(seq))) == digest
    except NotFound:
        return f"{_HEAD} names entry {seq}, which is missing"
    return "" if same else f"entry {seq} is not the one that {_HEAD} names: their hashes differ"


def _open_entry(data: bytes, seq: int, public_key: bytes) -> dict[str, Any]:
    name = f"journal entry {seq}"
    payload = _open(data, name, public_key)
    if payload.get("seq") != seq:
        raise IntegrityError(f"{name} must carry its own number; it says {payload.get('seq')!r}")
    if payload.get("schema_version", 0) > SCHEMA_VERSION:
        raise IntegrityError(f"{name} has schema {payload['schema_version']}, newer than {SCHEMA_VERSION}; upgrade")
    return payload


def _entry(payload: dict[str, Any]) -> Entry:
    return Entry(payload["seq"], payload["time_s"], payload["event"], payload["body"], payload["state"])


def _key(seq: int) -> str:
    return f"{_FOLDER}{seq:010d}.json"


def _sequence(keys: list[str]) -> list[int]:
    stems = [key.removeprefix(_FOLDER).removesuffix(".json") for key in keys if key.endswith(".json")]
    return sorted(int(stem) for stem in stems if len(stem) == 10 and stem.isascii() and stem.isdigit())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _encode(value: object) -> str:
    def plain(item: Any) -> Any:
        if isinstance(item, np.generic | np.ndarray):
            return item.tolist()
        raise TypeError(f"a journal entry must hold JSON values; got {type(item).__name__}")

    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=plain)


def _seal(payload: dict[str, Any], keys: ServiceKeys) -> bytes:
    """Signed envelope. The payload travels as text, so that what is verified is what is parsed."""
    text = _encode(payload)
    return _encode({"payload": text, "signature": keys.sign(text.encode()).hex()}).encode()


def _unwrap(data: bytes, name: str) -> tuple[str, bytes, dict[str, Any]]:
    try:
        envelope = json.loads(data)
        text, signature = envelope["payload"], bytes.fromhex(envelope["signature"])
        payload = json.loads(text)
        as_written = _encode({"payload": text, "signature": signature.hex()}).encode()  # hex has two cases, we one
        if as_written == data and isinstance(payload, dict):
            return text, signature, payload
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(f"{name} must be a signed envelope; it is damaged: {type(error).__name__}") from error
    raise IntegrityError(f"{name} must be a signed envelope as it was written; its bytes were changed")


def _open(data: bytes, name: str, public_key: bytes) -> dict[str, Any]:
    text, signature, payload = _unwrap(data, name)
    try:
        verify(public_key, text.encode(), signature)
    except HealError as error:
        raise IntegrityError(f"{name}: {error}") from error
    return payload


def _own_key(data: bytes, name: str) -> bytes:
    """The key that an entry says it was signed with."""
    payload = _unwrap(data, name)[2]
    try:
        return bytes.fromhex(payload["public_key"])
    except (KeyError, ValueError, TypeError) as error:
        raise IntegrityError(f"{name} must name the public key that signed it; it does not") from error
