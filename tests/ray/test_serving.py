"""The HTTP contract on a running service: real Serve, two replicas, third-party client, published schema."""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import jsonschema
import numpy as np
import pytest
import tritonclient.http as triton
from conftest import Service, wait_for
from tritonclient.utils import InferenceServerException

import tiny

# The response of the inference API, from the Open Inference Protocol's published OpenAPI description
# (specification/protocol/open_inference_rest.yaml, InferenceResponse and ResponseOutput).
RESPONSE_SCHEMA = {
    "type": "object",
    "required": ["model_name", "outputs"],
    "properties": {
        "model_name": {"type": "string"},
        "model_version": {"type": "string"},
        "id": {"type": "string"},
        "parameters": {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}},
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "shape", "datatype", "data"],
                "properties": {
                    "name": {"type": "string"},
                    "shape": {"type": "array", "items": {"type": "integer"}},
                    "datatype": {
                        "enum": [
                            *("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"),
                            *("FP16", "FP32", "FP64", "BYTES"),
                        ]
                    },
                    "parameters": {"type": "object"},
                    "data": {"type": "array"},
                },
            },
        },
    },
}


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=30) as found:
        yield found


@pytest.fixture
def triton_client(service: Service) -> Iterator[triton.InferenceServerClient]:
    address = urlsplit(service.url)
    found = triton.InferenceServerClient(f"{address.netloc}{address.path}", concurrency=4)
    yield found
    found.close()


def body(images: np.ndarray, **extra: Any) -> dict[str, Any]:
    tensor = {"name": "input", "shape": list(images.shape), "datatype": "UINT8", "data": images.tolist()}
    return {"inputs": [tensor], **extra}


def outputs(reply: httpx.Response) -> dict[str, np.ndarray]:
    assert reply.status_code == 200, reply.text[:300]
    return {o["name"]: np.array(o["data"]).reshape(o["shape"]) for o in reply.json()["outputs"]}


def _check_health_and_metadata(service: Service, client: httpx.Client) -> None:
    base = httpx.URL(service.url).path
    model = f"/v2/models/{service.model}"
    for slash in ("", "/"):
        assert client.get("/v2/health/live" + slash).json() == {"live": True}
        assert client.get("/v2/health/ready" + slash).json() == {"ready": True}
        assert client.get(model + "/ready" + slash).json()["ready"] is True
        assert client.get(model + slash).json()["versions"] == ["base"], base
        assert "binary_tensor_data" in client.get("/v2" + slash).json()["extensions"]


def test_health_and_metadata_answer_with_and_without_a_trailing_slash(service: Service, client: httpx.Client) -> None:
    _check_health_and_metadata(service, client)


def test_json_replies_validate_against_the_published_schema(service: Service, client: httpx.Client) -> None:
    images, labels = tiny.make(16, seed=11)
    for path in (f"/v2/models/{service.model}/infer", f"/v2/models/{service.model}/versions/base/infer/"):
        reply = client.post(path, json=body(images, id="q1"))
        jsonschema.validate(reply.json(), RESPONSE_SCHEMA)
        assert reply.json()["model_version"] == "base"
        assert reply.json()["id"] == "q1"
        assert (outputs(reply)["label"] == labels).mean() > 0.7


@pytest.mark.parametrize("binary", [False, True])
def test_triton_client_gets_the_same_answers_in_json_and_binary(
    service: Service, client: httpx.Client, triton_client: triton.InferenceServerClient, binary: bool
) -> None:
    images, _ = tiny.make(8, seed=12)
    want = outputs(client.post(f"/v2/models/{service.model}/infer", json=body(images)))
    assert triton_client.is_server_live()
    assert triton_client.is_server_ready()
    assert triton_client.is_model_ready(service.model)
    assert triton_client.get_model_metadata(service.model)["name"] == service.model
    tensor = triton.InferInput("input", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images, binary_data=binary)
    names = ("logits", "probabilities", "label")
    wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in names]
    for compression in (None, "gzip", "deflate"):
        reply = triton_client.infer(
            service.model, [tensor], outputs=wanted, request_id="t1", request_compression_algorithm=compression
        )
        assert reply.get_response()["id"] == "t1"
        for name in names:
            np.testing.assert_allclose(reply.as_numpy(name), want[name], atol=1e-5)
    everything = triton_client.infer(service.model, [tensor], model_version="base")
    np.testing.assert_array_equal(everything.as_numpy("label"), want["label"])


def test_triton_client_reads_the_error_of_a_bad_request(
    service: Service, triton_client: triton.InferenceServerClient
) -> None:
    tensor = triton.InferInput("picture", [1, 16, 16, 3], "UINT8")
    tensor.set_data_from_numpy(np.zeros((1, 16, 16, 3), np.uint8))
    with pytest.raises(InferenceServerException, match="name of the input must be 'input'; got 'picture'"):
        triton_client.infer(service.model, [tensor])


