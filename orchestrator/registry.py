"""Base models and adapters on the storage URI, each under the digest of its own bytes.

Called by the launcher (publish), replicas and trials (fetch, load), searches (save) and the command line (list). What
is read is verified on the very bytes that are used, so a digest names one content, wherever it came from. A manifest
is written last: what has none was never published. Knows nothing of modules: torch stays above.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from orchestrator.errors import AlreadyExists, IntegrityError, NotFound, SpecError, StorageError
from orchestrator.keys import ServiceKeys, heal_home, verify
from orchestrator.messages import BASE
from orchestrator.settings import SCHEMA_VERSION
from orchestrator.spec import ModelSpec, check_safetensors, load_spec
from orchestrator.storage import Storage, open_storage

SPEC_FILE = "spec.yaml"
WEIGHTS_FILE = "weights.safetensors"
REFERENCE_FILE = "reference.parquet"
CODE_FOLDER = "code"
CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
MANIFEST_FILE = "manifest.json"
SIGNATURE_FILE = "manifest.sig"
STABLE_KEY = "stable.json"
MAX_CODE_FILES = 200  # a spec's folder with more is not a model's own code
_SKIPPED_FOLDERS = {"venv", "env", "tests", "node_modules", "site-packages"}
_DIGEST = re.compile(r"[0-9a-f]{64}")
_log = logging.getLogger(__name__)


# ---------------------------------------------------------------- base models


def publish_model(storage: Storage, spec: ModelSpec, weights: bytes | None = None) -> str:
    """Put spec, code, weights and reference on the storage, once, so that every node loads the same bytes.

    Code is every `.py` below the spec's folder (not hidden, virtual environments or tests), when the factory's module
    lives there; a factory of an installed package has none.

    Args:
        storage: where to.
        spec: its relative paths are read from its folder.
        weights: safetensors bytes to publish instead of the spec's file.

    Returns:
        Digest of the base: SHA-256 over the canonical JSON of the published spec and every other file's SHA-256.

    Raises:
        SpecError: a file that the spec names is missing or no safetensors, or there is too much code.
        StorageError: the storage cannot be written.
        IntegrityError: the storage holds other bytes under this digest.
    """
    files = {f"{CODE_FOLDER}/{name}": data for name, data in _code(spec).items()}
    files[REFERENCE_FILE] = _read_named("reference", spec, spec.reference)
    if weights is None and spec.weights is not None:
        weights = _read_named("weights", spec, spec.weights)
    if weights is not None:
        check_safetensors("weights", weights[:9], len(weights))
        files[WEIGHTS_FILE] = weights
    values = spec.to_dict() | {"reference": REFERENCE_FILE}
    values.pop("weights", None)
    if weights is not None:
        values["weights"] = WEIGHTS_FILE
    hashes = {name: _sha256(data) for name, data in files.items()}
    digest = _model_digest(values, hashes)
    files[SPEC_FILE] = yaml.safe_dump(values, sort_keys=False).encode()
    folder = f"models/{digest}"
    if storage.exists(f"{folder}/{MANIFEST_FILE}"):
        return digest
    for name, data in files.items():
        _create_same(storage, f"{folder}/{name}", data)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "digest": digest,
        "name": spec.name,
        "files": hashes | {SPEC_FILE: _sha256(files[SPEC_FILE])},
    }
    _create_same(storage, f"{folder}/{MANIFEST_FILE}", _json(manifest))
    return digest


def fetch_model(storage: Storage, digest: str) -> Path:
    """Local folder with the published files of a base; downloaded at first use, verified at every use.

    Safe to call from several processes: each downloads aside and the first rename wins.

    Returns:
        `HEAL_HOME/models/<digest>` with `spec.yaml`, `code/`, `weights.safetensors`, `reference.parquet`.

    Raises:
        NotFound: no such base was published here.
        IntegrityError: a file differs from the digest.
        StorageError: the storage cannot be read, or the cache not written.
    """
    _check_digest(digest)
    final = heal_home() / "models" / digest
    try:
        if final.is_dir():
            _verify_folder(final, digest)
            return final
        aside = final.with_name(f".{digest[:16]}-{secrets.token_hex(8)}")
        try:
            _download(storage, digest, aside)
            _verify_folder(aside, digest)
            if not _renamed(aside, final):
                _verify_folder(final, digest)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"the model cache {final} must be writable; {error}; set HEAL_HOME") from error
    return final


def load_published_spec(folder: str | Path) -> ModelSpec:
    """Spec of a folder that `fetch_model` returned.

    Raises:
        SpecError: there is none.
    """
    return load_spec(Path(folder) / SPEC_FILE)


def _model_digest(values: dict[str, Any], hashes: dict[str, str]) -> str:
    return _sha256(json.dumps({"spec": values, "files": hashes}, sort_keys=True, separators=(",", ":")).encode())


def _read_named(field: str, spec: ModelSpec, value: str) -> bytes:
    location = spec.locate(value)
    try:
        if "://" in location:
            parent, _, name = location.rpartition("/")
            return open_storage(parent).get(name)
        return Path(location).read_bytes()
    except (OSError, StorageError) as error:
        raise SpecError(f"{field} must be a readable file; got {value!r}: {error}; check the path") from error


def _code(spec: ModelSpec) -> dict[str, bytes]:
    """Relative path -> bytes of the code to publish; a fetched folder gives the same as the original one."""
    top = spec.factory.partition(":")[0].partition(".")[0]
    if spec.folder is None:
        return {}
    root = spec.folder / CODE_FOLDER if (spec.folder / MANIFEST_FILE).is_file() else spec.folder
    if not (root / f"{top}.py").is_file() and not (root / top).is_dir():
        return {}
    found: dict[str, bytes] = {}
    for parent, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name == top or not _skipped(Path(parent) / name))
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith("."):
                path = Path(parent) / name
                found[path.relative_to(root).as_posix()] = path.read_bytes()
        if len(found) > MAX_CODE_FILES:
            raise SpecError(
                f"the spec's folder must hold at most {MAX_CODE_FILES} Python files; {root} has more; "
                "move spec and code into a folder of their own"
            )
    return found


def _skipped(folder: Path) -> bool:
    name = folder.name
    hidden = name.startswith((".", "__pycache__")) or name in _SKIPPED_FOLDERS
    return hidden or folder.is_symlink() or (folder / "pyvenv.cfg").exists()


def _download(storage: Storage, digest: str, folder: Path) -> None:
    try:
        manifest = storage.get(f"models/{digest}/{MANIFEST_FILE}")
    except NotFound as error:
        raise NotFound(f"base model {digest} must be published on {storage.uri}; it is not there") from error
    for name in [*_listed_files(manifest, digest), MANIFEST_FILE]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(manifest if name == MANIFEST_FILE else storage.get(f"models/{digest}/{name}"))


def _renamed(aside: Path, final: Path) -> bool:
    try:
        aside.rename(final)
    except OSError:
        if final.is_dir():  # another process was first; its files are verified like ours
            return False
        raise
    return True


def _verify_folder(folder: Path, digest: str) -> None:
    """The files hash to the digest. The manifest only says which there are: it is not trusted with anything else."""
    try:
        names = _listed_files((folder / MANIFEST_FILE).read_bytes(), digest)
        hashes = {name: _sha256((folder / name).read_bytes()) for name in names if name != SPEC_FILE}
        values = yaml.safe_load((folder / SPEC_FILE).read_bytes())
        same = _model_digest(values, hashes) == digest
    except (FileNotFoundError, yaml.YAMLError, TypeError, ValueError) as error:
        raise IntegrityError(f"base model {digest} is incomplete in {folder}: {error}; {_MODEL_REMEDY}") from error
    if not same:
        raise IntegrityError(f"base model files must hash to {digest}; those in {folder} do not; {_MODEL_REMEDY}")


_MODEL_REMEDY = "remove the cached folder, or publish the model again"


def _listed_files(manifest: bytes, digest: str) -> list[str]:
    files = _parse(manifest, f"manifest of base model {digest}").get("files")
    if not isinstance(files, dict) or not all(_is_inside(name) for name in files):
        raise IntegrityError(f"the manifest of base model {digest} must list files inside its folder; it does not")
    return sorted(files)


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


# ---------------------------------------------------------------- adapters


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
        CONFIG_FILE: _json(config),
        TENSORS_FILE: save_tensors({name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}),
    }
    digest = _adapter_digest(files[CONFIG_FILE], files[TENSORS_FILE])
    folder = f"adapters/{digest}"
    complete = manifest | {
        "schema_version": SCHEMA_VERSION,
        "digest": digest,
        "files": {name: _sha256(data) for name, data in files.items()},
        "public_key": keys.public_key.hex() if keys is not None else None,
    }
    for name, data in files.items():
        _create_same(storage, f"{folder}/{name}", data)
    try:
        _read_manifest(storage, digest, keys.public_key if keys is not None else None)
    except (NotFound, IntegrityError):
        data = _json(complete)
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
    _check_digest(digest)
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
    return _parse(config_bytes, f"config of adapter {digest}"), tensors, manifest


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
    return _sha256(_json({CONFIG_FILE: _sha256(config), TENSORS_FILE: _sha256(tensors)}))


def _read_manifest(storage: Storage, digest: str, public_key: bytes | None) -> dict[str, Any]:
    folder = f"adapters/{digest}"
    data = storage.get(f"{folder}/{MANIFEST_FILE}")
    manifest = _parse(data, f"manifest of adapter {digest}")
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
    storage.put(STABLE_KEY, _json(record))


def read_stable(storage: Storage) -> dict[str, Any] | None:
    """`base`, `generation` and `digest` of the last promoted generation, None before the first.

    Raises:
        IntegrityError: the record is damaged.
        StorageError: it cannot be read.
    """
    try:
        record = _parse(storage.get(STABLE_KEY), STABLE_KEY)
    except NotFound:
        return None
    digest = record.get("digest")
    named = digest == BASE or (isinstance(digest, str) and _DIGEST.fullmatch(digest))
    if not named or type(record.get("generation")) is not int or not isinstance(record.get("base"), str):
        raise IntegrityError(f"{STABLE_KEY} must hold base, generation and digest; got {record!r}; delete it")
    return record


# ---------------------------------------------------------------- bytes


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _check_digest(digest: str) -> None:
    if not _DIGEST.fullmatch(digest):
        raise IntegrityError(f"a digest must be 64 hex digits; got {digest!r}")


def _json(value: dict[str, Any]) -> bytes:
    def plain(item: Any) -> Any:
        if isinstance(item, np.generic | np.ndarray):
            return item.tolist()
        if isinstance(item, set | frozenset):
            return sorted(item)
        raise TypeError(f"a registry file must hold JSON values; got {type(item).__name__}")

    return json.dumps(value, sort_keys=True, indent=2, default=plain).encode()


def _parse(data: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise IntegrityError(f"{name} must be a JSON object; it is damaged: {error}") from error
    if not isinstance(value, dict):
        raise IntegrityError(f"{name} must be a JSON object; got {type(value).__name__}")
    return value


def _create_same(storage: Storage, key: str, data: bytes) -> None:
    """Create `key`; taken with these very bytes (an earlier attempt) is fine."""
    try:
        storage.create(key, data)
    except AlreadyExists as error:
        if storage.get(key) != data:
            raise IntegrityError(f"{key} must be what its digest says; other bytes are there; delete them") from error
