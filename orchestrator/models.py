"""Base models on the storage URI, each under the digest of its own bytes, so that every node loads the same.

Called by the launcher (publish), replicas and trials (fetch, load). What is read is verified on the very bytes that are
used. Knows nothing of modules: torch stays above.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from orchestrator.content import MANIFEST_FILE, check_digest, create_same, parse_object, sha256, to_json
from orchestrator.errors import IntegrityError, NotFound, SpecError, StorageError
from orchestrator.keys import heal_home
from orchestrator.settings import SCHEMA_VERSION
from orchestrator.spec import ModelSpec, check_safetensors, load_spec
from orchestrator.storage import Storage, open_storage

SPEC_FILE = "spec.yaml"
WEIGHTS_FILE = "weights.safetensors"
REFERENCE_FILE = "reference.parquet"
CODE_FOLDER = "code"
MAX_CODE_FILES = 200  # a spec's folder with more is not a model's own code
_SKIPPED_FOLDERS = {"venv", "env", "tests", "node_modules", "site-packages"}


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
    hashes = {name: sha256(data) for name, data in files.items()}
    digest = _model_digest(values, hashes)
    files[SPEC_FILE] = yaml.safe_dump(values, sort_keys=False).encode()
    folder = f"models/{digest}"
    if storage.exists(f"{folder}/{MANIFEST_FILE}"):
        return digest
    for name, data in files.items():
        create_same(storage, f"{folder}/{name}", data)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "digest": digest,
        "name": spec.name,
        "files": hashes | {SPEC_FILE: sha256(files[SPEC_FILE])},
    }
    create_same(storage, f"{folder}/{MANIFEST_FILE}", to_json(manifest))
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
    check_digest(digest)
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
    return sha256(json.dumps({"spec": values, "files": hashes}, sort_keys=True, separators=(",", ":")).encode())


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
        hashes = {name: sha256((folder / name).read_bytes()) for name in names if name != SPEC_FILE}
        values = yaml.safe_load((folder / SPEC_FILE).read_bytes())
        same = _model_digest(values, hashes) == digest
    except (FileNotFoundError, yaml.YAMLError, TypeError, ValueError) as error:
        raise IntegrityError(f"base model {digest} is incomplete in {folder}: {error}; {_MODEL_REMEDY}") from error
    if not same:
        raise IntegrityError(f"base model files must hash to {digest}; those in {folder} do not; {_MODEL_REMEDY}")


_MODEL_REMEDY = "remove the cached folder, or publish the model again"


def _listed_files(manifest: bytes, digest: str) -> list[str]:
    files = parse_object(manifest, f"manifest of base model {digest}").get("files")
    if not isinstance(files, dict) or not all(_is_inside(name) for name in files):
        raise IntegrityError(f"the manifest of base model {digest} must list files inside its folder; it does not")
    return sorted(files)


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name
