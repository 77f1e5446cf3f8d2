"""One private Ray and Serve per test session; services are started and removed by the tests."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import tiny


@dataclass(frozen=True)
class Service:
    """A running service: where it answers and who may do what."""

    url: str
    model: str
    name: str
    tokens: dict[str, str]
    storage: str
    folder: Path

    def auth(self, role: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.tokens[role]}"}

    def state(self) -> dict[str, Any]:
        """The orchestrator's state; it may be away for a while (503) when a test killed it."""

        def ask() -> dict[str, Any] | None:
            reply = httpx.get(f"{self.url}/healing", headers=self.auth("viewer"), timeout=10)
            if reply.status_code == 503:
                return None
            reply.raise_for_status()
            return reply.json()

        return wait_for(ask, 30, "the orchestrator to answer")

    def infer(self, client: httpx.Client, images: np.ndarray, version: str | None = None) -> dict[str, Any]:
        """One request by the binary protocol's JSON part; raises on any status but 200."""
        path = f"/v2/models/{self.model}" + (f"/versions/{version}" if version else "") + "/infer"
        body = {
            "inputs": [
                {"name": "input", "shape": list(images.shape), "datatype": "UINT8", "data": images.reshape(-1).tolist()}
            ]
        }
        reply = client.post(self.url + path, json=body, timeout=30)
        if reply.status_code != 200:
            raise AssertionError(f"{reply.status_code}: {reply.text[:300]}")
        return reply.json()


def wait_for(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Poll an external state until it is truthy; fails naming what was waited for."""
    pause = threading.Event()
    last: Any = None
    for _ in range(int(timeout_s / 0.25)):
        last = condition()
        if last:
            return last
        pause.wait(0.25)
    raise AssertionError(f"waited {timeout_s} s for {what}; last seen {last!r}")


@pytest.fixture(scope="session")
def cluster() -> Iterator[int]:
    """A Ray with Serve's proxy on a free loopback port; yields the port."""
    os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "60"  # two busy cores start processes slowly
    import ray
    from ray import serve

    from orchestrator.launch import free_port

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        _temp_dir=tempfile.mkdtemp(prefix="heal-", dir="/tmp"),
        log_to_driver=os.environ.get("HEAL_TEST_LOGS") == "1",
        runtime_env={
            "env_vars": {
                "HEAL_HOME": os.environ["HEAL_HOME"],
                "OMP_NUM_THREADS": "1",
                # Workers import `user_app`, and the product from this checkout whatever is installed.
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])]),
            }
        },
    )
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield port
    serve.shutdown()
    ray.shutdown()


FAST = {
    "mode": "auto",
    "num_trials": 3,
    "trial_epochs": 1,
    "buffer_instances": 600,
    "buffer_wait_s": 5.0,
    "bake_s": 1.0,
    "canary_instances": 32,
    "cooldown_s": 5.0,
}


@contextmanager
def _services(port: int, spec: Path, records: Path) -> Iterator[Callable[..., Service]]:
    """A function that starts a service of the tiny model; what it started is removed at the end."""
    import ray
    from ray import serve

    from orchestrator.actor import actor_name
    from orchestrator.keys import load_keys
    from orchestrator.launch import AppArgs, app
    from orchestrator.settings import NAMESPACE

    started: list[str] = []

    def start(name: str, **args: Any) -> Service:
        storage = args.pop("storage", str(records / name))
        values = {"model": str(spec), "storage": storage, "service": name, "replicas": 2, **FAST, **args}
        serve.run(app(AppArgs(**values)), name=name, route_prefix=f"/{name}")
        started.append(name)
        tokens = load_keys(name).tokens
        return Service(f"http://127.0.0.1:{port}/{name}", "stripes", name, tokens, storage, spec.parent)

    yield start
    for name in started:
        serve.delete(name)
        try:
            ray.kill(ray.get_actor(actor_name(name), NAMESPACE), no_restart=True)
        except ValueError:
            continue  # a test removed it


@pytest.fixture
def start_service(cluster: int, tiny_model: Path, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """A function that starts a service of the tiny model; what it started is removed after the test."""
    with _services(cluster, tiny_model, tmp_path) as start:
        yield start


@pytest.fixture(scope="session")
def service(cluster: int, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One running service in mode auto for all tests that only ask it things and change nothing."""
    with _services(cluster, tiny_model, tmp_path_factory.mktemp("records")) as start:
        yield start("stripes-service")


class Traffic(threading.Thread):
    """Requests that never stop until told to; failures and answers are kept."""

    def __init__(self, service: Service, rows: int = 8, seed: int = 100) -> None:
        super().__init__(daemon=True)
        self.service, self.rows, self.seed = service, rows, seed
        self.drift = False
        self.sent = 0
        self.failures: list[str] = []
        self.answers: list[tuple[int, str, bool, float]] = []  # generation, version, drift, share right
        self._stop_asked = threading.Event()

    def run(self) -> None:
        with httpx.Client() as client:
            while not self._stop_asked.wait(0.03):
                self.seed += 1
                drift = self.drift
                images, labels = tiny.make(self.rows, self.seed, drift)
                self.sent += 1
                try:
                    reply = self.service.infer(client, images)
                except (AssertionError, httpx.HTTPError) as error:
                    self.failures.append(repr(error))
                    continue
                predicted = next(o for o in reply["outputs"] if o["name"] == "label")["data"]
                share = float((np.asarray(predicted) == labels).mean())
                self.answers.append((reply["parameters"]["generation"], reply["model_version"], drift, share))

    def stop(self) -> None:
        self._stop_asked.set()
        self.join(timeout=30)

    def accuracy(self, last: int = 30) -> float:
        return float(np.mean([share for *_, share in self.answers[-last:]]))


@pytest.fixture
def traffic() -> Iterator[Callable[[Service], Traffic]]:
    """A function that starts a request stream; it is stopped afterwards."""
    streams: list[Traffic] = []

    def start(service: Service) -> Traffic:
        stream = Traffic(service)
        stream.start()
        streams.append(stream)
        return stream

    yield start
    for stream in streams:
        stream.stop()
