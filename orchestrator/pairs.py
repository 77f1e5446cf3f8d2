"""Labels joined to instances that two versions answer differently. Memory only; used by the controller alone.

Either may come first. Each instance decides once, in the pass that observes it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from orchestrator.canary import PairedTest
from orchestrator.messages import Disagreement, LabelArrived
from orchestrator.state import Decided

MAX_PAIRS = 20_000  # unlabelled disagreements remembered; the oldest go first
MAX_WANTED = 100  # ids shown to those who label


class Pairs:
    """Disagreements that wait for a label, and those that got one and wait for a pass."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, Disagreement] = OrderedDict()
        self._decided: list[Decided] = []

    def take(self, pair: Disagreement, label: LabelArrived | None) -> None:
        """A disagreement, with its label where that came first."""
        self._open[pair.instance_id] = pair
        while len(self._open) > MAX_PAIRS:
            self._open.popitem(last=False)
        if label is not None:
            self.join(label)

    def join(self, label: LabelArrived) -> None:
        """A label; one of an instance that nobody disagrees on says nothing."""
        pair = self._open.pop(label.instance_id, None)
        if pair is None or len(self._decided) >= MAX_PAIRS:  # so many only where no pass has come through for long
            return
        right, against_right = pair.prediction == label.label, pair.against_prediction == label.label
        self._decided.append(Decided(pair.instance_id, pair.digest, right, pair.against, against_right))

    @property
    def decided(self) -> tuple[Decided, ...]:
        """Those that no pass has counted yet."""
        return tuple(self._decided)

    def forget(self, counted: tuple[Decided, ...]) -> None:
        """A pass has counted these, the first that there are."""
        del self._decided[: len(counted)]

    def to_json(self, test: PairedTest) -> dict[str, Any]:
        """How many labels of a test are awaited, and the newest of their instances."""
        wanted = [p.instance_id for p in self._open.values() if (p.digest, p.against) == (test.digest, test.against)]
        return {"unlabelled": len(wanted), "labels_wanted": wanted[-MAX_WANTED:][::-1]}
