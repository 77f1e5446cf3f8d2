"""One port on the storage URI: everything the project keeps goes through these few verbs.

A local folder uses `link` for create-if-absent and `rename` for replacement; object stores use obstore's conditional
put. Used by journal, registry, traffic and trials. Knows no format.
"""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlparse

from orchestrator.errors import AlreadyExists, NotFound, StorageError

REMOTE_SCHEMES = ("s3", "gs", "memory")


class Storage(Protocol):
    """Keys are relative POSIX paths; values are whole byte strings."""

    uri: str

    def get(self, key: str) -> bytes:
        """The bytes at `key`. Raises NotFound."""

    def put(self, key: str, data: bytes) -> None:
        """Replace `key` atomically."""

    def create(self, key: str, data: bytes) -> None:
        """Write `key` only if it is absent, whole or not at all. Raises AlreadyExists."""

    def list(self, prefix: str) -> list[str]:
        """All keys that start with `prefix`, sorted."""

    def exists(self, key: str) -> bool:
        """Whether `key` is there."""

    def delete(self, key: str) -> None:
        """Remove `key`; absent is fine."""

    def local_path(self, key: str) -> Path | None:
        """The file behind `key` on a local folder, None elsewhere."""


def open_storage(uri: str | Path) -> Storage:
    """The storage at a URI.

    Args:
        uri: a local path, `file://`, `s3://`, `gs://` or `memory://`.

    Raises:
        StorageError: unknown scheme, or a local path that is no folder.
    """
    text = str(uri)
    if not text.strip():
        raise StorageError("storage must be a path, file://, s3://, gs:// or memory://; got an empty one")
    scheme = urlparse(text).scheme if "://" in text else "file"
    if scheme == "file":
        path = unquote(urlparse(text).path) if "://" in text else text
        return LocalStorage(Path(path).expanduser().resolve())
    if scheme in REMOTE_SCHEMES:
        return ObjectStorage(text)
    raise StorageError(f"storage must be a path, file://, s3://, gs:// or memory://; got {text!r}")


def _checked(key: str) -> str:
    parts = key.split("/")
    if (
        not key
        or key.startswith("/")
        or any(p in ("", ".", "..") for p in parts)
        or "\\" in key
        or not key.isprintable()
    ):
        raise StorageError(f"a storage key must be a relative path without '..' or empty parts; got {key!r}")
    return key


def _folder_of(prefix: str) -> str:
    folder = prefix.rpartition("/")[0]
    return _checked(folder) if folder or prefix.startswith("/") else ""


def _raise_unless_missing(error: OSError) -> None:
    # A folder that cannot be read must not look empty: the journal would begin anew.
    if not isinstance(error, FileNotFoundError):
        raise error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the new name itself survives a power cut
    finally:
        os.close(descriptor)


def _failed(operation: str, key: str, error: BaseException) -> StorageError:
    return StorageError(f"storage could not {operation} {key!r}: {type(error).__name__}: {error}")


