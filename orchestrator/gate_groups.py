"""The gate's checks on parts of the traffic: an adapter that gains on average may not pay with one class or one site.

Called by `gate`. A class is judged on labelled rows alone: those of the traffic, and those of the reference's gate part
shown as the traffic would show them. A segment is judged on its labels where it has some, on label-free estimates, and
on how much of it still looks like the reference: replicas serve one target to every segment, so what an adapter costs
on the old world hits in full the camera whose world did not change. Pure.

Many parts are compared, so each test's level is SIGNIFICANCE over their number (Bonferroni), and what differs by chance
or by little passes. The price is power: with ten classes the smallest loss that can be seen is 8 rows against none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist

from orchestrator.messages import Compared, GateEvidence, Kind, SegmentEstimate
from orchestrator.metric import sign_test

Check = tuple[str, float, float, bool]  # name, value, limit, passed

SIGNIFICANCE = 0.05  # one-sided, shared by all classes, or all segments, that are compared
MAX_RECALL_FALL = 0.05  # of a class; a smaller fall is not held against a gain of the whole
ESTIMATE_SLACK = 0.02  # label-free estimates repeat to about this; only a fall beyond it is a veto
ROUNDING = 1e-9  # of the figures: 0.90 - 0.87 is no more than 0.03
ENOUGH_LABELS = 20  # true labels of a class or segment that outrank what was judged without them


def class_checks(evidence: GateEvidence, kind: Kind) -> Iterator[tuple[Check, str]]:
    """The class that fared worst, and every other that fails: on true labels, then on rows with the traffic's look.

    A class fails when its recall fell by more than MAX_RECALL_FALL, significantly (exact sign test on its rows), and
    its F1 fell too: a base that answers one class to everything recalls that class better than any healing can keep.
    True labels of the class outrank the look's rows. A prior shift is exempt, for there recalls must move; in a concept
    drift the reference's labels are of the old world, and only the traffic's count.
    """
    if kind is Kind.PRIOR_SHIFT:
        return
    yield from _recalls(evidence.labelled_classes, evidence.num_labelled_classes, "in labelled traffic")
    if kind is not Kind.CONCEPT:
        known = _unharmed(evidence.labelled_classes)
        rows = [row for row in evidence.classes if row.name not in known]
        yield from _recalls(rows, evidence.num_classes, "with the traffic's look")


def _recalls(rows: Sequence[Compared], num: int, where: str) -> Iterator[tuple[Check, str]]:
    level = SIGNIFICANCE / max(num, 1)
    for place, row in enumerate(rows):
        p = sign_test(row.losses, row.wins)
        fell = row.base - row.candidate > MAX_RECALL_FALL and row.f1_candidate < row.f1_base
        failed = p < level and fell
        if failed or place == 0:
            name = f"p of harm to class {row.name} {where}"
            words = (
                f"class {row.name} {where}: recall under the candidate {row.candidate:.2f} < under the base "
                f"{row.base:.2f} (losses {row.losses} > wins {row.wins}, p {p:.2g} < {level:.2g})"
            )
            yield (name, p, level if fell else 0.0, not failed), words


def segment_checks(
    evidence: GateEvidence, kind: Kind, loss: float, max_clean_loss: float
) -> Iterator[tuple[Check, str]]:
    """The segment that fared worst, and every other that fails: labels, clean loss, estimates.

    Args:
        evidence: what was measured.
        kind: of the drift; under a concept drift no estimate counts.
        loss: score lost on the reference, unweighted.
        max_clean_loss: what may be lost of it in a segment, weighted by the share there.
    """
    yield from _labelled_segments(evidence.labelled_segments)
    shares = sorted((s for s in evidence.segments if math.isfinite(s.share)), key=lambda s: (-s.share, s.name))
    for place, segment in enumerate(shares):
        weighted = loss * segment.share
        failed = weighted > max_clean_loss + ROUNDING
        if failed or place == 0:
            name = f"clean loss in segment {segment.name}"
            words = f"{name} {weighted:.3f} > max_clean_loss {max_clean_loss:.3f} (share {segment.share:.2f} and more)"
            yield (name, weighted, max_clean_loss, not failed), words
    if kind is not Kind.CONCEPT:
        known = _unharmed(evidence.labelled_segments)
        yield from _estimated_segments([s for s in evidence.segments if s.name not in known])


def _labelled_segments(rows: Sequence[Compared]) -> Iterator[tuple[Check, str]]:
    level = SIGNIFICANCE / max(len(rows), 1)
    for place, row in enumerate(rows):
        p = sign_test(row.losses, row.wins)
        if p < level or place == 0:
            words = (
                f"segment {row.name}: right only under the candidate {row.wins} < only under the base {row.losses} "
                f"of {row.instances} labels (p {p:.2g} < {level:.2g})"
            )
            yield (f"p of harm by labels in segment {row.name}", p, level, p >= level), words


def _estimated_segments(segments: Sequence[SegmentEstimate]) -> Iterator[tuple[Check, str]]:
    """An estimate vetoes where even its upper bound fell by more than the slack."""
    known = [s for s in segments if math.isfinite(s.estimate_change) and math.isfinite(s.estimate_error)]
    if not known:
        return
    sigmas = NormalDist().inv_cdf(1.0 - SIGNIFICANCE / len(known))
    at_best = sorted((s.estimate_change + sigmas * s.estimate_error, s.name, s) for s in known)
    for place, (value, name, segment) in enumerate(at_best):
        if value < -ESTIMATE_SLACK or place == 0:
            words = (
                f"segment {name}: estimated accuracy {segment.estimate_change:+.3f}, at best {value:+.3f} "
                f"< {-ESTIMATE_SLACK:+.3f} ({segment.instances} instances)"
            )
            passed = value >= -ESTIMATE_SLACK
            yield (f"estimated gain at best in segment {name}", value, -ESTIMATE_SLACK, passed), words


def _unharmed(rows: Sequence[Compared]) -> set[str]:
    """Names that enough true labels show no fall of."""
    return {row.name for row in rows if row.instances >= ENOUGH_LABELS and row.candidate >= row.base}
