"""The registry: digests that name content, adapters that cannot be forged, models that every node loads alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from orchestrator.errors import IntegrityError, NotFound, SpecError, StorageError
from orchestrator.keys import ServiceKeys
from orchestrator.models import fetch_model, load_published_spec, publish_model
from orchestrator.registry import list_adapters, load_adapter, read_stable, save_adapter, write_stable
from orchestrator.spec import ModelSpec, load_spec
from orchestrator.storage import Storage, open_storage

KEYS = ServiceKeys("service", bytes(range(32)), b"", {})
OTHER_KEYS = ServiceKeys("service", bytes(range(1, 33)), b"", {})
WEIGHTS = save({"w": np.arange(4, dtype=np.float16)})
CONFIG = {"peft_type": "LORA", "r": 8, "target_modules": {"conv2", "conv1"}}
TENSORS = {
    "conv1.lora_A": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    "bn.num_batches_tracked": np.asarray(7, dtype=np.int64),
    "empty": np.zeros((0, 3), np.float32),
}
MANIFEST = {"base": "b" * 64, "episode": "e1", "score": np.float64(0.5)}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEAL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "store")


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    folder = tmp_path / "model"
    for name in ("tests", ".hidden", "venv", "layers", "odd"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file.py").write_text(name)
    (folder / "odd" / "pyvenv.cfg").write_text("")
    (folder / "net.py").write_text("def build(): ...")
    (folder / "reference.parquet").write_bytes(b"rows")
    (folder / "w.safetensors").write_bytes(WEIGHTS)
    (folder / "model.yaml").write_text(
        "{name: m, factory: 'net:build', weights: w.safetensors, input: {shape: [4], dtype: FP32},"
        " kwargs: {lr: 1.0e-5}, classes: [a, b], reference: reference.parquet}"
    )
    return load_spec(folder / "model.yaml")


# ---------------------------------------------------------------- base models


def test_a_published_model_is_fetched_whole(storage: Storage, spec: ModelSpec, home: Path) -> None:
    digest = publish_model(storage, spec)
    folder = fetch_model(storage, digest)
    assert folder == home / "models" / digest
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert files == [
        *("code/layers/file.py", "code/net.py", "manifest.json", "reference.parquet", "spec.yaml"),
        "weights.safetensors",
    ]
    assert (folder / "weights.safetensors").read_bytes() == WEIGHTS
    published = load_published_spec(folder)
    assert published == replace(spec, weights="weights.safetensors", reference="reference.parquet")
    assert published.folder == folder


def test_the_same_model_has_the_same_digest_wherever_it_lies(storage: Storage, spec: ModelSpec, tmp_path: Path) -> None:
    assert spec.folder is not None
    shutil.copytree(spec.folder, tmp_path / "elsewhere")
    digest = publish_model(storage, spec)
    assert publish_model(storage, load_spec(tmp_path / "elsewhere" / "model.yaml")) == digest
    assert publish_model(open_storage("memory://registry-same"), spec) == digest
    absolute = replace(spec, reference=str(tmp_path / "model" / "reference.parquet"))
    assert publish_model(storage, absolute) == digest
    assert publish_model(storage, load_published_spec(fetch_model(storage, digest))) == digest


@pytest.mark.parametrize("changed", ["net.py", "layers/file.py", "reference.parquet", "w.safetensors", "model.yaml"])
def test_any_change_of_spec_code_weights_or_reference_changes_the_digest(
    storage: Storage, spec: ModelSpec, changed: str
) -> None:
    digest = publish_model(storage, spec)
    assert spec.folder is not None
    path = spec.folder / changed
    if changed == "w.safetensors":
        path.write_bytes(save({"w": np.zeros(4, np.float16)}))
    else:
        path.write_text(path.read_text().replace("a, b", "b, a") + " ")
    again = publish_model(storage, load_spec(spec.folder / "model.yaml"))
    assert again != digest


@pytest.mark.parametrize("ignored", ["tests", ".hidden", "venv", "odd"])
def test_tests_hidden_folders_and_environments_are_not_code(storage: Storage, spec: ModelSpec, ignored: str) -> None:
    digest = publish_model(storage, spec)
    assert spec.folder is not None
    (spec.folder / ignored / "file.py").write_text("changed")
    assert publish_model(storage, spec) == digest


def test_a_factory_of_an_installed_package_brings_no_code(storage: Storage, spec: ModelSpec) -> None:
    digest = publish_model(storage, replace(spec, factory="torchvision.models:resnet18"))
    assert not (fetch_model(storage, digest) / "code").exists()


def test_given_weights_replace_those_of_the_spec(storage: Storage, spec: ModelSpec) -> None:
    other = save({"w": np.ones(4, np.float32)})
    digest = publish_model(storage, spec, other)
    assert (fetch_model(storage, digest) / "weights.safetensors").read_bytes() == other
    none = publish_model(storage, replace(spec, weights=None))
    assert load_published_spec(fetch_model(storage, none)).weights is None


def test_weights_and_reference_may_be_uris(storage: Storage, spec: ModelSpec) -> None:
    source = open_storage("memory://registry-source")
    source.put("w.safetensors", WEIGHTS)
    source.put("r.parquet", b"rows")
    uris = {"weights": "memory://registry-source/w.safetensors", "reference": "memory://registry-source/r.parquet"}
    assert publish_model(storage, replace(spec, **uris)) == publish_model(storage, spec)
    with pytest.raises(SpecError, match="weights must be a readable file"):
        publish_model(storage, replace(spec, weights="memory://registry-source/absent.safetensors"))


def test_a_pickle_is_never_published(storage: Storage, spec: ModelSpec) -> None:
    with pytest.raises(SpecError, match="weights must be safetensors"):
        publish_model(storage, spec, b"PK\x03\x04 a zip as torch.save makes it")
    assert storage.list("") == []


def test_too_much_code_is_refused(storage: Storage, spec: ModelSpec) -> None:
    assert spec.folder is not None
    for n in range(200):
        (spec.folder / f"m{n}.py").write_text("")
    with pytest.raises(SpecError, match="at most 200 Python files"):
        publish_model(storage, spec)


def test_a_publication_that_broke_off_is_completed(
    storage: Storage, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = storage.create

    def broken(key: str, data: bytes) -> None:
        if key.endswith("manifest.json"):
            raise StorageError("connection lost")
        create(key, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "create", broken)
        with pytest.raises(StorageError, match="connection lost"):
            publish_model(storage, spec)
    digest = storage.list("models/")[0].split("/")[1]
    with pytest.raises(NotFound, match="must be published"):
        fetch_model(storage, digest)
    assert publish_model(storage, spec) == digest
    assert fetch_model(storage, digest).is_dir()


def test_processes_that_fetch_at_once_all_get_the_whole_model(storage: Storage, spec: ModelSpec, home: Path) -> None:
    digest = publish_model(storage, spec)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: fetch_model(storage, digest), range(8))) == {home / "models" / digest}
    assert [p.name for p in (home / "models").iterdir()] == [digest]


def _flip(path: Path, at: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["code/net.py", "weights.safetensors", "reference.parquet", "spec.yaml"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_changed_file_is_not_loaded(storage: Storage, spec: ModelSpec, home: Path, name: str, cached: bool) -> None:
    digest = publish_model(storage, spec)
    path = fetch_model(storage, digest) / name
    if not cached:
        shutil.rmtree(home / "models")
        path = storage.local_path(f"models/{digest}/{name}") or path
    if name == "spec.yaml":
        path.write_text(path.read_text().replace("name: m", "name: n"))
    else:
        _flip(path)
    with pytest.raises(IntegrityError, match=f"must hash to {digest}"):
        fetch_model(storage, digest)
    assert cached or list((home / "models").iterdir()) == []


def test_code_planted_beside_a_rewritten_manifest_is_not_loaded(storage: Storage, spec: ModelSpec) -> None:
    digest = publish_model(storage, spec)
    key = f"models/{digest}/manifest.json"
    manifest = json.loads(storage.get(key))
    for planted in ("code/planted.py", "../planted.py", "/planted.py"):
        storage.put(key, json.dumps({**manifest, "files": {**manifest["files"], planted: "0" * 64}}).encode())
        storage.put(f"models/{digest}/code/planted.py", b"evil")
        with pytest.raises(IntegrityError):
            fetch_model(storage, digest)


@pytest.mark.parametrize("digest", ["", "base", "../../etc", "A" * 64, "a" * 63])
def test_what_is_no_digest_is_refused(storage: Storage, digest: str) -> None:
    with pytest.raises(IntegrityError, match="64 hex digits"):
        fetch_model(storage, digest)
    with pytest.raises(IntegrityError, match="64 hex digits"):
        load_adapter(storage, digest)


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("keys", [None, KEYS])
def test_a_saved_adapter_is_loaded_exactly(storage: Storage, keys: ServiceKeys | None) -> None:
    digest = save_adapter(storage, CONFIG, TENSORS, MANIFEST, keys)
    config, tensors, manifest = load_adapter(storage, digest, KEYS.public_key if keys else None)
    assert config == {"peft_type": "LORA", "r": 8, "target_modules": ["conv1", "conv2"]}
    assert sorted(tensors) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(tensors[name], tensor)
        assert (tensors[name].dtype, tensors[name].shape) == (tensor.dtype, tensor.shape)
    assert (manifest["digest"], manifest["base"], manifest["score"]) == (digest, "b" * 64, 0.5)
    assert [k.split("/")[2] for k in storage.list(f"adapters/{digest}/")] == [
        *("adapter_config.json", "adapter_model.safetensors", "manifest.json"),
        *(["manifest.sig"] if keys else []),
    ]


def test_the_digest_covers_config_and_tensors_but_not_the_manifest(storage: Storage) -> None:
    digest = save_adapter(storage, CONFIG, TENSORS, MANIFEST, KEYS)
    assert save_adapter(storage, CONFIG, TENSORS, {"base": "other"}, KEYS) == digest
    assert load_adapter(storage, digest, KEYS.public_key)[2]["base"] == "b" * 64
    assert save_adapter(storage, {**CONFIG, "r": 4}, TENSORS, MANIFEST, KEYS) != digest
    assert save_adapter(storage, CONFIG, {**TENSORS, "empty": np.ones(1)}, MANIFEST, KEYS) != digest


def test_an_unsigned_adapter_can_be_signed_by_saving_it_again(storage: Storage) -> None:
    digest = save_adapter(storage, CONFIG, TENSORS, MANIFEST, None)
    with pytest.raises(IntegrityError, match="must be signed"):
        load_adapter(storage, digest, KEYS.public_key)
    save_adapter(storage, CONFIG, TENSORS, MANIFEST, KEYS)
    load_adapter(storage, digest, KEYS.public_key)


def test_an_adapter_without_its_manifest_was_never_saved(storage: Storage) -> None:
    digest = save_adapter(storage, CONFIG, TENSORS, MANIFEST, KEYS)
    storage.delete(f"adapters/{digest}/manifest.json")
    with pytest.raises(NotFound, match=f"adapter {digest} must be on"):
        load_adapter(storage, digest)
    assert list_adapters(storage) == []
    save_adapter(storage, CONFIG, TENSORS, MANIFEST, KEYS)
    load_adapter(storage, digest, KEYS.public_key)


def _rewritten_manifest(storage: Any, folder: str) -> None:
    manifest = json.loads(storage.get(f"{folder}/manifest.json"))
    storage.put(f"{folder}/manifest.json", json.dumps({**manifest, "base": "c" * 64}).encode())


def _resigned_manifest(storage: Any, folder: str) -> None:
    manifest = json.loads(storage.get(f"{folder}/manifest.json"))
    data = json.dumps({**manifest, "public_key": OTHER_KEYS.public_key.hex()}).encode()
    storage.put(f"{folder}/manifest.json", data)
    storage.put(f"{folder}/manifest.sig", OTHER_KEYS.sign(data))


def _other_tensors(storage: Any, folder: str) -> None:
    tensors = load(storage.get(f"{folder}/adapter_model.safetensors"))
    storage.put(f"{folder}/adapter_model.safetensors", save({name: np.asarray(t + 1) for name, t in tensors.items()}))


def _other_config(storage: Any, folder: str) -> None:
    data = storage.get(f"{folder}/adapter_config.json")
    storage.put(f"{folder}/adapter_config.json", data.replace(b"8", b"9"))


def _cut_tensors(storage: Any, folder: str) -> None:
    storage.put(f"{folder}/adapter_model.safetensors", storage.get(f"{folder}/adapter_model.safetensors")[:-1])


def _no_signature(storage: Any, folder: str) -> None:
    storage.delete(f"{folder}/manifest.sig")


def _swapped_adapter(storage: Any, folder: str) -> None:
    other = save_adapter(storage, {"r": 1}, TENSORS, MANIFEST, KEYS)
    for name in ("adapter_config.json", "adapter_model.safetensors", "manifest.json", "manifest.sig"):
        storage.put(f"{folder}/{name}", storage.get(f"adapters/{other}/{name}"))


@pytest.mark.parametrize(
    "tamper",
    [
        *(_rewritten_manifest, _resigned_manifest, _other_tensors, _other_config, _cut_tensors, _no_signature),
        _swapped_adapter,
    ],
)
def test_a_tampered_adapter_is_not_loaded(storage: Storage, tamper: Callable[[Any, str], None]) -> None:
    digest = save_adapter(storage, CONFIG, TENSORS, MANIFEST, KEYS)
    tamper(storage, f"adapters/{digest}")
    with pytest.raises(IntegrityError):
        load_adapter(storage, digest, KEYS.public_key)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_flipped_bit_of_an_adapter_is_found(draw: st.DataObject) -> None:
    storage = open_storage("memory://registry-flips")
    digest = save_adapter(storage, CONFIG, TENSORS, MANIFEST, KEYS)
    key = draw.draw(st.sampled_from(storage.list(f"adapters/{digest}/")))
    good = storage.get(key)
    bit = draw.draw(st.integers(0, len(good) * 8 - 1))
    data = bytearray(good)
    data[bit // 8] ^= 1 << (bit % 8)
    storage.put(key, bytes(data))
    with pytest.raises(IntegrityError):
        load_adapter(storage, digest, KEYS.public_key)
    storage.put(key, good)


def test_adapters_are_listed_by_base_and_a_broken_one_is_logged(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    first = save_adapter(storage, {"r": 1}, TENSORS, {"base": "x"}, KEYS)
    second = save_adapter(storage, {"r": 2}, TENSORS, {"base": "y"}, None)
    broken = save_adapter(storage, {"r": 3}, TENSORS, {"base": "x"}, KEYS)
    storage.put(f"adapters/{broken}/manifest.json", b"{")
    assert {m["digest"] for m in list_adapters(storage)} == {first, second}
    assert [m["digest"] for m in list_adapters(storage, base="x")] == [first]
    assert f"adapter {broken} is not listed" in caplog.text


# ---------------------------------------------------------------- the stable generation


def test_the_stable_generation_is_replaced_and_read_back(storage: Storage) -> None:
    assert read_stable(storage) is None
    write_stable(storage, "b" * 64, 1, "a" * 64)
    write_stable(storage, "b" * 64, 2, "base")
    assert read_stable(storage) == {"schema_version": 1, "base": "b" * 64, "generation": 2, "digest": "base"}


@pytest.mark.parametrize("data", [b"", b"[]", b'{"base": "b", "generation": "1", "digest": "base"}', b"{}"])
def test_a_damaged_stable_record_is_not_served_from(storage: Storage, data: bytes) -> None:
    storage.put("stable.json", data)
    with pytest.raises(IntegrityError, match=r"stable\.json must"):
        read_stable(storage)
