"""Signed notes of what a person changed on a storage, beside the journal: adapters, traffic or labels.

They cannot go into the journal: its next entry belongs to the orchestrator, and a second writer would fence it off. So
each is an object of its own under `upkeep/`, signed by the service's key where this machine holds it; `heal audit
verify` checks them.
"""

from __future__ import annotations

import getpass
import json
import secrets
import time
from typing import Any

from orchestrator.errors import HealError, ServiceError
from orchestrator.journal import journal_key
from orchestrator.keys import ServiceKeys, heal_home, load_keys, verify
from orchestrator.settings import SCHEMA_VERSION
from orchestrator.storage import Storage

FOLDER = "upkeep/"


def key_names() -> list[str]:
    """Services whose key file lies on this machine."""
    return sorted(path.stem for path in (heal_home() / "keys").glob("[!.]*.json"))


def known_keys(service: str) -> ServiceKeys:
    """Keys of a service that has some here: a mistyped name must not make new ones.

    Raises:
        ServiceError: there are none; the message names those that are.
    """
    if service not in key_names():
        names = ", ".join(key_names()) or "none"
        raise ServiceError(f"--service must name a service with keys in {heal_home()}/keys ({names}); got {service!r}")
    return load_keys(service)


def signer(storage: Storage) -> ServiceKeys | None:
    """The keys that signed this storage's journal, None where this machine does not hold them."""
    public_key = journal_key(storage)
    for name in key_names():
        try:
            keys = load_keys(name)
        except HealError:  # another service's broken file
            continue
        if keys.public_key == public_key:
            return keys
    return None


def write_note(storage: Storage, command: str, reason: str, body: dict[str, Any]) -> bool:
    """Write down what was done and why; False: unsigned, as this machine has no key of that service.

    Raises:
        StorageError: it cannot be written.
    """
    keys = signer(storage)
    now_s = time.time()
    payload = {
        "schema_version": SCHEMA_VERSION,
        "time_s": now_s,
        "command": command,
        "actor": getpass.getuser(),
        "reason": reason,
        "body": body,
    }
    text = json.dumps(payload, sort_keys=True)
    signature = keys.sign(text.encode()).hex() if keys else None
    envelope = json.dumps({"payload": text, "signature": signature}).encode()
    storage.create(f"{FOLDER}{int(now_s * 1000):013d}-{secrets.token_hex(4)}.json", envelope)
    return keys is not None


def read_notes(storage: Storage) -> list[dict[str, Any]]:
    """Every note, oldest first; its signature is not checked here.

    Raises:
        StorageError: one cannot be read.
    """
    return [json.loads(json.loads(storage.get(key))["payload"]) for key in storage.list(FOLDER)]


def note_problems(storage: Storage, public_key: bytes | None) -> list[str]:
    """What is wrong with the notes, in words; an unsigned one is."""
    problems = []
    for key in storage.list(FOLDER):
        try:
            envelope = json.loads(storage.get(key))
            if envelope["signature"] is None:
                problems.append(f"{key} is not signed: it was written where the service's keys are not")
            elif public_key is None:
                problems.append(f"{key} cannot be verified: there is no journal that names a key")
            else:
                verify(public_key, envelope["payload"].encode(), bytes.fromhex(envelope["signature"]))
        except (ValueError, KeyError, TypeError, AttributeError, HealError) as error:
            problems.append(f"{key} does not verify: {error}")
    return problems
