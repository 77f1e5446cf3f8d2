"""The pull: a thread that reports to the orchestrator and applies the target it answers with.

Called by `Healable`. A replica serves what it has however this goes: every failure here is kept, said once and tried
again. Knows the orchestrator only as a `Link`; the Ray one is in `link`.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from typing import Protocol

from orchestrator.errors import HealError
from orchestrator.messages import Report, Target

CALL_TIMEOUT_S = 3.0  # for one heartbeat; a slow orchestrator gets the same report again
MAX_BACKOFF_S = 5.0
SLOW_CALLS = 3  # unanswered heartbeats in a row after which the orchestrator is looked up anew

log = logging.getLogger("rayheal")


class LinkError(HealError):
    """The orchestrator did not answer.

    Args:
        message: what happened.
        lost: True when it is gone, and must be found or made again.
        refused: True when it raised on this very report, which is then given up (a sequence number is missed).
    """

    def __init__(self, message: str, lost: bool, refused: bool = False) -> None:
        super().__init__(message)
        self.lost = lost
        self.refused = refused


class Link(Protocol):
    """A connection to the orchestrator."""

    def heartbeat(self, report: Report, timeout_s: float) -> Target:
        """Deliver a report; LinkError when no answer came. The report may have arrived all the same."""


class Pulse:
    """Sends one report at a time, the same one until it is acknowledged.

    What accumulates meanwhile waits in its bounded collections (windows merge, labels drop and are counted).

    Args:
        connect: finds or makes the orchestrator; may be slow, may raise.
        build: the report with a sequence number; it takes what has been collected.
        apply: makes a target true; it keeps its own failures.
        interval_s: between heartbeats.
    """

    def __init__(
        self,
        connect: Callable[[], Link],
        build: Callable[[int], Report],
        apply: Callable[[Target], None],
        interval_s: float,
    ) -> None:
        self.applied = threading.Event()  # set after the first target was applied
        self.problem = ""  # why the last beat failed; empty when it did not
        self.link: Link | None = None
        self._connect, self._build, self._apply = connect, build, apply
        self._interval_s = interval_s
        self._unacknowledged: Report | None = None
        self._sequence = 0
        self._slow = self._failed = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start beating, at once."""
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop after the beat under way."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def beat(self) -> bool:
        """One heartbeat. Returns False when no target came; `problem` says why."""
        try:
            if self.link is None:
                self.link = self._connect()
            if self._unacknowledged is None:
                self._unacknowledged = self._build(self._sequence)
                self._sequence += 1
            target = self.link.heartbeat(self._unacknowledged, CALL_TIMEOUT_S)
        except LinkError as error:
            self._slow += 1
            if error.refused:
                self._unacknowledged = None
            if error.lost or self._slow >= SLOW_CALLS:
                self.link, self._slow = None, 0
            return self._note(str(error))
        except Exception as error:  # whatever breaks here must not end the thread, and must be seen
            self.link = None
            return self._note(f"{type(error).__name__}: {error}")
        self._unacknowledged, self._slow = None, 0
        self._apply(target)
        self.applied.set()
        return self._note("")

    def _note(self, problem: str) -> bool:
        if problem and not self.problem:
            log.warning("no answer from the orchestrator, serving goes on: %s", problem)
        elif self.problem and not problem:
            log.info("the orchestrator answers again")
        self.problem = problem
        self._failed = self._failed + 1 if problem else 0
        return not problem

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.beat()
            except Exception:  # a bug in applying: the next beat tries again
                log.exception("a target could not be applied")
                self._failed += 1
            self._stopping.wait(self._pause_s())

    def _pause_s(self) -> float:
        """The interval; doubled per failure up to MAX_BACKOFF_S, spread so that replicas do not come at once."""
        if not self._failed:
            return self._interval_s
        longest = min(self._interval_s * 2 ** min(self._failed, 8), max(MAX_BACKOFF_S, self._interval_s))
        return float(longest * random.uniform(0.5, 1.0))
