"""Who may do what (bearer tokens), and what a late label belongs to (signed feedback tokens). No Ray, no clock.

A feedback token carries all that is needed to join a label, so that any replica can take it, and a MAC, so that
nobody can invent an instance. Layout: version, time, request id, digest, predictions, 16 bytes of HMAC-SHA256.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.errors import RequestError

ROLES = ("viewer", "labeller", "operator")  # each may do what the ones before it may
EXPIRY_S = 30 * 86400.0
MAX_TOKEN = 32_768  # characters
_HEAD = struct.Struct(">BdBBBH")  # version, time, bytes of id, bytes of digest, bytes a prediction, predictions
_VERSION = 1
_MAC = 16


@dataclass(frozen=True)
class Feedback:
    """What a genuine feedback token says: `predictions` by row of the request."""

    request_id: str
    digest: str
    predicted_s: float
    predictions: tuple[int, ...]

    def expired(self, now_s: float) -> bool:
        """True 30 days after the prediction."""
        return now_s - self.predicted_s > EXPIRY_S


def mint(key: bytes, request_id: str, digest: str, predicted_s: float, predictions: Sequence[int]) -> str:
    """Sign what was predicted.

    Args:
        key: the service's feedback key; empty while no target has brought it: no token can be given.
        request_id: at most 255 bytes of UTF-8.
        digest: adapter digest, or `base`.
        predicted_s: seconds since the epoch.
        predictions: class of each row, 0 <= class < 65536.

    Returns:
        URL-safe text, or "" without a key.
    """
    if not key:
        return ""
    raw_id, raw_digest = request_id.encode(), _pack_digest(digest)
    width = 1 if max(predictions, default=0) < 256 else 2
    packed = bytes(predictions) if width == 1 else struct.pack(f">{len(predictions)}H", *predictions)
    head = _HEAD.pack(_VERSION, predicted_s, len(raw_id), len(raw_digest), width, len(predictions))
    payload = b"".join([head, raw_id, raw_digest, packed])
    return base64.urlsafe_b64encode(payload + _mac(key, payload)).rstrip(b"=").decode()


def read(key: bytes, token: str) -> Feedback | None:
    """What a token says, or None when this service did not sign it."""
    if not key or len(token) > MAX_TOKEN or not token.isascii():
        return None
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return None
    payload, mac = raw[:-_MAC], raw[-_MAC:]
    if len(payload) < _HEAD.size or not hmac.compare_digest(mac, _mac(key, payload)):
        return None
    version, predicted_s, len_id, len_digest, width, count = _HEAD.unpack_from(payload)
    if version != _VERSION:
        return None
    start = _HEAD.size
    raw_id, raw_digest = payload[start : start + len_id], payload[start + len_id : start + len_id + len_digest]
    packed = payload[start + len_id + len_digest :]
    predictions = tuple(packed) if width == 1 else struct.unpack(f">{count}H", packed)
    return Feedback(raw_id.decode(), _unpack_digest(raw_digest), predicted_s, predictions)


def _mac(key: bytes, payload: bytes) -> bytes:
    return hmac.digest(key, payload, "sha256")[:_MAC]


def _pack_digest(digest: str) -> bytes:
    """A SHA-256 in hex becomes its 32 bytes; any other text stays."""
    try:
        raw = bytes.fromhex(digest) if len(digest) == 64 else b""
    except ValueError:
        raw = b""
    return raw if raw.hex() == digest and raw else digest.encode()


def _unpack_digest(raw: bytes) -> str:
    return raw.hex() if len(raw) == 32 else raw.decode()


class Roles:
    """Checks bearer tokens of which only SHA-256 digests are known.

    Args:
        token_digests: SHA-256 hex of a token to its role, one of ROLES. Empty: nobody passes.
    """

    def __init__(self, token_digests: Mapping[str, str]) -> None:
        unknown = sorted(set(token_digests.values()) - set(ROLES))
        if unknown:
            raise ValueError(f"roles must be among {ROLES}; got {unknown}")
        self._digests = dict(token_digests)

    def role_of(self, authorization: str | None) -> str | None:
        """Role of an Authorization header; None for a missing, malformed or unknown one."""
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            return None
        asked = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).hexdigest()
        found = None
        for digest, role in self._digests.items():  # no early exit: the time must not tell which matched
            if hmac.compare_digest(asked, digest):
                found = role
        return found

    def require(self, authorization: str | None, role: str) -> str:
        """The caller's role, when it is at least `role`.

        Raises:
            RequestError: 401 without a known token, 403 with one of a lesser role.
        """
        found = self.role_of(authorization)
        if found is None:
            raise RequestError(f"this needs a bearer token of role {role}; got none that is known here", 401)
        if ROLES.index(found) < ROLES.index(role):
            raise RequestError(f"this needs role {role}; the token given has role {found}", 403)
        return found
