import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from orchestrator.cli.client import Client, connect, decode_reply, encode_request, tokens_for
from orchestrator.errors import ServiceError
from orchestrator.keys import load_keys
from serve_app.protocol import Contract, parse, render

CONTRACT = Contract("small", (2, 3), "UINT8", 4)


def client_of(handler: Callable[[httpx.Request], httpx.Response]) -> Client:
    return Client("http://service", "token", httpx.Client(transport=httpx.MockTransport(handler)))


def test_requests_and_replies_speak_the_services_own_protocol() -> None:
    inputs = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    logits = np.array([[1, 2, 3, 4], [4, 3, 2, 1]], dtype=np.float32)

    def serve(request: httpx.Request) -> httpx.Response:
        asked = parse(request.content, request.headers["Inference-Header-Content-Length"], CONTRACT)
        assert np.array_equal(asked.inputs, inputs)
        assert request.url.path == "/v2/models/small/versions/base/infer"
        assert not asked.monitor
        assert request.headers["Authorization"] == "Bearer token"
        content, head = render(asked, "small", "base", "1", {"generation": 3, "feedback_token": "t"}, logits)
        return httpx.Response(200, content=content, headers={"Inference-Header-Content-Length": str(head)})

    reply = client_of(serve).infer("small", inputs, "UINT8", "base", monitor=False)
    assert np.array_equal(reply.logits, logits)
    assert (reply.digest, reply.generation, reply.token) == ("base", 3, "t")


def test_traffic_carries_no_operators_token() -> None:
    def serve(request: httpx.Request) -> httpx.Response:
        assert "Authorization" not in request.headers
        return httpx.Response(503, json={"error": "busy"})

    with pytest.raises(ServiceError, match="503"):
        client_of(serve).infer("small", np.zeros((1, 2, 3), np.uint8), "UINT8")


@pytest.mark.parametrize("missing", ["model_version", "parameters", "outputs"])
def test_a_reply_without_its_parts_is_a_failure(missing: str) -> None:
    head: dict[str, Any] = {
        "model_version": "base",
        "parameters": {"generation": 0, "feedback_token": ""},
        "outputs": [{"name": "logits", "shape": [1, 2]}],
    }
    del head[missing]
    raw = json.dumps(head).encode()
    with pytest.raises(ServiceError, match="must hold"):
        decode_reply(raw + bytes(8), str(len(raw)), 1)


def test_a_reply_of_the_wrong_number_of_rows_is_a_failure() -> None:
    raw = json.dumps(
        {
            "model_version": "base",
            "parameters": {"generation": 0, "feedback_token": ""},
            "outputs": [{"name": "logits", "shape": [1, 2]}],
        }
    ).encode()
    with pytest.raises(ServiceError, match="one row per instance"):
        decode_reply(raw + bytes(8), str(len(raw)), 2)


def test_the_binary_part_follows_the_json_part() -> None:
    body, head = encode_request(np.zeros((2, 3), np.float32), "FP32", True)
    assert len(body) == head + 24
    assert "parameters" not in json.loads(body[:head])


def test_a_refusal_is_told_with_status_and_message() -> None:
    client = client_of(lambda _: httpx.Response(409, json={"error": "nothing to promote"}))
    with pytest.raises(ServiceError, match="409: nothing to promote"):
        client.command("promote", "why not")


def test_an_absent_service_is_one_clear_error() -> None:
    load_keys("absent-service")
    with pytest.raises(ServiceError, match="is it running"):
        connect("http://127.0.0.1:9", "absent-service")


def test_a_mistyped_service_name_makes_no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEAL_HOME", str(tmp_path))
    monkeypatch.delenv("HEAL_TOKEN", raising=False)
    with pytest.raises(ServiceError, match="--service"):
        connect("http://127.0.0.1:9", "mistyped")
    assert not list(tmp_path.rglob("*.json"))


def test_other_hosts_are_never_shown_several_services_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEAL_HOME", str(tmp_path))
    monkeypatch.delenv("HEAL_TOKEN", raising=False)
    one = load_keys("one").tokens["operator"]
    assert tokens_for("http://example.org") == [one]
    two = load_keys("two").tokens["operator"]
    assert tokens_for("http://example.org") == [None]
    assert tokens_for("http://127.0.0.1:8000") == [one, two]
    assert tokens_for("http://example.org", "two") == [two]
    monkeypatch.setenv("HEAL_TOKEN", "mine")
    assert tokens_for("http://example.org") == ["mine"]
