"""Base and candidate on the same rows: per class, per segment, on the declared metric, and how far an estimate holds.

Called by `finish` for the gate's evidence. Without labels on the traffic, the labelled gate part of the reference
stands in for it, shown as the traffic would show it (`Workbench.in_the_mix`): rows that trained nothing and chose
nothing. That stands for traffic whose look changed, not for one whose meaning did, and only as well as the look was
found. Knows no storage and decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from orchestrator.messages import Compared, SegmentEstimate
from orchestrator.metric import Z_95, f1, metric_name, score, sign_test, swap_test
from tuning.buffer import UNLABELLED, Buffer
from tuning.scoring import predict
from tuning.workbench import Workbench, known_labels

JUDGED_ROWS = 500  # of the reference's gate part, each through base and candidate: 1,000 forward passes
MAX_KEPT = 32  # classes kept in the evidence, which the journal repeats: those that fared worst
MIN_BOUND_ROWS = 32  # of either sample, for a normal approximation of their means
MIN_ESTIMATE_ROWS = 32  # of a segment, as of the whole gate part
MIN_SHARE_ROWS = 64  # of a segment, to tell how much of it looks like the reference
Chances = tuple[np.ndarray, np.ndarray]  # answers int64 (N,) and estimated chances of being right, float (N,)
UNNAMED = "unnamed"  # stands for the segment of rows that name none
MAX_ASKED = 20  # ids of instances whose labels are asked for
SHARE_Z = 2.326  # one-sided 99%: the worst of some segments is taken


@dataclass(frozen=True)
class LookRows:
    """Labelled reference rows as the traffic would show them, with both models' logits.

    Attributes:
        labels_N: int64 (N,).
        weights_N: float64 (N,), mean 1: they restore the reference's class shares, as rare classes are kept whole.
        base_NK, candidate_NK: logits.
    """

    labels_N: np.ndarray
    weights_N: np.ndarray
    base_NK: np.ndarray
    candidate_NK: np.ndarray


def see_look_rows(bench: Workbench, twin: nn.Module) -> LookRows:
    """At most JUDGED_ROWS rows of the reference's gate part through both models.

    Where there are more, each class gives as many as the others until it has no more: the power to see a class get
    worse lies in its own rows.
    """
    labels = known_labels(bench.reference_gate)
    rng = np.random.default_rng(bench.request.seed)
    rows = _balanced_rows(labels, rng)
    labels_N = labels[rows]
    mixed = bench.in_the_mix(bench.reference_gate.inputs[rows], rng)
    weights_N = np.bincount(labels)[labels_N] / np.bincount(labels_N)[labels_N]
    return LookRows(
        labels_N=labels_N,
        weights_N=weights_N / weights_N.mean(),
        base_NK=predict(bench.module, mixed, bench.device),
        candidate_NK=predict(twin, mixed, bench.device),
    )


def _balanced_rows(labels_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Row numbers in order; of each class at most the number at which all of them make JUDGED_ROWS."""
    counts_K = np.bincount(labels_N)
    order = rng.permutation(len(labels_N))
    cap = max((c for c in range(1, JUDGED_ROWS + 1) if np.minimum(counts_K, c).sum() <= JUDGED_ROWS), default=0)
    if cap == 0:  # more classes than rows: none of them can be judged, all of them together can
        return np.sort(order[:JUDGED_ROWS])
    kept = [order[labels_N[order] == k][:cap] for k in np.flatnonzero(counts_K)]
    return np.sort(np.concatenate(kept))


def look_evidence(bench: Workbench, rows: LookRows) -> dict[str, Any]:
    """Fields of the evidence: accuracy on the look rows with its change, and the recalls per class."""
    base_N, candidate_N = rows.base_NK.argmax(axis=1), rows.candidate_NK.argmax(axis=1)
    base_right_N, right_N = ((answers == rows.labels_N).astype(float) for answers in (base_N, candidate_N))
    change_N = rows.weights_N * (right_N - base_right_N)
    classes = compare_classes(bench.spec.classes, rows.labels_N, base_N, candidate_N)
    return {
        "look_instances": len(rows.labels_N),
        "look_base": float((rows.weights_N * base_right_N).mean()),
        "look_change": float(change_N.mean()),
        "look_change_error": _standard_error(change_N),
        "num_classes": len(classes),
        "classes": classes[:MAX_KEPT],
    }


