"""Collects the sums of forward passes into windows until a heartbeat takes them.

Called by `Healable` from request threads (`add`) and from the heartbeat thread (`take`). Knows neither torch nor Ray:
sums are anything that adds up, and `collect` turns them into numpy when they are taken, off the request path.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.messages import Window
from orchestrator.settings import MAX_SEGMENTS, WINDOW_INSTANCES, WINDOW_S

OTHER = "other"  # segment of whatever comes after the first MAX_SEGMENTS names
MAX_PENDING = 256  # closed windows waiting for a heartbeat; above it, windows of one key are merged


@dataclass
class _Open:
    count: int
    first_s: float
    last_s: float
    sums: Any

    def absorb(self, other: _Open) -> None:
        self.count += other.count
        self.first_s = min(self.first_s, other.first_s)
        self.last_s = max(self.last_s, other.last_s)
        self.sums = self.sums + other.sums  # a new object: the caller's tensor may be an inference tensor


class Windows:
    """Windows of one replica, by (digest, segment).

    Args:
        base: digest of the base model.
        window_instances: a window closes at this many instances; a larger batch makes a larger window.
        window_s: or at this age.
        max_segments: further segments count as `other`.
        max_pending: closed windows kept.
        collect: sums to int64 numpy.
    """

    def __init__(
        self,
        base: str,
        *,
        window_instances: int = WINDOW_INSTANCES,
        window_s: float = WINDOW_S,
        max_segments: int = MAX_SEGMENTS,
        max_pending: int = MAX_PENDING,
        collect: Callable[[Any], np.ndarray] = np.asarray,
    ) -> None:
        self.dropped = 0  # instances whose window was given up, because even merged ones were too many
        self._base = base
        self._window_instances, self._window_s = window_instances, window_s
        self._max_segments, self._max_pending = max_segments, max_pending
        self._collect = collect
        self._lock = threading.Lock()
        self._segments: set[str] = set()
        self._open: dict[tuple[str, str], _Open] = {}
        self._closed: deque[tuple[tuple[str, str], _Open]] = deque()

    def segment(self, name: str) -> str:
        """The name under which a segment is kept: itself, or `other`."""
        with self._lock:
            return self._kept(name)

    def _kept(self, name: str) -> str:
        if name in self._segments:
            return name
        if len(self._segments) >= self._max_segments:
            return OTHER
        self._segments.add(name)
        return name

    def add(self, digest: str, segment: str, count: int, now_s: float, sums: Any, first_s: float | None = None) -> None:
        """Count `count` >= 1 instances that `digest` answered from `first_s` (None: `now_s`) to `now_s`.

        `sums` belongs to this object afterwards.
        """
        fresh = _Open(count, now_s if first_s is None else first_s, now_s, sums)
        with self._lock:
            key = (digest, self._kept(segment))
            window = self._open.get(key)
            if window is None:
                self._open[key] = window = fresh
            else:
                window.absorb(fresh)
            if window.count >= self._window_instances:
                self._close(key)

    def take(self, now_s: float) -> tuple[Window, ...]:
        """Every closed window, those of one (digest, segment) as one; they are not kept.

        What is older than `window_s` is closed now. Merged, because a report's size should not grow with the load.
        """
        with self._lock:
            for key in [k for k, w in self._open.items() if now_s - w.first_s >= self._window_s]:
                self._close(key)
            self._merge_closed()
            taken, self._closed = self._closed, deque()
        return tuple(
            Window(self._base, digest, segment, w.count, w.first_s, w.last_s, self._collect(w.sums))
            for (digest, segment), w in taken
        )

    def _close(self, key: tuple[str, str]) -> None:
        self._closed.append((key, self._open.pop(key)))
        if len(self._closed) > self._max_pending:
            self._merge_closed()

    def _merge_closed(self) -> None:
        merged: dict[tuple[str, str], _Open] = {}
        for key, window in self._closed:
            if key in merged:
                merged[key].absorb(window)
            else:
                merged[key] = window
        while len(merged) > self._max_pending:
            self.dropped += merged.pop(next(iter(merged))).count
        self._closed = deque(merged.items())
