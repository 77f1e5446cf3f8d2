"""Delivers the journal's calls to a person: one thread per receiver, each with a cursor of its own on the storage.

Called by the actor. The journal is the queue, so a receiver that is down for a week loses nothing and holds nobody up;
a message that was sent twice (a crash between delivery and cursor) carries the same `webhook-id`.
"""

from __future__ import annotations

import http.client
import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from typing import Any

from orchestrator.calls import Call, Receiver, call_for, sign
from orchestrator.errors import HealError, NotFound
from orchestrator.storage import Storage

TIMEOUT_S = 10.0
FIRST_PAUSE_S = 1.0  # after a failure; doubled up to ...
MAX_PAUSE_S = 300.0
TRY_AGAIN = (408, 409, 425, 429)  # of the 4xx; any other says that this message will never be taken

log = logging.getLogger("rayheal")
Events = Callable[[int], Iterable[dict[str, Any]]]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive as a GET without its body, wherever the receiver likes."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def send(receiver: Receiver, secret: str, call: Call) -> bool:
    """One delivery.

    Returns:
        False where the receiver says that it will never take this message.

    Raises:
        OSError: it was not taken now: not reached, an error of the server, a redirect.
    """
    body, sent_s = receiver.body(call), int(time.time())
    headers = {
        "Content-Type": "application/json" if receiver.format else "application/cloudevents+json",
        "webhook-id": call.id,
        "webhook-timestamp": str(sent_s),
        "webhook-signature": sign(secret, call.id, sent_s, body),
    }
    try:
        request = urllib.request.Request(receiver.url, body, headers, method="POST")
        with _OPENER.open(request, timeout=TIMEOUT_S):
            return True
    except urllib.error.HTTPError as error:
        if 400 <= error.code < 500 and error.code not in TRY_AGAIN:
            return False
        raise OSError(f"HTTP {error.code}") from None
    except (http.client.HTTPException, ValueError) as error:  # what they say may hold the URL, and that a secret
        raise OSError(f"no HTTP answer ({type(error).__name__})") from None


class Notifier:
    """Sends what happens to one receiver, in order, each message until it is taken.

    Args:
        service: names the service in every message.
        receiver: where to.
        secret: signs, see `calls.sign`.
        storage: keeps the cursor.
        events: journal entries with a higher sequence number, as dicts with seq, time_s, event, body.
        pause_s: after a first failure.
    """

    def __init__(
        self,
        service: str,
        receiver: Receiver,
        secret: str,
        storage: Storage,
        events: Events,
        pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self.problem = ""  # why messages wait; empty when none does
        self.refused = 0
        self.name = receiver.name
        self._service, self._receiver, self._secret = service, receiver, secret
        self._storage, self._events, self._first_pause_s = storage, events, pause_s
        self._key = f"notify/{receiver.name}.json"
        self._news, self._stopping = threading.Event(), threading.Event()
        self._after: int | None = None
        self._thread = threading.Thread(target=self._run, name=f"notify {receiver.name}", daemon=True)
        self._thread.start()

    @property
    def trouble(self) -> str:
        """Why messages wait, or how many were dropped as never taken; empty when all is well."""
        return self.problem or (f"{self.refused} messages refused and dropped" if self.refused else "")

    def wake(self) -> None:
        """There may be new entries."""
        self._news.set()

    def close(self, timeout_s: float = 2.0) -> None:
        """Stop; what was not delivered waits on the storage."""
        self._stopping.set()
        self._news.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        pause_s = self._first_pause_s
        while not self._stopping.is_set():
            self._news.clear()
            if self._stopping.is_set():  # between the two lines: the word to stop was cleared with the news
                return
            try:
                self._deliver()
            except Exception as error:  # whatever breaks here must not end the thread, and must be seen
                known = isinstance(error, HealError | OSError)
                self._say(f"{type(error).__name__}: {error}" if known else type(error).__name__)
                self._stopping.wait(pause_s)
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
                continue
            self._say("")
            pause_s = self._first_pause_s
            self._news.wait()

    def _deliver(self) -> None:
        """Send all that is new; raises at the first message that is not taken."""
        if self._after is None:
            self._after = self._read_cursor()
        while entries := list(self._events(self._after)):
            if not self._deliver_page(entries):
                return

    def _deliver_page(self, entries: list[dict[str, Any]]) -> bool:
        """Send a page of entries in order; False when it was told to stop."""
        moved = False
        for entry in entries:
            call = call_for(self._service, entry["seq"], entry["time_s"], entry["event"], entry["body"])
            if call is not None and not self._stopping.is_set():
                if not send(self._receiver, self._secret, call):
                    log.error("%s will never take message %s; it is dropped", self._receiver.name, call.id)
                    self.refused += 1
                self._write_cursor(entry["seq"])
            if self._stopping.is_set():
                return False
            self._after, moved = entry["seq"], moved or call is None
        if moved and self._after is not None:
            self._write_cursor(self._after)
        return True

    def _read_cursor(self) -> int:
        """The last entry that was dealt with. A receiver named for the first time hears of what comes from now on."""
        try:
            return int(json.loads(self._storage.get(self._key))["after"])
        except NotFound:
            after = max((int(entry["seq"]) for entry in self._events(-1)), default=-1)
            self._write_cursor(after)
            return after

    def _write_cursor(self, after: int) -> None:
        self._storage.put(self._key, json.dumps({"after": after}).encode())

    def _say(self, problem: str) -> None:
        if problem and problem != self.problem:
            log.warning("messages to %s wait: %s", self._receiver.name, problem)
        elif self.problem and not problem:
            log.info("%s takes messages again", self._receiver.name)
        self.problem = problem
