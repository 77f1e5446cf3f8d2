"""The keys of a service: made once, private, and what they sign."""

from __future__ import annotations

import hashlib
import json
import pickle
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import IntegrityError, ServiceError
from orchestrator.keys import ROLES, ServiceKeys, load_keys, verify


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEAL_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HEAL_TOKEN", raising=False)
    return tmp_path / "home"


def test_keys_are_made_once_and_differ_between_services() -> None:
    assert load_keys("a") == load_keys("a")
    assert load_keys("a").seed != load_keys("b").seed
    assert set(load_keys("a").tokens) == set(ROLES)
    assert len(set(load_keys("a").tokens.values())) == len(ROLES)


def test_the_file_is_private_to_its_owner(home: Path) -> None:
    load_keys("a")
    path = home / "keys" / "a.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) & 0o077 == 0
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_file_open_to_others_is_refused(home: Path) -> None:
    load_keys("a")
    (home / "keys" / "a.json").chmod(0o644)
    with pytest.raises(ServiceError, match=r"mode is 644; chmod 600"):
        load_keys("a")


def test_of_concurrent_first_users_all_get_the_same_keys() -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len({keys.seed for keys in pool.map(load_keys, ["a"] * 8)}) == 1


def test_heal_token_overrides_the_operator_only_and_is_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = load_keys("a").tokens
    monkeypatch.setenv("HEAL_TOKEN", "secret")
    assert load_keys("a").tokens == {**stored, "operator": "secret"}
    monkeypatch.delenv("HEAL_TOKEN")
    assert load_keys("a").tokens == stored


def test_token_digests_name_the_role_without_the_token() -> None:
    keys = load_keys("a")
    digests = keys.token_digests()
    assert digests[hashlib.sha256(keys.tokens["labeller"].encode()).hexdigest()] == "labeller"
    assert sorted(digests.values()) == sorted(ROLES)


def test_secrets_do_not_show_in_the_repr() -> None:
    keys = load_keys("a")
    shown = repr(keys)
    for secret in (keys.seed.hex(), repr(keys.seed), repr(keys.feedback_key), *keys.tokens.values()):
        assert secret not in shown


def test_keys_travel_to_the_orchestrator_process() -> None:
    keys = load_keys("a")
    assert pickle.loads(pickle.dumps(keys)) == keys


@pytest.mark.parametrize("name", ["", "../a", "a/b", ".hidden", "a b"])
def test_a_service_name_that_is_no_file_name_is_refused(name: str) -> None:
    with pytest.raises(ServiceError, match="service name must be"):
        load_keys(name)


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"seed": "zz"}', "half"])
def test_a_broken_file_is_refused_and_not_replaced(home: Path, damage: str) -> None:
    load_keys("a")
    path = home / "keys" / "a.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "seed": values["seed"][:8]}) if damage == "half" else damage)
    before = path.read_bytes()
    with pytest.raises(ServiceError, match="restore it from a backup"):
        load_keys("a")
    assert path.read_bytes() == before


KEYS = ServiceKeys("fixed", bytes(range(32)), b"", {})


@given(st.binary(max_size=64))
def test_a_signature_verifies_on_its_own_bytes(data: bytes) -> None:
    verify(KEYS.public_key, data, KEYS.sign(data))


@given(st.binary(min_size=1, max_size=64), st.data())
def test_a_signature_fails_on_any_flipped_bit(data: bytes, draw: st.DataObject) -> None:
    bit = draw.draw(st.integers(0, len(data) * 8 - 1))
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(IntegrityError, match="does not verify"):
        verify(KEYS.public_key, bytes(flipped), KEYS.sign(data))


@pytest.mark.parametrize(("key", "signature"), [(b"", bytes(64)), (bytes(31), bytes(64)), (KEYS.public_key, b"")])
def test_malformed_keys_and_signatures_fail_as_integrity_errors(key: bytes, signature: bytes) -> None:
    with pytest.raises(IntegrityError):
        verify(key, b"data", signature)