def compare_classes(
    names: tuple[str, ...], labels_N: np.ndarray, base_N: np.ndarray, candidate_N: np.ndarray
) -> tuple[Compared, ...]:
    """Recall and F1 of every class that has rows, the one that fared worst first.

    The F1 is taken as if all classes were equally frequent: else the false alarms among many others would hide what
    happens to a rare one.

    Args:
        names: of the classes, in the order of the logits.
        labels_N: int64 (N,), all known.
        base_N: int64 (N,), answers.
        candidate_N: int64 (N,), answers.
    """
    weights_N = 1.0 / np.bincount(labels_N)[labels_N]
    found = []
    for k in np.unique(labels_N):
        is_class_N = labels_N == k
        scores = [f1(is_class_N, answers_N == k, weights_N) for answers_N in (base_N, candidate_N)]
        right = [(answers_N == k)[is_class_N] for answers_N in (base_N, candidate_N)]
        found.append(_compared(names[k], right[0], right[1], scores[0], scores[1]))
    return _worst_first(found)


def decisive_evidence(gate: Buffer, base: Chances, candidate: Chances) -> dict[str, Any]:
    """Fields of the evidence that say whose labels would tell the two models apart.

    Only instances that they answer differently can; the surer both are, the surer one of them is right.

    Args:
        gate: held-out traffic, N rows.
        base: its answers and the estimated chances that they are right.
        candidate: the same.
    """
    differ = np.flatnonzero(base[0] != candidate[0])
    sure_first = differ[np.argsort(-(base[1] + candidate[1])[differ], kind="stable")]
    unknown = sure_first[gate.labels[sure_first] == UNLABELLED]
    return {"disagreements": len(differ), "decisive": tuple(str(name) for name in gate.ids[unknown[:MAX_ASKED]])}


def labelled_evidence(bench: Workbench, gate: Buffer, base_NK: np.ndarray, candidate_NK: np.ndarray) -> dict[str, Any]:
    """Fields of the evidence from the true labels of the traffic; none without labels."""
    known_N = gate.labels != UNLABELLED
    if not known_N.any():
        return {}
    labels_N = gate.labels[known_N]
    base_N, candidate_N = (x.argmax(axis=1)[known_N] for x in (base_NK, candidate_NK))
    base_right_N, right_N = base_N == labels_N, candidate_N == labels_N
    metric, names = bench.spec.metric, bench.spec.classes
    classes = compare_classes(names, labels_N, base_N, candidate_N)
    found = {
        "labelled": len(labels_N),
        "labelled_base": float(base_right_N.mean()),
        "labelled_candidate": float(right_N.mean()),
        "labelled_wins": int((right_N & ~base_right_N).sum()),
        "labelled_losses": int((base_right_N & ~right_N).sum()),
        "labelled_metric_base": score(metric, names, labels_N, base_N),
        "labelled_metric_candidate": score(metric, names, labels_N, candidate_N),
        "num_labelled_classes": len(classes),
        "labelled_classes": classes[:MAX_KEPT],
        "labelled_segments": _compare_segments(gate.segments[known_N], base_right_N, right_N),
    }
    if metric_name(metric) != "accuracy":
        gain, harm = swap_test(metric, names, labels_N, base_N, candidate_N, bench.request.seed)
        found |= {"labelled_p_gain": gain, "labelled_p_harm": harm}
    return found


def _compare_segments(segments_N: np.ndarray, base_N: np.ndarray, candidate_N: np.ndarray) -> tuple[Compared, ...]:
    names = np.unique(segments_N)
    if len(names) < 2:
        return ()
    return _worst_first(
        [_compared(str(s) or UNNAMED, base_N[segments_N == s], candidate_N[segments_N == s]) for s in names]
    )


