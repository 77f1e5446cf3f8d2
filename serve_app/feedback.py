"""Late labels between the moment they arrive and the next heartbeat. Pure: no clock, no Ray.

Called by `Healable`. The first label of an instance counts; a different one later is a conflict.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Sequence

from orchestrator.errors import RequestError
from orchestrator.messages import LabelArrived
from serve_app import tokens

MAX_REMEMBERED = 100_000  # labels kept to recognise repeated and conflicting ones
MAX_WAITING = 20_000  # labels waiting for a heartbeat; further ones are dropped and counted
MAX_REPORTED = 2_000  # labels in one report


class LabelBook:
    """Checks labels against their tokens and keeps them for the next report.

    Args:
        num_classes: labels must be in [0, num_classes).
    """

    def __init__(self, num_classes: int) -> None:
        self.dropped = 0
        self._num_classes = num_classes
        self._lock = threading.Lock()
        self._known: OrderedDict[str, int] = OrderedDict()
        self._waiting: deque[LabelArrived] = deque()

    def check(
        self, key: bytes, items: Sequence[tuple[str, int, int]], now_s: float
    ) -> tuple[dict[str, int], list[LabelArrived]]:
        """Check (token, row, class) triples; genuine new ones wait for `take`.

        Returns:
            Counts of accepted, unknown, expired, conflicting; and the labels that were new. A repeated equal label is
            accepted and not new.

        Raises:
            RequestError: a class out of range; nothing is taken then.
        """
        for _, _, label in items:
            if not 0 <= label < self._num_classes:
                raise RequestError(f"label must be between 0 and {self._num_classes - 1}; got {str(label)[:20]}")
        counts = dict.fromkeys(("accepted", "unknown", "expired", "conflicting"), 0)
        fresh: list[LabelArrived] = []
        for token, row, label in items:
            said = tokens.read(key, token)
            if said is None or not 0 <= row < len(said.predictions):
                counts["unknown"] += 1
            elif said.expired(now_s):
                counts["expired"] += 1
            else:
                instance = f"{said.request_id}/{row}"
                arrived = LabelArrived(instance, said.digest, said.predictions[row], label, said.predicted_s)
                counts[self._remember(arrived, fresh)] += 1
        return counts, fresh

    def _remember(self, arrived: LabelArrived, fresh: list[LabelArrived]) -> str:
        with self._lock:
            known = self._known.get(arrived.instance_id)
            if known is not None:
                return "accepted" if known == arrived.label else "conflicting"
            self._known[arrived.instance_id] = arrived.label
            while len(self._known) > MAX_REMEMBERED:
                self._known.popitem(last=False)
            if len(self._waiting) < MAX_WAITING:
                self._waiting.append(arrived)
            else:
                self.dropped += 1
        fresh.append(arrived)
        return "accepted"

    def take(self) -> tuple[LabelArrived, ...]:
        """Up to MAX_REPORTED labels for a report, oldest first; they are not kept."""
        with self._lock:
            count = min(len(self._waiting), MAX_REPORTED)
            return tuple(self._waiting.popleft() for _ in range(count))
