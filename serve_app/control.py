"""The `/healing` routes: state, episodes, events and what a person may ask for; and the status page.

Called by `ingress.build`. Everything is forwarded to the orchestrator; while it is away these routes answer 503 and
inference goes on.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.responses import HTMLResponse, StreamingResponse

from orchestrator.errors import HealError, RequestError
from orchestrator.messages import Command, Mode
from serve_app.protocol import load_json
from serve_app.web import ModelPort, read_body, reply, route

PAGE = Path(__file__).parent / "page" / "index.html"
STREAM_S = 10.0  # an event stream is closed after this: an open one holds a request slot of the replica
POLL_S = 0.5
MAX_COMMAND_BYTES = 65_536
MAX_REASON = 2_000  # characters
COMMANDS = ("start", "approve", "pause", "resume", "promote", "abort", "rollback", "mode")


def add_control(api: FastAPI, model: Callable[[], ModelPort]) -> None:
    """Add the routes to `api`."""

    def viewing(request: Request) -> ModelPort:
        found = model()
        found.roles.require(request.headers.get("authorization"), "viewer")
        return found

    async def page() -> Response:
        return HTMLResponse(PAGE.read_text("utf-8"))

    async def state(request: Request) -> Response:
        return reply(await viewing(request).control("state"))

    async def episodes(request: Request) -> Response:
        return reply(await viewing(request).control("episodes"))

    async def episode(request: Request, episode_id: str) -> Response:
        found = await viewing(request).control("episode", episode_id)
        if found is None:
            raise RequestError(f"episode must be one that /healing/episodes lists; got {ascii(episode_id)[:80]}", 404)
        return reply(found)

    async def events(request: Request) -> Response:
        after = _last_event_id(request.headers.get("last-event-id"))
        found = viewing(request)
        first = await found.control("events", after)  # before the headers: an absent orchestrator is a 503
        return StreamingResponse(_stream(found, first, after), media_type="text/event-stream")

    async def command(request: Request, name: str) -> Response:
        found = model()
        if name not in COMMANDS:
            raise RequestError(f"command must be one of {', '.join(COMMANDS)}; got {ascii(name)[:80]}", 404)
        role = found.roles.require(request.headers.get("authorization"), "operator")
        body = load_json(await read_body(request, MAX_COMMAND_BYTES))
        return reply(await found.control("command", parse_command(name, role, body)))

    route(api, "GET", "/", page)
    route(api, "GET", "/healing", state)
    route(api, "GET", "/healing/episodes", episodes)
    route(api, "GET", "/healing/episodes/{episode_id}", episode)
    route(api, "GET", "/healing/events", events)
    route(api, "POST", "/healing/{name}", command)


def parse_command(name: str, role: str, body: dict[str, Any]) -> Command:
    """A command from its JSON body: `reason`; `to` for rollback; `mode` for mode; optionally `command_id`, `actor`.

    Raises:
        RequestError: names the field, what is expected and what came.
    """
    reason = body.get("reason")
    if not isinstance(reason, str) or not reason.strip() or len(reason) > MAX_REASON:
        raise RequestError(f"reason must be a text of 1 to {MAX_REASON} characters that says why; got {_kind(reason)}")
    argument = ""
    if name == "rollback":
        argument = _word(body, "to", "")
    elif name == "mode":
        argument = _word(body, "mode", "")
        if argument not in [mode.value for mode in Mode]:
            raise RequestError(f"mode must be observe, approve or auto; got {ascii(argument)[:40]}")
    actor = _word(body, "actor", "")
    return Command(
        command_id=_word(body, "command_id", "") or uuid.uuid4().hex,
        name=name,
        actor=f"{role} ({actor})" if actor else role,  # what the token proves comes first
        reason=reason.strip(),
        argument=argument,
    )


def _word(body: dict[str, Any], name: str, default: str) -> str:
    value = body.get(name, default)
    if not isinstance(value, str) or len(value) > 128 or not (value == "" or value.isprintable()):
        raise RequestError(f"{name} must be a printable text of at most 128 characters; got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a text of {len(value)}" if isinstance(value, str) else "no text"


def _last_event_id(value: str | None) -> int:
    if value is None or value == "":
        return -1
    if not (value.isascii() and value.isdigit() and len(value) <= 18):
        raise RequestError(f"Last-Event-ID must be an event's number; got {ascii(value)[:40]}")
    return int(value)


async def _stream(found: ModelPort, batch: list[dict[str, Any]], after: int) -> AsyncIterator[str]:
    """Server-sent events until STREAM_S is over; the client resumes by Last-Event-ID."""
    until = time.monotonic() + STREAM_S
    yield "retry: 1000\n\n"
    while True:
        for event in batch:
            after = max(after, int(event["seq"]))
            data = json.dumps(event, separators=(",", ":"), default=str)
            yield f"id: {event['seq']}\nevent: {event['event']}\ndata: {data}\n\n"
        if time.monotonic() + POLL_S >= until:
            return
        await asyncio.sleep(POLL_S)
        try:
            batch = await found.control("events", after)
        except HealError as error:  # the headers are out: say it, and let the client resume where it stopped
            yield f": {error}\n\n"
            return
