"""Talks to a running service over HTTP: the Open Inference Protocol in its binary form, and the `/healing` routes.

Used by the commands that take `--url` and by the demo. Knows HTTP and nothing of what the answers mean.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from orchestrator.cli.notes import key_names, known_keys
from orchestrator.errors import ServiceError
from orchestrator.keys import load_keys
from orchestrator.messages import BASE

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 30.0
_HEADER = "Inference-Header-Content-Length"


@dataclass(frozen=True)
class Reply:
    """One answer: `logits` float32 (N, K), and who gave it."""

    logits: np.ndarray
    digest: str
    generation: int
    token: str


class Client:
    """One service at one URL. Threads may share it.

    Args:
        url: base URL, route prefix included.
        token: bearer token; None: none is sent.
        http: the HTTP client; None: a fresh one.
    """

    def __init__(self, url: str, token: str | None = None, http: httpx.Client | None = None) -> None:
        self.url = url.rstrip("/")
        self._http = http or httpx.Client(timeout=TIMEOUT_S, trust_env=False)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # ------------------------------------------------------------ healing

    def get(self, path: str) -> Any:
        """JSON of a GET.

        Raises:
            ServiceError: nobody answers there, or not with 200; the message says what came.
        """
        return self._json("GET", path, None)

    def state(self) -> dict[str, Any]:
        """`GET /healing`."""
        state: dict[str, Any] = self.get("/healing")
        return state

    def command(self, name: str, reason: str, **arguments: str) -> dict[str, Any]:
        """`POST /healing/{name}`: what a person asks for."""
        answer: dict[str, Any] = self._json("POST", f"/healing/{name}", {"reason": reason, **arguments})
        return answer

    def events(self, patience_s: float, after: int = -1) -> Iterator[dict[str, Any]]:
        """Journal entries as they appear, oldest first, for about `patience_s` seconds.

        Raises:
            ServiceError: the stream cannot be read.
        """
        until_s = time.monotonic() + patience_s
        while time.monotonic() < until_s:
            headers = self._headers | ({"Last-Event-ID": str(after)} if after >= 0 else {})
            try:
                with self._http.stream("GET", self.url + "/healing/events", headers=headers) as answer:
                    if answer.status_code != 200:
                        raise ServiceError(f"GET /healing/events: {answer.status_code}")
                    for line in answer.iter_lines():
                        if line.startswith("data: "):
                            event = json.loads(line[len("data: ") :])
                            after = int(event["seq"])
                            yield event
            except httpx.HTTPError as error:
                raise ServiceError(f"the events of {self.url} cannot be read: {error}") from error

    def _json(self, method: str, path: str, body: Any) -> Any:
        try:
            answer = self._http.request(method, self.url + path, json=body, headers=self._headers)
        except httpx.HTTPError as error:
            raise ServiceError(f"no service answers at {self.url}: {error}; is it running, is --url right?") from error
        try:
            value = answer.json()
        except ValueError:
            value = None
        if answer.status_code != 200:
            said = value.get("error") if isinstance(value, dict) else answer.text[:200]
            raise ServiceError(f"{method} {path}: {answer.status_code}: {said}")
        return value

    # ------------------------------------------------------------ inference

    def infer(
        self,
        model: str,
        inputs: np.ndarray,
        datatype: str,
        version: str | None = None,
        monitor: bool = True,
    ) -> Reply:
        """Ask for the logits of `inputs`, binary both ways.

        Raises:
            ServiceError: no answer, another status than 200, or an answer without digest, generation or logits.
        """
        path = f"/v2/models/{model}" + (f"/versions/{version}" if version else "") + "/infer"
        body, head = encode_request(inputs, datatype, monitor)
        headers = {_HEADER: str(head), "Content-Type": "application/octet-stream"}
        if not monitor:
            headers |= self._headers
        try:
            answer = self._http.post(self.url + path, content=body, headers=headers)
        except httpx.HTTPError as error:
            raise ServiceError(f"request failed: {type(error).__name__}: {error}") from error
        if answer.status_code != 200:
            raise ServiceError(f"request failed: {answer.status_code}: {answer.text[:200]}")
        return decode_reply(answer.content, answer.headers.get(_HEADER), len(inputs))

    def feedback(self, model: str, labels: list[tuple[str, int, int]]) -> dict[str, int]:
        """Send true labels as (token, row, class); the service's counts."""
        body = {"labels": [{"token": token, "index": row, "label": label} for token, row, label in labels]}
        counts: dict[str, int] = self._json("POST", f"/v2/models/{model}/feedback", body)
        return counts


