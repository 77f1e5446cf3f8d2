"""What all HTTP routes share: the model behind a port, bodies with a limit, JSON replies, both kinds of trailing slash.

Called by `ingress` and `control`. Knows no Ray.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response

from orchestrator.errors import RequestError
from serve_app.forward import Answer, Ask
from serve_app.protocol import Contract, decompress
from serve_app.tokens import Roles


class ModelPort(Protocol):
    """What the routes need of a model replica."""

    contract: Contract
    roles: Roles

    def versions(self) -> tuple[str, ...]:
        """Versions that can be asked for."""

    async def infer(self, ask: Ask) -> Answer:
        """Answer one request; RequestError 404 for an unlisted version."""

    def token(self, answer: Answer) -> str:
        """Feedback token of an answer."""

    def feedback(self, items: list[tuple[str, int, int]]) -> dict[str, int]:
        """Take (token, row, class) triples; counts by outcome."""

    async def control(self, method: str, *args: Any) -> Any:
        """Call the orchestrator; ServiceError when it is away."""


Handler = Callable[..., Awaitable[Any]]


def route(api: FastAPI, method: str, path: str, handler: Handler) -> None:
    """Serve `path` with and without a trailing slash; a redirect would lose a body with many clients."""
    for variant in {path, path.rstrip("/") + "/"}:
        api.add_api_route(variant, handler, methods=[method], response_model=None)


def reply(value: Any, status: int = 200) -> Response:
    """A JSON response."""
    return Response(json.dumps(value, separators=(",", ":"), default=str), status, media_type="application/json")


async def read_body(request: Request, limit: int) -> bytes:
    """The body, decompressed; RequestError 413 as soon as it is known to be larger than `limit` bytes."""
    too_large = RequestError(f"body must be at most {limit} bytes; got more", 413)
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > limit:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
    body = parts[0] if len(parts) == 1 else b"".join(parts)
    return decompress(body, request.headers.get("content-encoding", "").strip().lower(), limit)