def _bad_requests(model: str) -> list[tuple[str, dict[str, Any], int, str]]:
    images, _ = tiny.make(1, seed=0)
    good = body(images)["inputs"][0]
    infer = f"/v2/models/{model}/infer"

    def changed(**values: Any) -> dict[str, Any]:
        return {"json": {"inputs": [{**good, **values}]}}

    head = json.dumps({"inputs": [{**good, "data": None, "parameters": {"binary_data_size": 768}}]})
    head = head.replace('"data": null, ', "")
    cut = {"content": head.encode() + b"\0" * 700, "headers": {"Inference-Header-Content-Length": str(len(head))}}
    nan = {"content": json.dumps(body(images)).replace('"datatype"', '"x": NaN, "datatype"').encode()}
    return [
        (infer, changed(name="picture"), 400, "'picture'"),
        (infer, changed(shape=[1, 3, 16, 16]), 400, "[N, 16, 16, 3]"),
        (infer, changed(datatype="FP32"), 400, "'FP32'"),
        (infer, changed(data=[1, 2]), 400, "768 values"),
        (infer, changed(data=["1"] * 768), 400, "numbers"),
        (infer, changed(data=[1.5] * 768), 400, "numbers"),
        (infer, changed(shape=[0, 16, 16, 3], data=[]), 400, "rows"),
        (infer, changed(shape=[10_000, 16, 16, 3]), 400, "rows"),
        (infer, cut, 400, "binary_data_size"),
        (infer, {"content": b"{"}, 400, "JSON"),
        (infer, {"content": b"x", "headers": {"Inference-Header-Content-Length": "many"}}, 400, "Length"),
        (infer, nan | {"headers": {"Content-Encoding": "br"}}, 415, "Content-Encoding"),
        (infer, {"json": body(images, outputs=[{"name": "scores"}])}, 400, "'scores'"),
        (infer, {"json": body(images, parameters={"monitor": False})}, 401, "operator"),
        ("/v2/models/nobody/infer", {"json": body(images)}, 404, "'nobody'"),
        (f"/v2/models/{model}/versions/none/infer", {"json": body(images)}, 404, "base"),
        (f"/v2/models/{model}/feedback", {"json": {"labels": []}}, 401, "labeller"),
        ("/healing/rollback", {"json": {"reason": "r"}}, 401, "operator"),
    ]


def test_bad_input_gets_a_4xx_that_names_the_field_and_the_replicas_go_on(
    service: Service, client: httpx.Client
) -> None:
    for path, request, status, word in _bad_requests(service.model):
        reply = client.post(path, **request)
        assert reply.status_code == status, (path, word, reply.text)
        assert list(reply.json()) == ["error"]
        assert word in reply.json()["error"]
    wrong = client.get("/healing", headers={"Authorization": "Bearer wrong"})
    assert wrong.status_code == 401
    images, _ = tiny.make(2, seed=1)
    for _ in range(8):
        outputs(client.post(f"/v2/models/{service.model}/infer", json=body(images)))


def test_requests_of_all_sizes_at_once_each_get_their_own_answer(service: Service, client: httpx.Client) -> None:
    sizes = [1, 3, 40, 1, 17, 2, 300, 5] * 3
    batches = [tiny.make(size, seed=place)[0] for place, size in enumerate(sizes)]
    path = f"/v2/models/{service.model}/infer"
    alone = [outputs(client.post(path, json=body(batch)))["logits"] for batch in batches]

    def send(batch: np.ndarray) -> np.ndarray:
        return outputs(client.post(path, json=body(batch)))["logits"]

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        together = list(pool.map(send, batches))
    for want, got in zip(alone, together, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_late_label_is_accepted_by_whichever_replica_gets_it(service: Service, client: httpx.Client) -> None:
    images, labels = tiny.make(4, seed=3)

    def token() -> str:
        reply = client.post(f"/v2/models/{service.model}/infer", json=body(images))
        return str(reply.json()["parameters"]["feedback_token"])

    wait_for(token, 60, "a feedback token, given from the first heartbeat on")
    joined = service.state()["labels"]["joined"]
    for place in range(8):
        items = [{"token": token(), "index": i, "label": int(labels[i])} for i in range(4)] + [
            {"token": "x", "label": 0}
        ]
        reply = client.post(
            f"/v2/models/{service.model}/feedback" + "/" * (place % 2),
            json={"labels": items},
            headers=service.auth("labeller"),
        )
        assert reply.json() == {"accepted": 4, "unknown": 1, "expired": 0, "conflicting": 0}
    wait_for(lambda: service.state()["labels"]["joined"] == joined + 32, 30, "all labels at the orchestrator")


def test_healing_routes_answer_by_role(service: Service, client: httpx.Client) -> None:
    viewer = service.auth("viewer")
    assert wait_for(lambda: client.get("/healing/", headers=viewer).status_code == 200, 60, "the orchestrator")
    assert client.get("/healing/episodes", headers=viewer).json() == []
    assert client.get("/healing/episodes/none", headers=viewer).status_code == 404
    assert client.get("/").headers["content-type"].startswith("text/html")
    assert client.post("/healing/pause", json={"reason": "r"}, headers=viewer).status_code == 403
    lines = client.get("/healing/events", headers=viewer).text.splitlines()
    numbers = [int(line[3:]) for line in lines if line.startswith("id:")]
    assert numbers == sorted(set(numbers))
    assert numbers
    rest = client.get("/healing/events", headers=viewer | {"Last-Event-ID": str(numbers[-1])}).text
    assert f"id: {numbers[-1]}\n" not in rest


def test_segments_and_store_none_are_served_alike(start_service: Callable[..., Service]) -> None:
    service = start_service("no-store", store="none", replicas=1)
    images, _ = tiny.make(4, seed=5)
    with httpx.Client(timeout=30) as client:
        for place in range(40):
            request = body(images, parameters={"segment": f"camera {place}"})
            outputs(client.post(f"{service.url}/v2/models/{service.model}/infer", json=request))
    wait_for(
        lambda: sum(r["instances"] for r in service.state()["replicas"]) == 160, 60, "every instance to be reported"
    )
