"""The secrets of one service: signing key, feedback key, bearer tokens. Kept off the storage URI, on this machine.

Whoever can write the storage must not be able to sign journal entries or adapters, so the keys live in `HEAL_HOME`
(default `~/.rayheal`), one 0600 file per service, made at first use. Called by the launcher, the orchestrator (which
hands the feedback key to the replicas) and `heal audit verify`. Ed25519: RFC 8032.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from orchestrator.errors import IntegrityError, ServiceError

ROLES = ("viewer", "labeller", "operator")
_SEED_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def heal_home() -> Path:
    """Folder of this machine's keys and model cache: `HEAL_HOME`, else `~/.rayheal`."""
    return Path(os.environ.get("HEAL_HOME") or "~/.rayheal").expanduser().absolute()


@dataclass(frozen=True)
class ServiceKeys:
    """Secrets of one service; never printed. Travels only to the orchestrator actor.

    Attributes:
        service: name of the service.
        seed: 32 bytes, Ed25519 private key.
        feedback_key: 32 bytes, HMAC key of the feedback tokens.
        tokens: bearer token by role (`viewer`, `labeller`, `operator`).
    """

    service: str
    seed: bytes = field(repr=False)
    feedback_key: bytes = field(repr=False)
    tokens: dict[str, str] = field(repr=False)

    @property
    def public_key(self) -> bytes:
        """32 bytes that `verify` needs; safe to publish and to pin."""
        return Ed25519PrivateKey.from_private_bytes(self.seed).public_key().public_bytes_raw()

    @property
    def webhook_secret(self) -> str:
        """Signs what is sent to webhooks, in the form of the Standard Webhooks specification."""
        return "whsec_" + base64.b64encode(hmac.digest(self.feedback_key, b"rayheal webhooks", "sha256")).decode()

    def sign(self, data: bytes) -> bytes:
        """Ed25519 signature of `data`, 64 bytes."""
        return Ed25519PrivateKey.from_private_bytes(self.seed).sign(data)

    def token_digests(self) -> dict[str, str]:
        """SHA-256 hex of each token -> its role; what the ingress checks against without holding a token."""
        return {hashlib.sha256(token.encode()).hexdigest(): role for role, token in self.tokens.items()}


def verify(public_key: bytes, data: bytes, signature: bytes) -> None:
    """Check an Ed25519 signature.

    Raises:
        IntegrityError: the signature is not that key's over these bytes, or the key is no key.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)
    except (InvalidSignature, ValueError) as error:
        named = public_key.hex()[:16]
        raise IntegrityError(f"the signature must be that of public key {named}...; it does not verify") from error


def load_keys(service: str) -> ServiceKeys:
    """Keys of `service` on this machine, made at first use (of concurrent first users, one wins).

    `HEAL_TOKEN`, when set, replaces the operator's token for this process; the file keeps its own.

    Raises:
        ServiceError: the name cannot be a file name, or the file is unreadable, broken or open to other users.
    """
    if not _NAME.fullmatch(service):
        raise ServiceError(f"a service name must be letters, digits, '.', '_', '-'; got {service!r}; rename it")
    path = heal_home() / "keys" / f"{service}.json"
    try:
        if not path.exists():
            _write_new(path)
        values = _read(path)
    except OSError as error:
        raise ServiceError(f"keys must be readable and writable at {path}; {error}; set HEAL_HOME") from error
    tokens = {role: str(values["tokens"][role]) for role in ROLES}
    if override := os.environ.get("HEAL_TOKEN"):
        tokens["operator"] = override
    return ServiceKeys(service, bytes.fromhex(values["seed"]), bytes.fromhex(values["feedback_key"]), tokens)


def _write_new(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    values = {
        "seed": secrets.token_bytes(_SEED_BYTES).hex(),
        "feedback_key": secrets.token_bytes(_SEED_BYTES).hex(),
        "tokens": {role: secrets.token_urlsafe(24) for role in ROLES},
    }
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(values, indent=2))
            file.flush()
            os.fsync(file.fileno())
        _link_unless_taken(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _link_unless_taken(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        return  # another process was first: its keys are the service's keys


def _read(path: Path) -> dict[str, Any]:
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise ServiceError(f"{path} must be readable by its owner only; its mode is {mode:o}; chmod 600 it")
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        lengths = [len(bytes.fromhex(values[name])) for name in ("seed", "feedback_key")]
        complete = lengths == [_SEED_BYTES] * 2 and set(ROLES) <= set(values["tokens"])
    except (ValueError, KeyError, TypeError) as error:
        raise ServiceError(f"{path} must hold a service's keys; {error!r}; restore it from a backup") from error
    if not complete:
        raise ServiceError(f"{path} must hold a service's keys; some are missing or cut; restore it from a backup")
    return values
