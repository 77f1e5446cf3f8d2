"""The HTTP routes of one model: Open Inference Protocol v2 and feedback. `/healing` lies in `control`.

Called by `serve_app.replica`, which runs the application inside every model replica (one hop less than an ingress of
its own). Knows no Ray: the model is behind `ModelPort`, so that tests run the same routes without a cluster.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from orchestrator.errors import HealError, RequestError, ServiceError
from serve_app import protocol
from serve_app.control import add_control
from serve_app.forward import Ask
from serve_app.web import ModelPort, read_body, reply, route

MAX_LABELS = 10_000  # in one feedback request
_INFERENCE_HEADER = protocol.HEADER_LENGTH.lower()

log = logging.getLogger("rayheal")


def build(model: Callable[[], ModelPort]) -> FastAPI:
    """The application around a model that is there by the time the first request comes."""
    api = FastAPI(title="rayheal", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    api.add_exception_handler(HealError, _on_heal_error)
    api.add_exception_handler(HTTPException, _on_http_error)
    api.add_exception_handler(Exception, _on_bug)
    _add_health(api, model)
    _add_inference(api, model)
    add_control(api, model)
    return api


async def _on_heal_error(_: Request, error: Exception) -> Response:
    status = error.status if isinstance(error, RequestError) else 503 if isinstance(error, ServiceError) else 500
    return reply({"error": str(error)}, status)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return reply({"error": f"{request.method} {request.url.path[:200]}: {error.detail}"}, error.status_code)


async def _on_bug(_: Request, error: Exception) -> Response:
    log.error("a request failed", exc_info=error)
    return reply({"error": f"internal error: {type(error).__name__}"}, 500)


def _add_health(api: FastAPI, model: Callable[[], ModelPort]) -> None:
    async def server() -> Response:
        return reply({"name": "rayheal", "version": _software(), "extensions": ["binary_tensor_data"]})

    async def live() -> Response:
        return reply({"live": True})

    async def ready() -> Response:
        model()
        return reply({"ready": True})

    async def metadata(name: str, version: str | None = None) -> Response:
        found = _named(model(), name, version)
        return reply(found.contract.metadata(found.versions()))

    async def model_ready(name: str, version: str | None = None) -> Response:
        _named(model(), name, version)
        return reply({"name": name, "ready": True})

    route(api, "GET", "/v2", server)
    route(api, "GET", "/v2/health/live", live)
    route(api, "GET", "/v2/health/ready", ready)
    for path in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        route(api, "GET", path, metadata)
        route(api, "GET", path + "/ready", model_ready)


def _software() -> str:
    try:
        return version("rayheal")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "0"


def _named(found: ModelPort, name: str, version: str | None) -> ModelPort:
    if name != found.contract.model:
        raise RequestError(f"model must be {found.contract.model!r}; got {ascii(name)[:80]}", 404)
    if version is not None and version not in found.versions():
        raise RequestError(f"version must be one of {', '.join(found.versions())}; got {ascii(version)[:80]}", 404)
    return found


def _add_inference(api: FastAPI, model: Callable[[], ModelPort]) -> None:
    async def infer(request: Request, name: str, version: str | None = None) -> Response:
        found = _named(model(), name, version)
        body = await read_body(request, found.contract.max_body_bytes)
        asked = protocol.parse(body, request.headers.get(_INFERENCE_HEADER), found.contract)
        if not asked.monitor:
            found.roles.require(request.headers.get("authorization"), "operator")
        unique = _unique(asked.id)
        answer = await found.infer(Ask(asked.inputs, unique, asked.segment, version, asked.monitor))
        parameters = {"generation": answer.generation, "feedback_token": found.token(answer)}
        content, head = protocol.render(asked, name, answer.digest, asked.id or unique, parameters, answer.logits)
        if head is None:
            return Response(content, media_type="application/json")
        return Response(content, media_type="application/octet-stream", headers={protocol.HEADER_LENGTH: str(head)})

    async def feedback(request: Request, name: str) -> Response:
        found = _named(model(), name, None)
        found.roles.require(request.headers.get("authorization"), "labeller")
        body = protocol.load_json(await read_body(request, found.contract.max_body_bytes))
        return reply(await asyncio.to_thread(found.feedback, _labels(body)))

    for path in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        route(api, "POST", path + "/infer", infer)
    route(api, "POST", "/v2/models/{name}/feedback", feedback)


def _unique(client_id: str) -> str:
    """Id under which instances are kept: clients may send the same id again and again."""
    return f"{client_id}~{uuid.uuid4().hex[:12]}" if client_id else uuid.uuid4().hex


def _labels(body: dict[str, Any]) -> list[tuple[str, int, int]]:
    labels = body.get("labels")
    if not isinstance(labels, list) or len(labels) > MAX_LABELS:
        raise RequestError(f"labels must be a list of at most {MAX_LABELS} objects with token, index and label")
    found = []
    for place, item in enumerate(labels):
        token, index, label = (
            (item.get("token"), item.get("index", 0), item.get("label")) if isinstance(item, dict) else (0, 0, 0)
        )
        if not isinstance(token, str) or type(index) is not int or type(label) is not int:
            raise RequestError(f"labels[{place}] must have token (string), index (integer) and label (integer)")
        found.append((token, index, label))
    return found
