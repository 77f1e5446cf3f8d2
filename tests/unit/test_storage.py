"""The storage port: what every backend must do, and what the local folder does on top."""

from __future__ import annotations

import os
import pickle
import secrets
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import AlreadyExists, NotFound, StorageError
from orchestrator.storage import Storage, open_storage


@pytest.fixture(params=["folder", "file", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    uris = {
        "folder": str(tmp_path / "store"),
        "file": f"file://{tmp_path}/store",
        "memory": f"memory://{secrets.token_hex(8)}",
    }
    return open_storage(uris[request.param])


def test_what_was_put_is_read_back_and_replaced(storage: Storage) -> None:
    storage.put("a/b.json", b"one")
    storage.put("a/b.json", b"two")
    assert storage.get("a/b.json") == b"two"


def test_empty_bytes_are_bytes_too(storage: Storage) -> None:
    storage.create("a", b"")
    assert storage.get("a") == b""
    assert storage.exists("a")


def test_create_refuses_a_taken_key_and_leaves_its_bytes(storage: Storage) -> None:
    storage.create("journal/0", b"first")
    with pytest.raises(AlreadyExists, match="already has 'journal/0'"):
        storage.create("journal/0", b"second")
    assert storage.get("journal/0") == b"first"


def test_of_eight_concurrent_creators_exactly_one_wins(storage: Storage) -> None:
    def attempt(writer: int) -> int | None:
        try:
            storage.create("fence", str(writer).encode())
        except AlreadyExists:
            return None
        return writer

    with ThreadPoolExecutor(8) as pool:
        winners = [w for w in pool.map(attempt, range(8)) if w is not None]
    assert len(winners) == 1
    assert storage.get("fence") == str(winners[0]).encode()
    assert storage.list("") == ["fence"]


def test_a_missing_key_is_not_found_by_name(storage: Storage) -> None:
    with pytest.raises(NotFound, match="has no 'models/x'"):
        storage.get("models/x")
    assert not storage.exists("models/x")


def test_deleting_twice_is_fine(storage: Storage) -> None:
    storage.put("a", b"1")
    storage.delete("a")
    storage.delete("a")
    assert not storage.exists("a")


def test_listing_is_sorted_and_by_plain_prefix(storage: Storage) -> None:
    for key in ("journal/2.json", "journal/1.json", "journal-old/1.json", "stable.json"):
        storage.put(key, b"x")
    assert storage.list("journal/") == ["journal/1.json", "journal/2.json"]
    assert storage.list("journal/1") == ["journal/1.json"]
    assert storage.list("jour") == ["journal-old/1.json", "journal/1.json", "journal/2.json"]
    assert storage.list("") == ["journal-old/1.json", "journal/1.json", "journal/2.json", "stable.json"]
    assert storage.list("nothing/here") == []


def test_the_uri_opens_the_same_storage_again(storage: Storage) -> None:
    storage.put("a", b"1")
    assert open_storage(storage.uri).get("a") == b"1"


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../up", "a/../b", "a//b", "a/", "./a", "a\\b", "a\nb"])
def test_keys_that_leave_the_storage_are_rejected(storage: Storage, key: str) -> None:
    for call in (storage.get, storage.exists, storage.delete, storage.local_path):
        with pytest.raises(StorageError, match="relative path"):
            call(key)
    for write in (storage.put, storage.create):
        with pytest.raises(StorageError, match="relative path"):
            write(key, b"x")


@given(st.text(alphabet="abc./\\ ", max_size=12))
def test_an_accepted_key_stays_below_its_root(key: str) -> None:
    root = Path(tempfile.gettempdir()).resolve()
    try:
        path = open_storage(root).local_path(key)
    except StorageError:
        return
    normal = Path(os.path.normpath(str(path)))
    assert normal.is_relative_to(root)
    assert normal != root


@pytest.mark.parametrize("prefix", ["../", "/", "/etc/", "a/../../b"])
def test_a_listing_cannot_leave_the_storage(storage: Storage, prefix: str) -> None:
    with pytest.raises(StorageError, match="relative path"):
        storage.list(prefix)


def test_local_path_names_the_file_and_is_none_for_remote(tmp_path: Path) -> None:
    local = open_storage(str(tmp_path))
    local.put("a/b", b"1")
    path = local.local_path("a/b")
    assert path is not None
    assert path.read_bytes() == b"1"
    assert open_storage("memory://paths").local_path("a/b") is None


def test_half_written_files_are_never_listed(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / ".part-dead").write_bytes(b"half")
    assert open_storage(str(tmp_path)).list("journal/") == []


def test_a_failed_write_names_key_operation_and_cause_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a file where a folder is needed")
    storage = open_storage(str(tmp_path))
    with pytest.raises(StorageError, match=r"could not write 'a/b': NotADirectoryError"):
        storage.put("a/b", b"x")
    assert storage.list("") == ["a"]


def test_a_file_in_the_way_of_a_folder_does_not_read_as_a_taken_key(tmp_path: Path) -> None:
    (tmp_path / "journal").write_bytes(b"")
    with pytest.raises(StorageError, match="could not create 'journal/0'") as caught:
        open_storage(str(tmp_path)).create("journal/0", b"x")
    assert not isinstance(caught.value, AlreadyExists)


def test_a_storage_travels_to_other_processes(storage: Storage) -> None:
    storage.put("a", b"1")
    assert pickle.loads(pickle.dumps(storage)).get("a") == b"1"


def test_a_folder_is_no_key(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(NotFound, match="has no 'a'"):
        open_storage(str(tmp_path)).get("a")


def test_an_unreadable_folder_is_an_error_and_not_an_empty_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(StorageError, match=r"could not list 'journal/'.*Permission denied"):
        open_storage(str(tmp_path)).list("journal/")


@pytest.mark.parametrize("uri", ["", "ftp://host/x", "http://host/x"])
def test_an_unknown_scheme_is_rejected_with_the_known_ones(uri: str) -> None:
    with pytest.raises(StorageError, match="s3://"):
        open_storage(uri)


def test_s3_and_gs_open_without_touching_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    assert open_storage("s3://bucket/prefix").uri == "s3://bucket/prefix"