class LocalStorage:
    """A folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.uri = str(root)
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _failed("make the folder", str(root), error) from error

    def get(self, key: str) -> bytes:
        """See `Storage`."""
        try:
            return (self._root / _checked(key)).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise NotFound(f"storage {self.uri} has no {key!r}") from error
        except OSError as error:
            raise _failed("read", key, error) from error

    def put(self, key: str, data: bytes) -> None:
        """See `Storage`."""
        path = self._root / _checked(key)
        try:
            temporary = self._write_aside(path, data)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except OSError as error:
            raise _failed("write", key, error) from error

    def create(self, key: str, data: bytes) -> None:
        """See `Storage`."""
        path = self._root / _checked(key)
        try:
            temporary = self._write_aside(path, data)
            try:
                os.link(temporary, path)  # the one operation that fails when the name is taken
                _sync_folder(path.parent)
            finally:
                os.unlink(temporary)
        except FileExistsError as error:
            raise AlreadyExists(f"storage {self.uri} already has {key!r}") from error
        except OSError as error:
            raise _failed("create", key, error) from error

    def _write_aside(self, path: Path, data: bytes) -> str:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:  # must not read as "the key is taken"
            raise NotADirectoryError(str(error)) from error
        handle, temporary = tempfile.mkstemp(prefix=".part-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            os.unlink(temporary)
            raise
        return temporary

    def list(self, prefix: str) -> list[str]:
        """See `Storage`."""
        found = []
        try:
            for parent, _, names in os.walk(self._root / _folder_of(prefix), onerror=_raise_unless_missing):
                for name in names:
                    key = (Path(parent) / name).relative_to(self._root).as_posix()
                    if key.startswith(prefix) and not name.startswith(".part-"):
                        found.append(key)
        except OSError as error:
            raise _failed("list", prefix, error) from error
        return sorted(found)

    def exists(self, key: str) -> bool:
        """See `Storage`."""
        return (self._root / _checked(key)).is_file()

    def delete(self, key: str) -> None:
        """See `Storage`."""
        try:
            (self._root / _checked(key)).unlink(missing_ok=True)
        except OSError as error:
            raise _failed("delete", key, error) from error

    def local_path(self, key: str) -> Path | None:
        """See `Storage`."""
        return self._root / _checked(key)


_MEMORY: dict[str, Any] = {}  # memory:// means the same store for every caller of one process


class ObjectStorage:
    """An object store through obstore."""

    def __init__(self, uri: str) -> None:
        import obstore.store

        self.uri = uri
        try:
            if uri.startswith("memory://"):
                self._store = _MEMORY.setdefault(uri, obstore.store.MemoryStore())
            else:
                self._store = obstore.store.from_url(uri)
        except Exception as error:  # obstore raises its own tree without a common public base for configuration
            raise _failed("open", uri, error) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectStorage, (self.uri,)

    def get(self, key: str) -> bytes:
        """See `Storage`."""
        import obstore

        try:
            return bytes(obstore.get(self._store, _checked(key)).bytes())
        except FileNotFoundError as error:
            raise NotFound(f"storage {self.uri} has no {key!r}") from error
        except (obstore.exceptions.BaseError, OSError) as error:
            raise _failed("read", key, error) from error

    def put(self, key: str, data: bytes) -> None:
        """See `Storage`."""
        self._put(key, data, "overwrite")

    def create(self, key: str, data: bytes) -> None:
        """See `Storage`."""
        self._put(key, data, "create")

    def _put(self, key: str, data: bytes, mode: str) -> None:
        import obstore

        try:
            obstore.put(self._store, _checked(key), data, mode=mode)
        except (obstore.exceptions.AlreadyExistsError, FileExistsError) as error:
            raise AlreadyExists(f"storage {self.uri} already has {key!r}") from error
        except (obstore.exceptions.BaseError, OSError) as error:
            if getattr(error, "errno", None) == errno.EEXIST:
                raise AlreadyExists(f"storage {self.uri} already has {key!r}") from error
            raise _failed("write", key, error) from error

    def list(self, prefix: str) -> list[str]:
        """See `Storage`."""
        import obstore

        folder = _folder_of(prefix)
        try:
            rows = [row["path"] for page in obstore.list(self._store, prefix=folder or None) for row in page]
        except (obstore.exceptions.BaseError, OSError) as error:
            raise _failed("list", prefix, error) from error
        return sorted(p for p in rows if p.startswith(prefix))

    def exists(self, key: str) -> bool:
        """See `Storage`."""
        import obstore

        try:
            obstore.head(self._store, _checked(key))
        except FileNotFoundError:
            return False
        except (obstore.exceptions.BaseError, OSError) as error:
            raise _failed("look for", key, error) from error
        return True

    def delete(self, key: str) -> None:
        """See `Storage`."""
        import obstore

        try:
            obstore.delete(self._store, _checked(key))
        except FileNotFoundError:
            return
        except (obstore.exceptions.BaseError, OSError) as error:
            raise _failed("delete", key, error) from error

    def local_path(self, key: str) -> Path | None:
        """See `Storage`."""
        _checked(key)
        return None
