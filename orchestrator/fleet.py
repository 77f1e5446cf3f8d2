"""What the orchestrator knows about its replicas: who reported what, and when. Used by the controller alone.

A report is counted once: each incarnation of a replica numbers its reports, a number seen before is a repeat and a
number left out is a loss that is reported as one.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, replace

from orchestrator.messages import Alarm, Report
from orchestrator.state import ReplicaView

FORGET_S = 300.0  # a replica silent for this long leaves the table
MAX_PAST = 4096  # processes that others followed, remembered at once
OUTAGE_S = 10.0  # failed requests are counted over this long
OUTAGE_MIN_FAILED = 20  # fewer failures in that time are no outage, whatever their share
OUTAGE_SHARE = 0.2  # of requests that fail
WELL_SHARE = 0.02  # failing share up to which the other replicas are well
HEARING_S = 3.0  # the other replicas are given this long to report on their own requests


@dataclass(frozen=True)
class _Row:
    view: ReplicaView
    sequence: int
    lost: int
    dropped: int
    versions: tuple[str, ...]
    requests: int
    compared: int  # instances that two versions answered


@dataclass(frozen=True)
class _Requests:
    """Requests of one report."""

    at_s: float
    tag: str
    answered: int
    failed: int


class Fleet:
    """The table of replicas, and how their requests fared of late."""

    def __init__(self) -> None:
        self._rows: dict[str, _Row] = {}
        self._past: OrderedDict[tuple[str, str], int] = OrderedDict()  # last sequence of processes that others followed
        self._recent: deque[_Requests] = deque()
        self.repeated = 0

    def knows(self, replica_tag: str) -> bool:
        """Whether this replica has reported before."""
        return replica_tag in self._rows

    def admit(self, report: Report, now_s: float) -> bool:
        """Note a report; False when it was counted before (repeated or late)."""
        row = self._rows.get(report.replica_tag)
        same = row is not None and row.view.incarnation == report.incarnation
        if not same and (report.replica_tag, report.incarnation) in self._past:
            return self._admit_late(report)
        if same and row is not None and report.sequence <= row.sequence:
            self.repeated += 1
            self._rows[report.replica_tag] = replace(row, view=replace(row.view, last_seen_s=now_s))
            return False
        lost, answered, failed = 0 if row is None else row.lost, 0, 0
        if row is not None and not same:
            self._past[report.replica_tag, row.view.incarnation] = row.sequence
            while len(self._past) > MAX_PAST:
                self._past.popitem(last=False)
        if same and row is not None:
            lost += report.sequence - row.sequence - 1
            answered, failed = report.requests - row.requests, report.errors - row.view.errors
        if answered or failed:
            self._recent.append(_Requests(now_s, report.replica_tag, answered, failed))
        while self._recent and now_s - self._recent[0].at_s > OUTAGE_S:
            self._recent.popleft()
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
        self._rows[report.replica_tag] = _Row(
            view, report.sequence, lost, report.dropped, report.versions, report.requests, report.compared
        )
        return True

    def _admit_late(self, report: Report) -> bool:
        """A report of a process that another one has followed: counted once, but the replica is the later one."""
        key = report.replica_tag, report.incarnation
        if report.sequence <= self._past[key]:
            self.repeated += 1
            return False
        self._past[key] = report.sequence
        return True

    def outage(self, digest: str, now_s: float) -> Alarm | None:
        """Requests that fail by the dozen: on one replica alone, or on all; None while there is no such thing.

        Args:
            digest: stable, for the alarm.
            now_s: seconds since the epoch.
        """
        recent = [r for r in self._recent if now_s - r.at_s <= OUTAGE_S]
        failed: Counter[str] = Counter()
        total: Counter[str] = Counter()
        for r in recent:
            failed[r.tag] += r.failed
            total[r.tag] += r.answered + r.failed
        num_failed, num = sum(failed.values()), max(sum(total.values()), 1)
        worst = max(failed, key=failed.__getitem__, default="")
        if failed[worst] < OUTAGE_MIN_FAILED and num_failed < OUTAGE_MIN_FAILED:
            return None
        # What the others answered before it began says nothing: an outage, too, is first reported by one replica.
        begun_s = min((r.at_s for r in recent if r.tag == worst and r.failed), default=now_s)
        heard = [r for r in recent if r.tag != worst and r.at_s >= begun_s]
        if not heard and len(total) > 1 and now_s - begun_s < HEARING_S:
            return None
        heard = heard or [r for r in recent if r.tag != worst]
        others, num_failing = sum(r.answered + r.failed for r in heard), sum(r.failed for r in heard)
        alone = others > 0 and num_failing <= WELL_SHARE * others
        share = failed[worst] / total[worst] if alone else num_failed / num
        if share < OUTAGE_SHARE:
            return None
        scope = f"replica:{worst}" if alone else "global"
        return Alarm(scope, digest, share, OUTAGE_SHARE, recent[0].at_s, now_s, num, cause="failures")

    def views(self, now_s: float) -> tuple[ReplicaView, ...]:
        """All replicas heard of lately, by tag."""
        self._rows = {tag: row for tag, row in self._rows.items() if now_s - row.view.last_seen_s < FORGET_S}
        return tuple(self._rows[tag].view for tag in sorted(self._rows))

    def lost_reports(self) -> int:
        """Reports that never arrived, of the replicas in the table, whichever process sent them."""
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
                "compared": row.compared,
                "lost_reports": row.lost,
                "failure": row.view.failure,
            }
            for tag, row in sorted(self._rows.items())
        ]
