"""A user's own FastAPI deployment heals after a few changed lines; its reply schema stays as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray
from conftest import FAST, wait_for
from ray import serve
from user_app import HealableClassifier, PlainClassifier

import tiny
from orchestrator.actor import actor_name
from orchestrator.settings import NAMESPACE


@pytest.fixture
def own_deployment(cluster: int, tiny_model: Path, tmp_path: Path) -> Iterator[str]:
    folder = str(tiny_model.parent)
    serve.run(PlainClassifier.bind(folder), name="plain", route_prefix="/plain")
    serve.run(HealableClassifier.bind(folder, str(tmp_path / "storage"), FAST), name="own", route_prefix="/own")
    yield f"http://127.0.0.1:{cluster}"
    serve.delete("plain")
    serve.delete("own")
    ray.kill(ray.get_actor(actor_name("users-own"), NAMESPACE), no_restart=True)


def _classify(client: httpx.Client, url: str, images: np.ndarray) -> bytes:
    reply = client.post(url, json=images.tolist(), timeout=30)
    assert reply.status_code == 200, reply.text
    return reply.content


def _state() -> dict[str, Any]:
    return ray.get(ray.get_actor(actor_name("users-own"), NAMESPACE).state.remote(), timeout=10)


def test_users_own_deployment_answers_as_before_and_heals(own_deployment: str) -> None:
    with httpx.Client() as client:
        schema = [client.get(f"{own_deployment}/{name}/openapi.json").json() for name in ("plain", "own")]
        assert schema[0]["paths"] == schema[1]["paths"]
        images, _ = tiny.make(16, seed=5)
        before = _classify(client, own_deployment + "/plain/classify", images)
        assert _classify(client, own_deployment + "/own/classify", images) == before

        wait_for(lambda: _state()["drift"], 90, "the baseline")
        seed = iter(range(1000, 100_000))
        drift, done = False, threading.Event()
        shares: list[float] = []

        def send() -> bool:
            batch, labels = tiny.make(16, next(seed), drift)
            answer = httpx.Response(200, content=_classify(client, own_deployment + "/own/classify", batch)).json()
            assert list(answer) == ["classes"]
            shares.append(float((np.asarray(answer["classes"]) == labels).mean()))
            return done.is_set()

        for _ in range(60):
            send()
        drift = True

        def healed() -> bool:
            send()
            state = _state()
            return state["phase"] == "watching" and state["stable"] != "base"

        wait_for(healed, 240, "the heal")
        wait_for(lambda: (send(), np.mean(shares[-10:]) > 0.9)[1], 60, "the accuracy to come back")
