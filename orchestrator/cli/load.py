"""The demo's clients: threads that keep sending requests at a set pace and keep every answer. Nothing is sent twice.

Used by `heal demo`. Labels, where the stream has them, are for the display and for feedback only.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from orchestrator.cli.client import Client
from orchestrator.datasets import Dataset
from orchestrator.errors import HealError

NUM_THREADS = 4
MAX_FAILURES_KEPT = 20


@dataclass(frozen=True)
class Sent:
    """One request as it was answered.

    Attributes:
        stream: name of the data set it came from.
        rows: its instances there, (N,).
        at_s: when the answer was there, seconds since the epoch.
        seconds: it took.
        logits_NK: float32; None for a failed request.
        digest: who answered.
        generation: as the reply says.
        correct: instances classified rightly; None where labels are unknown.
    """

    stream: str
    rows: np.ndarray
    at_s: float
    seconds: float
    logits_NK: np.ndarray | None = None
    digest: str = ""
    generation: int = -1
    correct: int | None = None
    error: str = ""


@dataclass
class Stream:
    """A data set that is sent row by row, again from the start when it is used up."""

    name: str
    data: Dataset
    position: int = 0
    first_s: float | None = None  # when its first request was sent
    instances: int = 0  # sent so far

    def take(self, rows: int) -> np.ndarray:
        """Indices of the next `rows` instances."""
        index = (np.arange(rows) + self.position) % len(self.data)
        self.position += rows
        self.instances += rows
        self.first_s = self.first_s or time.time()
        return index


@dataclass
class Load:
    """Sends `stream` at `rate` requests per second; both may be changed at any time.

    Args:
        client: of the service.
        model: name in the URL.
        datatype: of the input.
        stream: what to send.
        rate: requests per second.
        rows: instances in a request.
        on_reply: told each answer with its feedback token and row indices, e.g. to send labels.
    """

    client: Client
    model: str
    datatype: str
    stream: Stream
    rate: float
    rows: int
    on_reply: Callable[[Sent, str], None] | None = None
    sent: list[Sent] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    failed: int = 0

    def __post_init__(self) -> None:
        """Prepare the threads; `start` starts them."""
        self._lock = threading.Lock()
        self._next_s = time.monotonic()
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(NUM_THREADS)]

    def start(self) -> None:
        """Start sending."""
        self._next_s = time.monotonic()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Send nothing more and wait for the answers under way."""
        self._stopping.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def switch(self, stream: Stream) -> None:
        """Send another stream from the next request on."""
        with self._lock:
            self.stream = stream

    @property
    def num_sent(self) -> int:
        """Requests answered or failed."""
        return len(self.sent)

    def _claim(self) -> tuple[Stream, np.ndarray, float]:
        """The next request and when it is due. Late ones are not caught up with: a slow service sets the pace."""
        with self._lock:
            due_s = max(self._next_s, time.monotonic() - 1.0 / self.rate)
            self._next_s = due_s + 1.0 / self.rate
            return self.stream, self.stream.take(self.rows), due_s

    def _run(self) -> None:
        while not self._stopping.is_set():
            with self._lock:
                wait_s = self._next_s - time.monotonic()
            if wait_s > 0:
                self._stopping.wait(min(wait_s, 0.25))  # the rate may change meanwhile
                continue
            stream, rows, _ = self._claim()
            answer, token = self._send(stream, rows)
            self.sent.append(answer)  # atomic
            if answer.error:
                self._note(answer.error)
            elif self.on_reply is not None:
                try:
                    self.on_reply(answer, token)
                except HealError as error:
                    self._note(f"feedback: {error}", count=False)

    def _note(self, problem: str, count: bool = True) -> None:
        with self._lock:
            self.failed += count
            if len(self.failures) < MAX_FAILURES_KEPT:
                self.failures.append(problem)

    def _send(self, stream: Stream, rows: np.ndarray) -> tuple[Sent, str]:
        start_s = time.monotonic()
        try:
            reply = self.client.infer(self.model, stream.data.inputs[rows], self.datatype)
        except HealError as error:
            return Sent(stream.name, rows, time.time(), time.monotonic() - start_s, error=str(error)), ""
        correct = None
        if stream.data.labels is not None:
            correct = int((reply.logits.argmax(axis=1) == stream.data.labels[rows]).sum())
        answer = Sent(
            stream.name,
            rows,
            time.time(),
            time.monotonic() - start_s,
            reply.logits,
            reply.digest,
            reply.generation,
            correct,
        )
        return answer, reply.token
