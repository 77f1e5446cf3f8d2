"""Is it one replica alone? Judged on all that each of them saw since the onset, once an episode is open.

The monitor names a scope from the latest few windows, which is soon, but blames a replica whose neighbours had a lucky
moment, and misses a mild drift and bad values. Called by the controller before each diagnosis; pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from orchestrator.drift.baseline import Baseline
from orchestrator.drift.evidence import Evidence, checks_p, difference_p, evidence_of, inputs_p, outputs_p
from orchestrator.drift.statistics import merge
from orchestrator.messages import Alarm, Window

MIN_INSTANCES = 64  # of a replica and of the others together, to be judged
MAX_JUDGED = 64  # replicas; in a larger fleet the monitor's word stands
BLAMED_P, CLEARED_P = 1.0e-4, 0.01  # p-values that make a replica the culprit, and show that the others are well


def blame(baseline: Baseline, alarm: Alarm, parts: Mapping[str, Window]) -> Alarm:
    """The alarm with the scope of the one replica that strayed alone, or without the scope of one that did not.

    Args:
        baseline: of the alarm's digest.
        alarm: as the monitor attributes it; the scope of a segment is left alone.
        parts: `replica:<tag>` and what it saw since the onset, merged.
    """
    if alarm.scope.startswith("segment:") or not 2 <= len(parts) <= MAX_JUDGED:
        return alarm
    alone = [name for name in parts if _is_alone(baseline, name, parts)]
    if len(alone) == 1:
        return replace(alarm, scope=alone[0])
    return replace(alarm, scope="global")


def _is_alone(baseline: Baseline, name: str, parts: Mapping[str, Window]) -> bool:
    rest = merge(window for other, window in parts.items() if other != name)
    if min(parts[name].count, rest.count) < MIN_INSTANCES:
        return False
    own, others = evidence_of(baseline, parts[name]), evidence_of(baseline, rest)
    if _shift_p(baseline, own) >= BLAMED_P or _shift_p(baseline, others) <= CLEARED_P:
        return False
    return min(difference_p(baseline, own, others), checks_p(baseline, own)) < BLAMED_P


def _shift_p(baseline: Baseline, found: Evidence) -> float:
    return min(outputs_p(baseline, found), inputs_p(baseline, found), checks_p(baseline, found))
