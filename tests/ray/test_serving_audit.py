"""The serving contract as a hostile or careless user tries it, on a running service; it goes on serving after each."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import Service, wait_for

import tiny
from orchestrator.keys import load_keys
from orchestrator.settings import MAX_SEGMENTS
from orchestrator.storage import open_storage
from serve_app.tokens import EXPIRY_S, mint

IMAGE, _ = tiny.make(1, seed=0)
SIZE = IMAGE.size


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=60) as found:
        yield found


def binary(raw: bytes, *, shape: tuple[int, ...] = IMAGE.shape, declared: int | None = None, **extra: Any) -> Any:
    """Content and headers of a request in the binary form; `declared` may lie about the tensor's bytes."""
    size = len(raw) if declared is None else declared
    tensor = {"name": "input", "shape": list(shape), "datatype": "UINT8", "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [tensor], **extra}).encode()
    return {"content": head + raw, "headers": {"Inference-Header-Content-Length": str(len(head))}}


def as_json(**changes: Any) -> dict[str, Any]:
    tensor = {"name": "input", "shape": [1, 16, 16, 3], "datatype": "UINT8", "data": IMAGE.ravel().tolist()}
    return {"inputs": [{**tensor, **changes}]}


def _lying(length: str, raw: bytes = IMAGE.tobytes()) -> dict[str, Any]:
    request = binary(raw)
    return {**request, "headers": {"Inference-Header-Content-Length": length}}


def _shared_memory() -> dict[str, Any]:
    request = as_json(parameters={"shared_memory_region": "r", "shared_memory_byte_size": SIZE})
    del request["inputs"][0]["data"]
    return request


HOSTILE: dict[str, tuple[dict[str, Any], int, str]] = {
    "no rows": (binary(b"", shape=(0, 16, 16, 3)), 400, "rows"),
    "ten thousand rows": (binary(b"\0" * (10_000 * SIZE), shape=(10_000, 16, 16, 3)), 400, "4096 rows"),
    "a negative number of rows": (binary(IMAGE.tobytes(), shape=(-1, 16, 16, 3)), 400, "rows"),
    "an overflowing number of rows": (binary(IMAGE.tobytes(), shape=(2**70, 16, 16, 3)), 400, "rows"),
    "another rank": (binary(IMAGE.tobytes(), shape=(16, 16, 3)), 400, "[N, 16, 16, 3]"),
    "channels first": (binary(IMAGE.tobytes(), shape=(1, 3, 16, 16)), 400, "[N, 16, 16, 3]"),
    "truncated binary": (binary(IMAGE.tobytes()[:-1], declared=SIZE), 400, "binary_data_size"),
    "bytes too many": (binary(IMAGE.tobytes() + b"\0", declared=SIZE), 400, "binary_data_size"),
    "a size that fits neither": (binary(IMAGE.tobytes()[:-1]), 400, f"{SIZE} bytes"),
    "a negative size": (binary(IMAGE.tobytes(), declared=-SIZE), 400, "binary_data_size"),
    "a header longer than the body": (_lying("99999"), 400, "Inference-Header-Content-Length"),
    "a negative header": (_lying("-1"), 400, "Inference-Header-Content-Length"),
    "a header that cuts the JSON": (_lying("20"), 400, "JSON"),
    "binary without the header": ({"content": binary(IMAGE.tobytes())["content"]}, 400, "JSON"),
    "data twice": (binary(IMAGE.tobytes(), inputs=[as_json()["inputs"][0]] * 2), 400, "one tensor"),
    "another name": ({"json": as_json(name="x")}, 400, "'x'"),
    "another type": ({"json": as_json(datatype="FP32")}, 400, "UINT8"),
    "no type": ({"json": as_json(datatype=None)}, 400, "datatype"),
    "NaN": ({"content": json.dumps(as_json(data=[float("nan")] * SIZE))}, 400, "numbers"),
    "numbers out of range": ({"json": as_json(data=[256] * SIZE)}, 400, "range"),
    "null": ({"json": as_json(data=[None] * SIZE)}, 400, "numbers"),
    "ragged data": ({"json": as_json(data=[[[[1, 2, 3]] * 16] * 15 + [[[1, 2, 3]] * 15]])}, 400, "nested"),
    "no inputs": ({"json": {}}, 400, "inputs"),
    "a list": ({"json": []}, 400, "object"),
    "nothing": ({"content": b""}, 400, "JSON"),
    "deep nesting": ({"content": b"[" * 100_000}, 400, "JSON"),
    "shared memory": ({"json": _shared_memory()}, 400, "shared memory"),
    "an output that is not there": ({"json": as_json() | {"outputs": [{"name": "y"}]}}, 400, "'y'"),
    "a segment that is no text": ({"json": as_json() | {"parameters": {"segment": 3}}}, 400, "segment"),
    "a segment without end": ({"json": as_json() | {"parameters": {"segment": "s" * 65}}}, 400, "64 bytes"),
    "an id with control characters": ({"json": as_json() | {"id": "a\nb"}}, 400, "id"),
    "a body too large": ({"content": b" " * ((64 << 20) + 1)}, 413, "bytes"),
    "a bomb": (
        {"content": gzip.compress(b" " * ((64 << 20) + 1)), "headers": {"Content-Encoding": "gzip"}},
        413,
        "decompression",
    ),
    "a broken stream": ({"content": b"x", "headers": {"Content-Encoding": "gzip"}}, 400, "gzip"),
    "unmonitored by anybody": ({"json": as_json() | {"parameters": {"monitor": False}}}, 401, "operator"),
}


def test_every_hostile_body_gets_one_line_and_the_replicas_go_on(service: Service, client: httpx.Client) -> None:
    replicas = wait_for(lambda: _replicas(service), 60, "two reporting replicas")
    for name, (request, status, word) in HOSTILE.items():
        for path in ("", "/versions/base"):
            reply = client.post(f"/v2/models/{service.model}{path}/infer", **request)
            assert reply.status_code == status, (name, reply.status_code, reply.text[:300])
            assert list(reply.json()) == ["error"], name
            assert word in reply.json()["error"], (name, reply.json())
            assert len(reply.json()["error"]) < 500, name
        answer = service.infer(client, IMAGE)
        assert len(answer["outputs"]) == 3, name
    assert _replicas(service) == replicas, "a replica was lost"


def _replicas(service: Service) -> set[str] | None:
    """The two live replicas, None while there are not two."""
    live = {r["replica"] for r in service.state()["replicas"] if r["live"]}
    return live if len(live) == 2 else None


def test_every_path_answers_below_the_route_prefix_and_unknown_ones_say_so(
    service: Service, client: httpx.Client
) -> None:
    model = f"/v2/models/{service.model}"
    for path in ("/v2", "/v2/health/live", "/v2/health/ready", model, f"{model}/ready", f"{model}/versions/base"):
        for slash in ("", "/"):
            assert client.get(path + slash).status_code == 200, path + slash
    for path in (f"{model}/infer", f"{model}/versions/base/infer"):
        for slash in ("", "/"):
            reply = client.post(path + slash, **binary(IMAGE.tobytes(), parameters={"binary_data_output": True}))
            assert reply.status_code == 200
            length = int(reply.headers["Inference-Header-Content-Length"])
            head = json.loads(reply.content[:length])
            assert [o["name"] for o in head["outputs"]] == ["logits", "probabilities", "label"]
            logits = np.frombuffer(reply.content[length : length + 16], "<f4")
            assert int(logits.argmax()) == int(np.frombuffer(reply.content[-8:], "<i8")[0])
    unknown = f"{model}/versions/{'0' * 64}"
    for method, path, status in (
        ("GET", "/v2/models/other", 404),
        ("GET", unknown, 404),
        ("GET", f"{unknown}/ready", 404),
        ("POST", f"{unknown}/infer", 404),
        ("GET", f"{model}/infer", 405),
        ("DELETE", model, 405),
        ("GET", "/v2/repository/index", 404),
        ("POST", "/healing/explode", 404),
    ):
        reply = client.request(method, path)
        assert reply.status_code == status, (method, path, reply.text)
        assert list(reply.json()) == ["error"]


def test_roles_are_kept_apart(service: Service, client: httpx.Client) -> None:
    labels = f"/v2/models/{service.model}/feedback"
    asked: list[tuple[str, str, Any, str]] = [
        ("GET", "/healing", None, "viewer"),
        ("GET", "/healing/episodes", None, "viewer"),
        ("POST", labels, {"labels": []}, "labeller"),
    ]
    order = ["viewer", "labeller", "operator"]
    for method, path, content, least in asked:
        assert client.request(method, path, json=content).status_code == 401
        assert client.request(method, path, json=content, headers={"Authorization": "Bearer x"}).status_code == 401
        for role in order:
            status = 200 if order.index(role) >= order.index(least) else 403
            reply = client.request(method, path, json=content, headers=service.auth(role))
            assert reply.status_code == status, (path, role, reply.text)
    for command in ("start", "approve", "pause", "resume", "promote", "abort", "rollback", "mode"):
        assert client.post(f"/healing/{command}", json={"reason": "r"}).status_code == 401
        for role in ("viewer", "labeller"):
            reply = client.post(f"/healing/{command}", json={"reason": "r"}, headers=service.auth(role))
            assert reply.status_code == 403
        reply = client.post(f"/healing/{command}", json={}, headers=service.auth("operator"))
        assert reply.status_code == 400
        assert "reason" in reply.json()["error"]


def test_feedback_counts_every_outcome(service: Service, client: httpx.Client) -> None:
    def token() -> str:
        return str(service.infer(client, IMAGE)["parameters"]["feedback_token"])

    genuine = wait_for(token, 60, "a feedback token")
    key = load_keys(service.name).feedback_key
    old = mint(key, "old", "base", time.time() - EXPIRY_S - 60, [1])
    forged = mint(b"k" * 32, "r", "base", time.time(), [1])
    items = [
        {"token": genuine, "index": 0, "label": 1},
        {"token": genuine, "index": 0, "label": 1},
        {"token": genuine, "index": 0, "label": 2},
        {"token": genuine, "index": 1, "label": 2},
        {"token": old, "index": 0, "label": 1},
        {"token": forged, "index": 0, "label": 1},
        {"token": genuine[:-2], "index": 0, "label": 1},
    ]
    path = f"/v2/models/{service.model}/feedback"
    reply = client.post(path, json={"labels": items}, headers=service.auth("labeller"))
    assert reply.json() == {"accepted": 2, "unknown": 3, "expired": 1, "conflicting": 1}
    for label in (-1, 4, "1", None, True, 1.0):
        bad = {"labels": [{"token": genuine, "index": 0, "label": label}]}
        reply = client.post(path, json=bad, headers=service.auth("labeller"))
        assert reply.status_code == 400, (label, reply.text)
        assert "label" in reply.json()["error"]


def _stored(service: Service) -> pa.Table | None:
    storage = open_storage(service.storage)
    keys = [key for key in storage.list("traffic/base=") if key.endswith(".parquet")]
    tables = [pq.read_table(io.BytesIO(storage.get(key))).select(["id", "segment"]) for key in keys]
    return pa.concat_tables(tables) if tables else None


def test_unmonitored_requests_are_not_stored_and_segments_are_bounded(service: Service, client: httpx.Client) -> None:
    path = f"/v2/models/{service.model}/infer"
    for place in range(3 * MAX_SEGMENTS):
        extra = {"id": f"seg{place}", "parameters": {"segment": f"camera {place}"}}
        assert client.post(path, json=as_json() | extra).status_code == 200
    for place in range(8):
        extra = {"id": f"hidden{place}", "parameters": {"monitor": False}}
        assert client.post(path, json=as_json() | extra, headers=service.auth("operator")).status_code == 200
    for place in range(8):  # after the hidden ones, on both replicas
        assert client.post(path, json=as_json() | {"id": f"last{place}"}).status_code == 200

    def ids() -> list[str]:
        found = _stored(service)
        return [] if found is None else found["id"].to_pylist()

    wait_for(lambda: len({i.split("~")[0] for i in ids() if i.startswith("last")}) == 8, 60, "the last samples")
    assert not [i for i in ids() if i.startswith("hidden")]
    table = _stored(service)
    assert table is not None
    segments = {s for s in table["segment"].to_pylist() if s.startswith("camera") or s == "other"}
    assert "other" in segments
    assert len(segments) <= 2 * MAX_SEGMENTS + 1  # each of the two replicas keeps its own first ones


def test_events_end_by_themselves_and_resume_after_the_last_one_seen(service: Service, client: httpx.Client) -> None:
    def read(after: int | None) -> list[int]:
        headers = service.auth("viewer") | ({} if after is None else {"Last-Event-ID": str(after)})
        with client.stream("GET", "/healing/events", headers=headers) as reply:
            assert reply.status_code == 200
            lines = list(reply.iter_lines())  # until the service closes the stream
        assert lines[0] == "retry: 1000"
        return [int(line[3:]) for line in lines if line.startswith("id:")]

    first = read(None)
    assert first == sorted(set(first))
    assert all(number > first[-1] for number in read(first[-1]))
    reply = client.get("/healing/events", headers=service.auth("viewer") | {"Last-Event-ID": "-3"})
    assert reply.status_code == 400


BOUND = """import os
from orchestrator.launch import AppArgs, app
bound = app(AppArgs(model=os.environ["BOUND_MODEL"], storage=os.environ["BOUND_STORAGE"], service="bound"))
"""


def test_bound_application_is_built_to_a_file_and_deployed_from_it(
    start_service: Callable[..., Service],
    cluster: int,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`serve build` as a user runs it; the file goes to Serve by the client behind `serve deploy`."""
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    (tmp_path / "bound_app.py").write_text(BOUND)
    environment = {"BOUND_MODEL": str(tiny_model), "BOUND_STORAGE": str(tmp_path / "records")}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command = [str(Path(sys.executable).with_name("serve")), "build", "--app-dir", str(tmp_path), "bound_app:bound"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "config.yaml")], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    (application,) = config["applications"]
    assert application["import_path"] == "bound_app:bound"
    assert [d["name"] for d in application["deployments"]] == ["bound"]
    application.update(name="bound", route_prefix="/bound", runtime_env={"env_vars": {**environment}})
    application["runtime_env"]["env_vars"]["PYTHONPATH"] = f"{tmp_path}:{Path(__file__).parent}"
    client = _get_global_client()
    client.deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))
    try:
        url = f"http://127.0.0.1:{cluster}/bound/v2/models/stripes/infer"
        with httpx.Client(timeout=30) as http:
            reply = wait_for(lambda: _ok(http.post(url, json=as_json())), 240, "the deployed application")
        assert reply.json()["model_version"] == "base"
    finally:
        serve.delete("bound")


def _ok(reply: httpx.Response) -> httpx.Response | None:
    return reply if reply.status_code == 200 else None
