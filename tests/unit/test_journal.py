"""The journal: appending, going on after a crash, fencing, and noticing every kind of tampering."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import IntegrityError, ServiceError, StorageError
from orchestrator.journal import Entry, Journal, verify_journal
from orchestrator.keys import ServiceKeys
from orchestrator.messages import Phase
from orchestrator.storage import Storage, open_storage

KEYS = ServiceKeys("service", bytes(range(32)), b"", {})
OTHER_KEYS = ServiceKeys("service", bytes(range(1, 33)), b"", {})


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path)


def _filled(storage: Storage, num_entries: int = 4) -> Journal:
    journal = Journal(storage, KEYS)
    for n in range(num_entries):
        journal.append("StepTaken", {"n": n}, {"step": n}, time_s=float(n))
    return journal


def _file(storage: Storage, seq: int | str) -> Path:
    path = storage.local_path(f"journal/{seq if isinstance(seq, str) else format(seq, '010d')}.json")
    assert path is not None
    return path


def test_an_empty_journal_replays_to_nothing_and_verifies(storage: Storage) -> None:
    assert Journal(storage, KEYS).replay() is None
    assert Journal(storage, KEYS).entries() == []
    assert (verify_journal(storage).entries, verify_journal(storage).problems) == (0, [])


def test_entries_come_back_in_order_and_after_a_number(storage: Storage) -> None:
    journal = _filled(storage)
    for reader in (journal, Journal(storage, KEYS), Journal(storage, None)):
        assert [e.seq for e in reader.entries()] == [0, 1, 2, 3]
        assert reader.entries(2) == [Entry(3, 3.0, "StepTaken", {"n": 3}, {"step": 3})]
        assert reader.entries(99) == []


def test_a_restarted_orchestrator_goes_on_from_the_last_state(storage: Storage) -> None:
    _filled(storage)
    journal = Journal(storage, KEYS)
    assert journal.replay() == {"step": 3}
    assert journal.append("Restarted", {}, {"step": 4}) == 4
    assert Journal(storage, KEYS).replay() == {"step": 4}
    assert verify_journal(storage, KEYS.public_key).problems == []


def test_appending_without_a_replay_continues_the_chain(storage: Storage) -> None:
    _filled(storage, 2)
    assert Journal(storage, KEYS).append("Event", {}, {}) == 2
    assert verify_journal(storage, KEYS.public_key).problems == []


def test_numpy_enums_and_nan_are_written(storage: Storage) -> None:
    journal = Journal(storage, KEYS)
    body = {"n": np.int64(3), "x": np.float32(0.5), "a": np.arange(2), "phase": Phase.CANARY, "nan": float("nan")}
    journal.append("Measured", body, {})
    read = journal.entries()[0].body
    assert {**read, "nan": 0} == {"n": 3, "x": 0.5, "a": [0, 1], "phase": "canary", "nan": 0}
    assert np.isnan(read["nan"])
    with pytest.raises(TypeError, match="JSON values; got object"):
        journal.append("Measured", {"x": object()}, {})
    assert journal.append("Measured", {}, {}) == 1


def test_appending_lists_nothing(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = _filled(storage, 1)
    monkeypatch.setattr(type(storage), "list", lambda *_: pytest.fail("listed"))
    journal.append("Event", {}, {})
    assert len(journal.entries()) == 2


def test_a_second_orchestrator_is_fenced_and_stays_so(storage: Storage) -> None:
    old, new = _filled(storage), Journal(storage, KEYS)
    new.append("TookOver", {}, {"step": "new"})
    for _ in range(2):
        with pytest.raises(ServiceError, match="fenced: another orchestrator wrote journal entry 4"):
            old.append("StepTaken", {}, {"step": "old"})
    assert Journal(storage, KEYS).replay() == {"step": "new"}
    assert verify_journal(storage, KEYS.public_key).problems == []


def test_of_eight_orchestrators_that_append_at_once_one_wins(storage: Storage) -> None:
    journals = [Journal(storage, KEYS) for _ in range(8)]
    for journal in journals:
        journal.replay()

    def attempt(journal: Journal) -> bool:
        try:
            journal.append("Event", {}, {})
        except ServiceError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, journals)) == 1
    assert verify_journal(storage, KEYS.public_key).entries == 1


def test_a_reader_without_keys_cannot_append(storage: Storage) -> None:
    with pytest.raises(ServiceError, match="reading only"):
        Journal(storage, None).append("Event", {}, {})


def test_a_repeated_request_whose_answer_was_lost_is_not_a_fence(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = _filled(storage, 1)
    create = storage.create

    def twice(key: str, data: bytes) -> None:
        create(key, data)
        create(key, data)

    monkeypatch.setattr(storage, "create", twice)
    assert journal.append("Event", {}, {"step": 1}) == 1
    assert verify_journal(storage, KEYS.public_key).problems == []


def test_a_crash_between_entry_and_head_is_survived(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    for start in (0, 3):
        journal = _filled(storage, start) if start else Journal(storage, KEYS)

        def full(key: str, data: bytes) -> None:
            raise StorageError("disk full")

        with monkeypatch.context() as patch:
            patch.setattr(storage, "put", full)
            with pytest.raises(StorageError, match="disk full"):
                journal.append("Event", {}, {"step": "durable"})
        assert Journal(storage, KEYS).replay() == {"step": "durable"}
        assert verify_journal(storage, KEYS.public_key).problems == []
        journal.append("Event", {}, {"step": "next"})
        assert Journal(storage, KEYS).replay() == {"step": "next"}


def test_another_key_is_not_accepted(storage: Storage) -> None:
    _filled(storage)
    with pytest.raises(IntegrityError, match="does not verify"):
        Journal(storage, OTHER_KEYS).replay()
    assert len(verify_journal(storage, OTHER_KEYS.public_key).problems) == 5


def _cut(storage: Storage) -> None:
    _file(storage, 3).unlink()


def _cut_all(storage: Storage) -> None:
    for n in range(4):
        _file(storage, n).unlink()


def _cut_with_head(storage: Storage) -> None:
    _cut(storage)
    _file(storage, "HEAD").unlink()


def _remove_middle(storage: Storage) -> None:
    _file(storage, 1).unlink()


def _copy_entry(storage: Storage) -> None:
    _file(storage, 3).write_bytes(_file(storage, 2).read_bytes())


def _rewrite_payload(storage: Storage) -> None:
    envelope = json.loads(_file(storage, 3).read_bytes())
    envelope["payload"] = envelope["payload"].replace('"n":3', '"n":7')
    _file(storage, 3).write_text(json.dumps(envelope, sort_keys=True, separators=(",", ":")))


def _resign_all(storage: Storage) -> None:
    for path in (_file(storage, n) for n in [*range(4), "HEAD"]):
        path.unlink()
    journal = Journal(storage, OTHER_KEYS)
    for n in range(4):
        journal.append("Forged", {"n": n}, {"step": n})


def _truncate(storage: Storage) -> None:
    _file(storage, 3).write_bytes(_file(storage, 3).read_bytes()[:-10])


def _swap_head(storage: Storage) -> None:
    _file(storage, "HEAD").write_bytes(_file(storage, 2).read_bytes())


TAMPERINGS: list[Callable[[Any], None]] = [
    *(_cut, _cut_all, _cut_with_head, _remove_middle, _copy_entry, _rewrite_payload, _resign_all, _truncate),
    _swap_head,
]


@pytest.mark.parametrize("tamper", TAMPERINGS)
def test_tampering_is_found_by_the_audit_and_stops_a_replay(storage: Storage, tamper: Callable[[Any], None]) -> None:
    _filled(storage)
    tamper(storage)
    assert verify_journal(storage, KEYS.public_key).problems
    with pytest.raises(IntegrityError):
        Journal(storage, KEYS).replay()


def test_a_rewritten_old_entry_is_found_by_the_audit(storage: Storage) -> None:
    _filled(storage)
    forged = open_storage(_file(storage, 0).parent.parent / "forged")
    Journal(forged, KEYS).append("Forged", {}, {})  # even with the right key, the chain breaks
    _file(storage, 0).write_bytes(forged.get("journal/0000000000.json"))
    assert verify_journal(storage, KEYS.public_key).problems == ["entry 1 does not follow entry 0: their hashes differ"]


def test_a_missing_middle_entry_is_named(storage: Storage) -> None:
    _filled(storage)
    _remove_middle(storage)
    assert verify_journal(storage, KEYS.public_key).problems == ["entry 1 is missing"]
    with pytest.raises(IntegrityError, match="entry 1 is missing"):
        Journal(storage, KEYS).replay()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_flipped_bit_anywhere_is_found(draw: st.DataObject) -> None:
    storage = open_storage(f"memory://{secrets.token_hex(8)}")
    _filled(storage, 2)
    key = draw.draw(st.sampled_from(storage.list("journal/")))
    data = bytearray(storage.get(key))
    bit = draw.draw(st.integers(0, len(data) * 8 - 1))
    data[bit // 8] ^= 1 << (bit % 8)
    storage.put(key, bytes(data))
    assert verify_journal(storage, KEYS.public_key).problems


def test_a_signature_in_capital_letters_is_not_as_it_was_written(storage: Storage) -> None:
    _filled(storage, 1)
    key = storage.list("journal/")[0]
    envelope = json.loads(storage.get(key))
    assert any(c.isalpha() for c in envelope["signature"])
    envelope["signature"] = envelope["signature"].upper()
    storage.put(key, json.dumps(envelope, sort_keys=True, separators=(",", ":")).encode())
    assert verify_journal(storage, KEYS.public_key).problems


def test_foreign_files_in_the_folder_are_ignored(storage: Storage) -> None:
    _filled(storage, 1)
    storage.put("journal/snapshot.json", b"{}")
    storage.put("journal/notes.txt", b"hello")
    assert Journal(storage, KEYS).replay() == {"step": 0}
    assert verify_journal(storage, KEYS.public_key).problems == []
