"""What the orchestrator knows about its replicas: who reported what, and when. Used by the controller alone.

A report is counted once: each incarnation of a replica numbers its reports, a number seen before is a repeat and a
number left out is a loss that is reported as one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchestrator.messages import Report
from orchestrator.state import ReplicaView

FORGET_S = 300.0  # a replica silent for this long leaves the table


@dataclass(frozen=True)
class _Row:
    view: ReplicaView
    sequence: int
    lost: int
    dropped: int
    versions: tuple[str, ...]


class Fleet:
    """The table of replicas."""

    def __init__(self) -> None:
        self._rows: dict[str, _Row] = {}
        self.repeated = 0

    def admit(self, report: Report, now_s: float) -> bool:
        """Note a report; False when it was counted before (repeated or late)."""
        row = self._rows.get(report.replica_tag)
        same = row is not None and row.view.incarnation == report.incarnation
        if same and row is not None and report.sequence <= row.sequence:
            self.repeated += 1
            self._rows[report.replica_tag] = replace(row, view=replace(row.view, last_seen_s=now_s))
            return False
        lost = 0
        if same and row is not None:
            lost = row.lost + report.sequence - row.sequence - 1
        view = ReplicaView(
            tag=report.replica_tag,
            incarnation=report.incarnation,
            generation=report.generation,
            digest=report.digest,
            last_seen_s=now_s,
            instances=report.instances,
            errors=report.errors,
            failure=report.failure,
            base=report.base,
        )
        self._rows[report.replica_tag] = _Row(view, report.sequence, lost, report.dropped, report.versions)
        return True

    def views(self, now_s: float) -> tuple[ReplicaView, ...]:
        """All replicas heard of lately, by tag."""
        self._rows = {tag: row for tag, row in self._rows.items() if now_s - row.view.last_seen_s < FORGET_S}
        return tuple(self._rows[tag].view for tag in sorted(self._rows))

    def lost_reports(self) -> int:
        """Reports that never arrived, over the incarnations alive."""
        return sum(row.lost for row in self._rows.values())

    def to_json(self, now_s: float, replica_lost_s: float) -> list[dict[str, object]]:
        """The table for the state page."""
        return [
            {
                "replica": tag,
                "generation": row.view.generation,
                "digest": row.view.digest,
                "versions": list(row.versions),
                "age_s": round(now_s - row.view.last_seen_s, 2),
                "live": now_s - row.view.last_seen_s <= replica_lost_s,
                "instances": row.view.instances,
                "errors": row.view.errors,
                "dropped": row.dropped,
                "lost_reports": row.lost,
                "failure": row.view.failure,
            }
            for tag, row in sorted(self._rows.items())
        ]
