"""Every route of the HTTP contract, on a real `Healable` without Ray."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from small_service import Memory, healable, images

from orchestrator.errors import RequestError, ServiceError
from orchestrator.messages import Command
from serve_app import control
from serve_app.forward import Answer, Ask
from serve_app.healable import Healable
from serve_app.ingress import build
from serve_app.protocol import Contract
from serve_app.tokens import Roles

EVENTS = [{"seq": n, "time_s": 1.0, "event": "started", "body": {}} for n in range(3)]


class Model:
    """A replica without Serve; `orchestrator` answers what the actor would."""

    def __init__(self, model: Healable) -> None:
        self.model = model
        self.contract = Contract("small", (2, 3), "UINT8", 4, max_rows=64, max_body_bytes=20_000)
        self.roles = Roles({hashlib.sha256(t.encode()).hexdigest(): t for t in ("viewer", "labeller", "operator")})
        self.commands: list[Command] = []
        self.away = False
        self.seen: list[Ask] = []

    def versions(self) -> tuple[str, ...]:
        return self.model.versions

    async def infer(self, ask: Ask) -> Answer:
        self.seen.append(ask)
        return self.model.infer_many([ask])[0]

    def token(self, answer: Answer) -> str:
        return self.model.token(answer)

    def feedback(self, items: list[tuple[str, int, int]]) -> dict[str, int]:
        return self.model.feedback(items)

    async def control(self, method: str, *args: Any) -> Any:
        if self.away:
            raise ServiceError("the orchestrator is away")
        if method == "command":
            self.commands.append(args[0])
            if args[0].name == "promote":
                raise RequestError("nothing to promote", 409)
            return {"command_id": args[0].command_id, "accepted": True}
        if method == "events":
            return [e for e in EVENTS if e["seq"] > args[0]]
        if method == "episode":
            return {"id": "e1"} if args[0] == "e1" else None
        return {"state": {"phase": "watching"}, "episodes": [{"id": "e1"}]}[method]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    inner = healable(tmp_path_factory.mktemp("small"), Memory())
    yield Model(inner)
    inner.close()


@pytest.fixture
def client(model: Model) -> Iterator[TestClient]:
    model.commands.clear()
    model.away = False
    with TestClient(build(lambda: model), raise_server_exceptions=False, follow_redirects=False) as found:
        yield found


def auth(role: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {role}"}


def request(values: np.ndarray, **extra: Any) -> dict[str, Any]:
    tensor = {"name": "input", "shape": list(values.shape), "datatype": "UINT8", "data": values.ravel().tolist()}
    return {"inputs": [tensor], **extra}


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize(
    ("path", "want"),
    [
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/v2/models/small/ready", {"name": "small", "ready": True}),
        ("/v2/models/small/versions/base/ready", {"name": "small", "ready": True}),
    ],
)
def test_health_answers_with_and_without_trailing_slash(client: TestClient, path: str, slash: str, want: Any) -> None:
    reply = client.get(path + slash)
    assert (reply.status_code, reply.json()) == (200, want)


def test_metadata_names_the_tensors_and_the_versions(client: TestClient) -> None:
    assert client.get("/v2/").json()["extensions"] == ["binary_tensor_data"]
    found = client.get("/v2/models/small").json()
    assert found["versions"] == ["base"]
    assert found["inputs"] == [{"name": "input", "datatype": "UINT8", "shape": [-1, 2, 3]}]
    assert [o["name"] for o in found["outputs"]] == ["logits", "probabilities", "label"]


@pytest.mark.parametrize("path", ["/v2/models/small/infer", "/v2/models/small/versions/base/infer/"])
def test_inference_says_who_answered(client: TestClient, path: str) -> None:
    reply = client.post(path, json=request(images(2), id="mine")).json()
    assert (reply["model_name"], reply["model_version"], reply["id"]) == ("small", "base", "mine")
    assert reply["parameters"]["generation"] == 0
    assert reply["parameters"]["feedback_token"]


def test_reply_without_an_id_gets_one_and_equal_ids_name_different_instances(client: TestClient, model: Model) -> None:
    assert client.post("/v2/models/small/infer", json=request(images(1))).json()["id"]
    for _ in range(2):
        client.post("/v2/models/small/infer", json=request(images(1), id="same"))
    first, second = (ask.request_id for ask in model.seen[-2:])
    assert first != second
    assert first.startswith("same~")


@pytest.mark.parametrize(("name", "status"), [("\U0001f600" * 32, 200), ("\U0001f600" * 128, 400), ("\ud800", 400)])
def test_an_id_of_any_script_fits_its_feedback_token_or_is_refused(client: TestClient, name: str, status: int) -> None:
    reply = client.post("/v2/models/small/infer", content=json.dumps(request(images(1), id=name)))
    assert reply.status_code == status, reply.text
    if status == 200:
        item = {"token": reply.json()["parameters"]["feedback_token"], "index": 0, "label": 1}
        counts = client.post("/v2/models/small/feedback", json={"labels": [item]}, headers=auth("labeller")).json()
        assert counts["accepted"] == 1
    else:
        assert "id must be" in reply.json()["error"]


def test_binary_request_gets_a_binary_reply_also_compressed(client: TestClient) -> None:
    raw = images(2).tobytes()
    tensor = {
        "name": "input",
        "shape": [2, 2, 3],
        "datatype": "UINT8",
        "parameters": {"binary_data_size": len(raw)},
    }
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    plain = client.post(
        "/v2/models/small/infer", content=head + raw, headers={"Inference-Header-Content-Length": str(len(head))}
    )
    packed = client.post(
        "/v2/models/small/infer",
        content=gzip.compress(head + raw),
        headers={"Inference-Header-Content-Length": str(len(head)), "Content-Encoding": "gzip"},
    )
    for reply in (plain, packed):
        length = int(reply.headers["Inference-Header-Content-Length"])
        sizes = [o["parameters"]["binary_data_size"] for o in json.loads(reply.content[:length])["outputs"]]
        assert len(reply.content) == length + sum(sizes)
        assert sizes == [32, 32, 16]


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("/v2/models/other/infer", b"{}", 404),
        ("/v2/models/small/versions/none/infer", b"{}", 404),
        ("/v2/models/small/infer", b"nope", 400),
        ("/v2/models/small/infer", b" " * 20_001, 413),
        ("/v2/models/small/config", b"", 404),
        ("/v2/health/live", b"", 405),
        ("/nowhere", b"", 404),
    ],
)
def test_bad_request_gets_the_protocols_error(client: TestClient, path: str, content: bytes, status: int) -> None:
    reply = client.post(path, content=content)
    assert reply.status_code == status
    assert list(reply.json()) == ["error"]


def test_body_without_a_length_is_cut_off_at_the_limit(client: TestClient) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    assert client.post("/v2/models/small/infer", content=endless()).status_code == 413


@pytest.mark.parametrize(("role", "status"), [("operator", 200), ("labeller", 403), ("nobody", 401)])
def test_only_an_operator_may_go_unmonitored(client: TestClient, role: str, status: int) -> None:
    body = request(images(1), parameters={"monitor": False})
    assert client.post("/v2/models/small/infer", json=body, headers=auth(role)).status_code == status


def test_feedback_counts_and_needs_a_labeller(client: TestClient) -> None:
    token = client.post("/v2/models/small/infer", json=request(images(2))).json()["parameters"]["feedback_token"]
    body = {"labels": [{"token": token, "index": 1, "label": 3}, {"token": "junk", "label": 0}]}
    path = "/v2/models/small/feedback"
    assert client.post(path, json=body, headers=auth("viewer")).status_code == 403
    reply = client.post(path + "/", json=body, headers=auth("labeller"))
    assert reply.json() == {"accepted": 1, "unknown": 1, "expired": 0, "conflicting": 0}


@pytest.mark.parametrize(
    "body",
    [{}, {"labels": 3}, {"labels": [3]}, {"labels": [{"token": 1}]}, {"labels": [{"token": "t", "label": True}]}],
)
def test_malformed_feedback_is_refused(client: TestClient, body: Any) -> None:
    reply = client.post("/v2/models/small/feedback", json=body, headers=auth("labeller"))
    assert reply.status_code == 400
    assert "labels" in reply.json()["error"]


def test_healing_needs_a_viewer(client: TestClient) -> None:
    for path in ("/healing", "/healing/episodes", "/healing/episodes/e1", "/healing/events"):
        assert client.get(path).status_code == 401
    assert client.get("/healing/", headers=auth("viewer")).json() == {"phase": "watching"}
    assert client.get("/healing/episodes", headers=auth("operator")).json() == [{"id": "e1"}]
    assert client.get("/healing/episodes/e1/", headers=auth("viewer")).json() == {"id": "e1"}
    assert client.get("/healing/episodes/e2", headers=auth("viewer")).status_code == 404


def test_events_resume_after_the_last_one_seen_and_the_stream_ends(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "STREAM_S", 0.2)
    monkeypatch.setattr(control, "POLL_S", 0.05)
    whole = client.get("/healing/events", headers=auth("viewer"))
    assert whole.headers["content-type"].startswith("text/event-stream")
    assert [line for line in whole.text.splitlines() if line.startswith("id:")] == ["id: 0", "id: 1", "id: 2"]
    rest = client.get("/healing/events", headers=auth("viewer") | {"Last-Event-ID": "1"})
    assert [line for line in rest.text.splitlines() if line.startswith("id:")] == ["id: 2"]
    bad = client.get("/healing/events", headers=auth("viewer") | {"Last-Event-ID": "x"})
    assert bad.status_code == 400


def test_commands_need_an_operator_and_a_reason(client: TestClient, model: Model) -> None:
    assert client.post("/healing/pause", json={"reason": "why"}, headers=auth("labeller")).status_code == 403
    for body in ({}, {"reason": " "}, {"reason": 3}):
        reply = client.post("/healing/pause", json=body, headers=auth("operator"))
        assert reply.status_code == 400
        assert "reason" in reply.json()["error"]
    assert model.commands == []
    assert client.post("/healing/pause/", json={"reason": "why"}, headers=auth("operator")).status_code == 200
    back = {"reason": "worse", "to": "base", "command_id": "c1", "actor": "ann"}
    client.post("/healing/rollback", json=back, headers=auth("operator"))
    client.post("/healing/mode", json={"reason": "trust", "mode": "auto"}, headers=auth("operator"))
    pause, rollback, mode = model.commands
    assert (pause.name, pause.actor, pause.reason) == ("pause", "operator", "why")
    assert rollback == Command("c1", "rollback", "operator (ann)", "worse", "base")
    assert mode.argument == "auto"


def test_unknown_command_and_unknown_mode_are_refused(client: TestClient) -> None:
    assert client.post("/healing/explode", json={"reason": "r"}, headers=auth("operator")).status_code == 404
    reply = client.post("/healing/mode", json={"reason": "r", "mode": "wild"}, headers=auth("operator"))
    assert reply.status_code == 400
    assert client.post("/healing/promote", json={"reason": "r"}, headers=auth("operator")).status_code == 409


def test_without_an_orchestrator_healing_is_unavailable_and_inference_is_not(client: TestClient, model: Model) -> None:
    model.away = True
    for path in ("/healing", "/healing/events"):
        reply = client.get(path, headers=auth("viewer"))
        assert (reply.status_code, reply.json()) == (503, {"error": "the orchestrator is away"})
    assert client.post("/v2/models/small/infer", json=request(images(1))).status_code == 200


def test_status_page_is_served_and_loads_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert "/healing" in page.text
    assert "http" not in page.text.replace("<!doctype html>", "").replace("http-equiv", "")