def encode_request(inputs: np.ndarray, datatype: str, monitor: bool) -> tuple[bytes, int]:
    """Body of an inference request that asks for binary logits, and the length of its JSON part."""
    raw = np.ascontiguousarray(inputs).tobytes()
    request: dict[str, Any] = {
        "inputs": [
            {
                "name": "input",
                "shape": list(inputs.shape),
                "datatype": datatype,
                "parameters": {"binary_data_size": len(raw)},
            }
        ],
        "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
    }
    if not monitor:
        request["parameters"] = {"monitor": False}
    head = json.dumps(request, separators=(",", ":")).encode()
    return head + raw, len(head)


def decode_reply(content: bytes, header_length: str | None, rows: int) -> Reply:
    """Read and check a binary reply to a request of `rows` instances.

    Raises:
        ServiceError: a part is missing or of the wrong size; the message names it.
    """
    try:
        length = int(header_length or "")
        head = json.loads(content[:length])
        output = next(o for o in head["outputs"] if o["name"] == "logits")
        shape = tuple(int(n) for n in output["shape"])
        logits_NK = np.frombuffer(content[length:], dtype="<f4").reshape(shape)
        parameters = head["parameters"]
        reply = Reply(
            logits_NK, str(head["model_version"]), int(parameters["generation"]), str(parameters["feedback_token"])
        )
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise ServiceError(f"a reply must hold model_version, generation and binary logits; {error!r}") from error
    if len(logits_NK) != rows or not reply.digest:
        raise ServiceError(f"a reply must hold one row per instance; got {len(logits_NK)} for {rows}")
    return reply


def default_url() -> str:
    """`HEAL_URL`, else the address that Ray Serve listens on by default."""
    return os.environ.get("HEAL_URL") or DEFAULT_URL


def tokens_for(url: str, service: str | None = None) -> list[str | None]:
    """Operator tokens to try at `url`, at least one entry.

    `HEAL_TOKEN` if set; else that of `service`'s key file on this machine. Without a name: the only key file's, and on
    this machine's own addresses each file's in turn; other hosts are never shown several.
    """
    if token := os.environ.get("HEAL_TOKEN"):
        return [token]
    if service:
        return [known_keys(service).tokens["operator"]]
    names = key_names()
    if len(names) > 1 and httpx.URL(url).host not in ("127.0.0.1", "localhost", "::1"):
        return [None]
    return [load_keys(name).tokens["operator"] for name in names] or [None]


def connect(url: str | None, service: str | None = None) -> Client:
    """A client whose token the service at `url` knows.

    Raises:
        ServiceError: nobody answers there, or no token of this machine is known there.
    """
    address = url or default_url()
    refusal = ""
    for token in tokens_for(address, service):
        client = Client(address, token)
        try:
            client.state()
        except ServiceError as error:
            client.close()
            refusal = str(error)
            if not any(f": {status}: " in refusal for status in (401, 403)):
                raise
        else:
            return client
    raise ServiceError(f"{refusal}; set HEAL_TOKEN to a token of that service, or name it with --service")


def short(digest: str | None) -> str:
    """A digest as people read it."""
    return "-" if not digest else digest if digest == BASE else digest[:12]