def _compared(name: str, base_N: np.ndarray, candidate_N: np.ndarray, *f1_scores: float) -> Compared:
    wins, losses = int((candidate_N & ~base_N).sum()), int((base_N & ~candidate_N).sum())
    return Compared(name, len(base_N), float(base_N.mean()), float(candidate_N.mean()), wins, losses, *f1_scores)


def _worst_first(found: list[Compared]) -> tuple[Compared, ...]:
    return tuple(sorted(found, key=lambda row: (sign_test(row.losses, row.wins), row.candidate - row.base, row.name)))


def segment_evidence(
    gate: Buffer, change_N: np.ndarray, seen_segments_M: np.ndarray, drifted_M: np.ndarray | None
) -> tuple[SegmentEstimate, ...]:
    """Each segment's figures without labels; none where all traffic is of one segment.

    Args:
        gate: held-out traffic, N rows.
        change_N: estimated chance that the candidate is right, less the base's.
        seen_segments_M: segments of more rows, those whose look was compared with the reference's.
        drifted_M: bool, rows that look least like the reference; None: not told apart.
    """
    names = np.unique(np.concatenate([gate.segments, seen_segments_M]))
    if len(names) < 2:
        return ()
    found = []
    for name in names:
        change = change_N[gate.segments == name]
        enough = len(change) >= MIN_ESTIMATE_ROWS
        alike = np.empty(0) if drifted_M is None else ~drifted_M[seen_segments_M == name]
        found.append(
            SegmentEstimate(
                name=str(name) or UNNAMED,
                instances=len(change),
                estimate_change=float(change.mean()) if enough else float("nan"),
                estimate_error=_standard_error(change) if enough else float("nan"),
                share=_wilson_lower(alike) if len(alike) >= MIN_SHARE_ROWS else float("nan"),
            )
        )
    return tuple(found)


def _wilson_lower(is_so_N: np.ndarray) -> float:
    """Lower bound of a share, one-sided at SHARE_Z. Source: Wilson 1927, J. Am. Stat. Assoc. 22:209."""
    num, share = len(is_so_N), float(is_so_N.mean())
    spread = SHARE_Z * np.sqrt(share * (1.0 - share) / num + SHARE_Z**2 / (4 * num**2))
    return float(max(0.0, (share + SHARE_Z**2 / (2 * num) - spread) / (1.0 + SHARE_Z**2 / num)))


def estimate_bound(confidence_N: np.ndarray, rows: LookRows, look_confidence_M: np.ndarray) -> float:
    """Lower 95% bound of the candidate's accuracy on the traffic, without its labels.

    estimate + min(0, gap) - 1.645 sqrt(se(estimate)^2 + se(gap)^2): the estimate is the mean calibrated confidence on
    the traffic, the gap what the look rows' true labels say about such an estimate (right - confident, on average).

    What it does not bound: a change of meaning (concept drift), which no unlabelled row shows; a look that was found
    wrong, or traffic of other class shares, on which confidence errs otherwise than on the look rows; dependence
    between rows. It is 95% for one candidate, not for the best of many: yet the rows chose nothing.

    Args:
        confidence_N: calibrated, of the candidate on the traffic.
        rows: labelled rows with the traffic's look.
        look_confidence_M: of the candidate on them, with the same temperature.

    Returns:
        0..1; nan where either side has fewer than 32 rows.
    """
    if min(len(confidence_N), len(look_confidence_M)) < MIN_BOUND_ROWS:
        return float("nan")
    right_M = rows.candidate_NK.argmax(axis=1) == rows.labels_N
    gap_M = rows.weights_N * (right_M - look_confidence_M)
    error = np.hypot(_standard_error(confidence_N), _standard_error(gap_M))
    return float(np.clip(confidence_N.mean() + min(0.0, float(gap_M.mean())) - Z_95 * error, 0.0, 1.0))


def _standard_error(values_N: np.ndarray) -> float:
    """Of their mean; nan for fewer than two."""
    return float(values_N.std(ddof=1) / np.sqrt(len(values_N))) if len(values_N) > 1 else float("nan")
