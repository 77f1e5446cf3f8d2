"""The edges of the controller as Protocols: live (Ray, storage) and rehearsed (in-process) ones fit the same holes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from orchestrator.messages import GateEvidence, SearchRequest, SearchStatus

if TYPE_CHECKING:
    from orchestrator.drift.baseline import Baseline


class TrialRunner(Protocol):
    """Runs searches and measurements. Every call is idempotent and returns at once."""

    def launch(self, request: SearchRequest) -> None:
        """Start the search of `request.episode` unless it runs or has ended."""

    def status(self, episode: str) -> SearchStatus:
        """How that search stands."""

    def cancel(self, episode: str) -> None:
        """End that search."""

    def measure(self, request: SearchRequest, digest: str) -> None:
        """Start to measure a candidate beside the base on the gate data of that search."""

    def evidence(self, episode: str, digest: str) -> GateEvidence | None:
        """What was measured, or None while it is not there yet."""


class Records(Protocol):
    """The journal."""

    def append(self, event: str, body: dict[str, Any], state: dict[str, Any], *, time_s: float | None = None) -> int:
        """Write one entry; raises when another orchestrator wrote there."""

    def replay(self) -> dict[str, Any] | None:
        """The state of the last entry."""

    def entries(self, after: int = -1) -> list[Any]:
        """Entries with a higher sequence number."""


class Baselines(Protocol):
    """Where the drift baselines of a digest come from."""

    def load(self, digest: str) -> Baseline | None:
        """The baseline, or None while there is none."""

    def prepare_base(self) -> None:
        """Start to measure the base's own baseline; idempotent."""


class Stable(Protocol):
    """The record that replicas start from when the orchestrator is away."""

    def write(self, generation: int, digest: str) -> None:
        """Replace it."""


class MonitorSnapshots(Protocol):
    """The drift monitor's state across restarts."""

    def save(self, data: bytes) -> None:
        """Replace it."""

    def load(self) -> bytes | None:
        """The last one, or None."""


@dataclass(frozen=True)
class Ports:
    """All edges of one controller."""

    runner: TrialRunner
    records: Records
    baselines: Baselines
    stable: Stable
    snapshots: MonitorSnapshots
