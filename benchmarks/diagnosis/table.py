"""What is right to say about a kind, and the tables of it in Markdown."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.diagnosis.episodes import Scene
from benchmarks.diagnosis.service import NO_ALARM, Outcome

Found = Sequence[tuple[Scene, Outcome]]

SAID = (
    NO_ALARM, "none", "outage", "replica_fault", "suspicious_source", "data_quality", "prior_shift",
    "covariate_benign", "covariate_harmful", "concept", "unknown", "undecided",
)  # fmt: skip
# Beside the kind itself. A drift that does no harm may go unseen; a fault that no rule knows may fit a check.
ALSO_RIGHT: Mapping[str, tuple[str, ...]] = {
    "none": (NO_ALARM,),
    "covariate_benign": (NO_ALARM, "none"),
    "unknown": ("data_quality",),
    "faults_under_drift": ("unknown", "data_quality"),
    "held_out_faults": ("unknown", "data_quality"),
    "held_out_drifts": ("covariate_harmful",),
}


def is_right(scene: Scene, outcome: Outcome) -> bool:
    """Whether the service said what is true."""
    return outcome.kind == scene.kind or outcome.kind in ALSO_RIGHT.get(scene.kind, ())


def confusion(found: Found) -> list[str]:
    """Rows: what was true; columns: what was said."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    right: Counter[str] = Counter()
    for scene, outcome in found:
        counts[scene.kind][outcome.kind] += 1
        right[scene.kind] += is_right(scene, outcome)
    said = [name for name in SAID if any(row[name] for row in counts.values())]
    lines = [_row(["true \\ said", *said, "right"]), _row(["---", *["---:"] * (len(said) + 1)])]
    for kind, row in counts.items():
        share = right[kind] / sum(row.values())
        lines.append(_row([kind, *(str(row[name] or "") for name in said), f"{share:.1%}"]))
    return lines


def by_change(found: Found, losses: Mapping[str, float]) -> list[str]:
    """A row per kind and change: true loss where known, right share, what was said, delay of the alarm."""
    groups: dict[tuple[str, str], list[tuple[Scene, Outcome]]] = defaultdict(list)
    for scene, outcome in found:
        groups[scene.kind, scene.change].append((scene, outcome))
    lines = [
        _row(["true kind", "change", "points lost", "estimated", "right", "searches", "alarm after", "said"]),
        _row(["---", "---", *["---:"] * 5, "---"]),
    ]
    for (kind, change), group in groups.items():
        said = Counter(outcome.kind for _, outcome in group)
        alarms = sorted(o.alarm_after for _, o in group if o.alarm_after >= 0)
        lines.append(
            _row(
                [
                    kind,
                    change,
                    f"{100 * losses[change]:.1f}" if change in losses else "",
                    f"{100 * sum(o.estimated_loss for _, o in group) / len(group):.1f}",
                    f"{sum(is_right(s, o) for s, o in group)}/{len(group)}",
                    str(sum(o.searched for _, o in group)),
                    str(alarms[len(alarms) // 2]) if alarms else "-",
                    ", ".join(f"{name} {count}" for name, count in said.most_common()),
                ]
            )
        )
    return lines


def searches(found: Found, kinds: Iterable[str], changes: tuple[str, ...] | None = None) -> str:
    """How many of these episodes launched a search."""
    of = [o for s, o in found if s.kind in kinds and (changes is None or s.change.split(" on ")[0] in changes)]
    num = sum(o.searched for o in of)
    return f"{num} of {len(of)}" + (f" ({num / len(of):.2%})" if of else "")


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
