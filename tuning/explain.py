"""Tables without labels: is there a reading of the drift under which the old labels still say how to answer?

An image holds thousands of numbers, a look changes a few of them: what it shows stays. A table holds ten numbers, and
a drift of one of them may be a new sensor or a new kind of customer. Two readings let a search go on without labels:
every column has a new offset and gain, or the classes have new shares. Where neither fits, a trial would learn from a
fiction, and its label-free scores, which rest on the same fiction, would praise it. Both runners ask before any trial.
"""

from __future__ import annotations

import numpy as np

from tuning.scoring import logit_offset, predict
from tuning.workbench import Workbench, known_labels

MIN_P = 1e-4  # of the column that fits worst, times the number of columns


def unexplained(bench: Workbench) -> str:
    """Why a search would learn nothing true; empty where it may go on.

    Args:
        bench: the episode's data and base.
    """
    if bench.layout != "F" or bench.buffer.num_labelled:
        return ""
    old, new = _table(bench.replay.inputs), _table(bench.buffer.inputs)
    look, _ = bench.look
    offset_p, column = _worst_fit(_table(look.apply(bench.replay.inputs, np.random.default_rng(0))), new)
    if offset_p >= MIN_P:
        return ""
    shares_p, _ = _worst_fit(old[_rows_by_new_shares(bench)], new)
    if shares_p >= MIN_P:
        return ""
    name = bench.spec.columns[column] if bench.spec.columns else f"column {column}"
    reason = (
        f"without labels nothing says how to answer: neither a new offset and gain of each column ({name}: p "
        f"{offset_p:.1g} < {MIN_P:g}) nor new class shares (p {shares_p:.1g} < {MIN_P:g}) explain the traffic"
    )
    return f"{reason}{_ceiling_words(bench, old, new)}; labels of the traffic would tell"


def _ceiling_words(bench: Workbench, old: np.ndarray, new: np.ndarray) -> str:
    from tuning.separability import ceiling  # scikit-learn takes seconds to import

    labels = known_labels(bench.replay)
    if len(bench.spec.classes) != 2:
        return ""
    found = ceiling(old, labels, new)
    if found is None:
        return ""
    kept = bench.spec.classes[found.unchanged]
    usual = bench.spec.classes[int(np.bincount(labels, minlength=2).argmax())]
    return (
        f"; if {kept!r} is as it was, the ceiling of any model is {found.accuracy:.3f}, and always answering "
        f"{usual!r} is right in {found.constant:.3f}"
    )


def _rows_by_new_shares(bench: Workbench) -> np.ndarray:
    """Reference rows drawn so that classes have the shares that EM finds in the traffic."""
    labels = known_labels(bench.replay)
    old_K = bench.baseline.confusion_KK.sum(axis=0)
    logits = predict(bench.module, bench.buffer.inputs, bench.device)
    _, new_K = logit_offset(logits, bench.baseline.temperature, old_K)
    weight_N = (new_K / np.maximum(np.bincount(labels, minlength=len(new_K)), 1))[labels]
    return np.random.default_rng(0).choice(len(labels), len(labels), p=weight_N / weight_N.sum())


def _worst_fit(old: np.ndarray, new: np.ndarray) -> tuple[float, int]:
    """Smallest p-value of one column's two-sample test, times the number of columns, and the column."""
    p = [_same(a[np.isfinite(a)], b[np.isfinite(b)]) for a, b in zip(old.T, new.T, strict=True)]
    return min(1.0, min(p) * len(p)), int(np.argmin(p))


def _same(old: np.ndarray, new: np.ndarray) -> float:
    """P-value that both are of one distribution.

    Epps & Singleton 1986 sees a changed shape sooner than Kolmogorov-Smirnov, but needs values that spread.
    """
    from scipy.stats import epps_singleton_2samp, ks_2samp  # 1 s to import, and only tables need it

    if min(len(old), len(new)) < 8:
        return 1.0
    if min(np.ptp(np.quantile(part, [0.25, 0.75])) for part in (old, new)) > 0:
        try:
            return float(epps_singleton_2samp(old, new).pvalue)
        except (np.linalg.LinAlgError, ValueError):  # values on a lattice
            pass
    return float(ks_2samp(old, new).pvalue)


def _table(inputs: np.ndarray) -> np.ndarray:
    return np.asarray(inputs.reshape(len(inputs), -1), dtype=np.float64)
