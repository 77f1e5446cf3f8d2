"""Versions are swapped without one mixed batch, and never onto another base."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from small_service import SHIFT, build, images, make_adapter

from orchestrator.errors import AdapterError, IntegrityError, NotFound, RequestError
from orchestrator.messages import BASE
from orchestrator.storage import Storage, open_storage
from serve_app.twins import Twins


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path))


def twins(storage: Storage, base: str = "b1") -> Twins:
    return Twins(build(), storage, base)


def test_base_is_served_first_and_bit_identical_after_a_swap_and_back(storage: Storage) -> None:
    x = torch.from_numpy(images(4))
    served = twins(storage)
    with torch.inference_mode():
        before = served.current.module(x)
        digest = make_adapter(storage, "b1", 2)
        served.prepare(digest)
        assert served.activate(1, digest)
        assert (served.current.module(x)[:, 2] > SHIFT / 2).all()
        assert served.activate(2, BASE)
        assert torch.equal(served.current.module(x), before)
    assert (served.current.generation, served.current.digest) == (2, BASE)


def test_older_generation_is_ignored(storage: Storage) -> None:
    served = twins(storage)
    digest = make_adapter(storage, "b1", 1)
    served.prepare(digest)
    assert served.activate(5, digest)
    assert not served.activate(4, BASE)
    assert served.current.digest == digest


def test_adapter_of_another_base_is_refused_and_nothing_changes(storage: Storage) -> None:
    served = twins(storage)
    with pytest.raises(AdapterError, match="must be made for base b1; it is for b2"):
        served.prepare(make_adapter(storage, "b2", 1))
    assert served.versions == (BASE,)


def test_adapter_with_a_changed_byte_or_none_at_all_is_refused(storage: Storage) -> None:
    served = twins(storage)
    digest = make_adapter(storage, "b1", 1)
    key = f"adapters/{digest}/adapter_model.safetensors"
    data = bytearray(storage.get(key))
    data[-1] ^= 1
    storage.put(key, bytes(data))
    with pytest.raises(IntegrityError):
        served.prepare(digest)
    with pytest.raises(NotFound):
        served.prepare("0" * 64)


def test_twin_is_warmed_once_before_it_is_listed(storage: Storage) -> None:
    seen: list[tuple[str, ...]] = []
    served = Twins(build(), storage, "b1", warm=lambda module: seen.append(served.versions))
    digest = make_adapter(storage, "b1", 1)
    served.prepare(digest)
    served.prepare(digest)
    assert seen == [(BASE,)]
    assert served.versions == (BASE, digest)


def test_retained_versions_stay_and_others_are_freed(storage: Storage) -> None:
    served = twins(storage)
    first, second, third = (make_adapter(storage, "b1", label) for label in range(3))
    for digest in (first, second, third):
        served.prepare(digest)
    served.activate(1, first)
    served.retain((BASE, second))
    assert set(served.versions) == {BASE, first, second}
    assert served.get(second).digest == second
    with pytest.raises(RequestError) as caught:
        served.get(third)
    assert caught.value.status == 404


def test_no_batch_is_mixed_while_versions_are_swapped_under_load(storage: Storage) -> None:
    served = twins(storage)
    labels = {make_adapter(storage, "b1", label): label for label in (1, 2, 3)}
    x = torch.from_numpy(images(16))
    with torch.inference_mode():
        base_logits = served.current.module(x).numpy()
    stop, mixed, batches = threading.Event(), [], [0, 0, 0]

    def read(place: int) -> None:
        while not stop.is_set():
            now = served.current
            with torch.inference_mode():
                moved = now.module(x).numpy() - base_logits
            want = np.zeros((16, 4))
            if now.digest != BASE:
                want[:, labels[now.digest]] = SHIFT
            batches[place] += 1
            if not np.allclose(moved, want, atol=1e-3):
                mixed.append(now.digest)

    threads = [threading.Thread(target=read, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for generation in range(1, 121):
        digest = [*labels, BASE][generation % 4]
        served.prepare(digest)
        served.activate(generation, digest)
        served.retain((digest,))
    stop.set()
    for thread in threads:
        thread.join()
    assert mixed == []
    assert min(batches) > 0
    assert served.current.generation == 120
