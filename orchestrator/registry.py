"""Adapters on the storage URI, each under the digest of its own bytes, and the last promoted generation.

Called by searches (save), replicas and trials (load) and the command line (list). What is read is verified on the very
bytes that are used, so a digest names one content, wherever it came from. Knows nothing of modules: torch stays above.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from orchestrator.content import DIGEST, MANIFEST_FILE, check_digest, create_same, parse_object, sha256, to_json
from orchestrator.errors import IntegrityError, NotFound
from orchestrator.keys import ServiceKeys, verify
from orchestrator.messages import BASE
from orchestrator.settings import SCHEMA_VERSION
from orchestrator.storage import Storage

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
SIGNATURE_FILE = "manifest.sig"
STABLE_KEY = "stable.json"
_log = logging.getLogger(__name__)


def save_adapter(
    storage: Storage,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    manifest: dict[str, Any],
    keys: ServiceKeys | None,
) -> str:
    """Put an adapter on the storage in PEFT's format, its manifest last.

    Args:
        storage: where to.
        config: goes into `adapter_config.json`; sets become sorted lists.
        tensors: any shapes, 0-d too, in any memory order.
        manifest: base digest (`base`), data window, trial, figures; `digest` and `files` are added.
        keys: sign the manifest; None: unsigned.

    Returns:
        Its digest; saving the same content again returns the same one and keeps the first manifest, unless that
        does not verify under `keys`.

    Raises:
        StorageError: the storage cannot be written.
        IntegrityError: the storage holds other bytes under this digest.
    """
    files = {
        CONFIG_FILE: to_json(config),
        TENSORS_FILE: save_tensors({name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}),
    }
    digest = _adapter_digest(files[CONFIG_FILE], files[TENSORS_FILE])
    folder = f"adapters/{digest}"
    complete = manifest | {
        "schema_version": SCHEMA_VERSION,
        "digest": digest,
        "files": {name: sha256(data) for name, data in files.items()},
        "public_key": keys.public_key.hex() if keys is not None else None,
    }
    for name, data in files.items():
        create_same(storage, f"{folder}/{name}", data)
    try:
        _read_manifest(storage, digest, keys.public_key if keys is not None else None)
    except (NotFound, IntegrityError):
        data = to_json(complete)
        if keys is not None:
            storage.put(f"{folder}/{SIGNATURE_FILE}", keys.sign(data))
        storage.put(f"{folder}/{MANIFEST_FILE}", data)
    return digest


def load_adapter(
    storage: Storage, digest: str, public_key: bytes | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, Any]]:
    """Config, tensors and manifest of an adapter, verified on the bytes that are returned.

    Args:
        storage: holds it.
        digest: its name.
        public_key: 32 bytes that must have signed the manifest; None: a signature, where there is one, must only
            agree with the key that the manifest names.

    Raises:
        NotFound: there is no such adapter.
        IntegrityError: the bytes differ from the digest, or the manifest is not its own or not signed as asked.
        StorageError: the storage cannot be read.
    """
    check_digest(digest)
    try:
        manifest = _read_manifest(storage, digest, public_key)
        config_bytes = storage.get(f"adapters/{digest}/{CONFIG_FILE}")
        tensor_bytes = storage.get(f"adapters/{digest}/{TENSORS_FILE}")
    except NotFound as error:
        raise NotFound(f"adapter {digest} must be on {storage.uri}; it is not there, or not whole: {error}") from error
    if _adapter_digest(config_bytes, tensor_bytes) != digest:
        raise IntegrityError(f"adapter files must hash to {digest}; they do not; restore or delete that adapter")
    try:
        tensors = load_tensors(tensor_bytes)
    except SafetensorError as error:
        raise IntegrityError(f"adapter {digest} must hold safetensors; {error}; delete that adapter") from error
    return parse_object(config_bytes, f"config of adapter {digest}"), tensors, manifest


def list_adapters(storage: Storage, base: str | None = None) -> list[dict[str, Any]]:
    """Manifests of all adapters, of one base only if it is given, by digest. A broken one is logged and left out."""
    found = []
    for key in storage.list("adapters/"):
        digest = key.split("/")[1]
        if key != f"adapters/{digest}/{MANIFEST_FILE}":
            continue
        try:
            manifest = _read_manifest(storage, digest, None)
        except (IntegrityError, NotFound) as error:
            _log.warning("adapter %s is not listed: %s", digest, error)
            continue
        if base is None or manifest.get("base") == base:
            found.append(manifest)
    return found


def _adapter_digest(config: bytes, tensors: bytes) -> str:
    """Over both files' names and hashes, so that no byte can move from one file to the other."""
    return sha256(to_json({CONFIG_FILE: sha256(config), TENSORS_FILE: sha256(tensors)}))


def _read_manifest(storage: Storage, digest: str, public_key: bytes | None) -> dict[str, Any]:
    folder = f"adapters/{digest}"
    data = storage.get(f"{folder}/{MANIFEST_FILE}")
    manifest = parse_object(data, f"manifest of adapter {digest}")
    if manifest.get("digest") != digest:
        raise IntegrityError(f"the manifest of adapter {digest} must name it; it names {manifest.get('digest')!r}")
    named = manifest.get("public_key")
    if public_key is None and named is None:
        return manifest
    try:
        signature = storage.get(f"{folder}/{SIGNATURE_FILE}")
    except NotFound as error:
        raise IntegrityError(f"adapter {digest} must be signed; it has no {SIGNATURE_FILE}; do not serve it") from error
    try:
        verify(public_key if public_key is not None else bytes.fromhex(str(named)), data, signature)
    except (IntegrityError, ValueError, TypeError) as error:
        raise IntegrityError(f"the manifest of adapter {digest} must verify: {error}; do not serve it") from error
    return manifest


# ---------------------------------------------------------------- the stable generation


def write_stable(storage: Storage, base: str, generation: int, digest: str) -> None:
    """Replace the record of the last promoted generation: what replicas start from without an orchestrator.

    Args:
        storage: holds `stable.json`.
        base: digest of the base model.
        generation: number of the decision, >= 0.
        digest: adapter, or `base`.

    Raises:
        StorageError: it cannot be written.
    """
    record = {"schema_version": SCHEMA_VERSION, "base": base, "generation": int(generation), "digest": digest}
    storage.put(STABLE_KEY, to_json(record))


def read_stable(storage: Storage) -> dict[str, Any] | None:
    """`base`, `generation` and `digest` of the last promoted generation, None before the first.

    Raises:
        IntegrityError: the record is damaged.
        StorageError: it cannot be read.
    """
    try:
        record = parse_object(storage.get(STABLE_KEY), STABLE_KEY)
    except NotFound:
        return None
    digest = record.get("digest")
    named = digest == BASE or (isinstance(digest, str) and DIGEST.fullmatch(digest))
    if not named or type(record.get("generation")) is not int or not isinstance(record.get("base"), str):
        raise IntegrityError(f"{STABLE_KEY} must hold base, generation and digest; got {record!r}; delete it")
    return record
