"""How often could anyone be right, if one class stayed as it was? What a refusal names instead of a promise.

Called by `explain`. Without labels a drift of a table can often be read in two ways: the columns read
differently, or the other classes came nearer. In the second reading no adapter brings back what is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import SplineTransformer

NUM_FOLDS = 5
NUM_KNOTS = 8  # of the splines per column
MIN_CLASS_ROWS = 20
MAX_EXCESS = 1.2  # a class cannot hold more than all of the traffic anywhere, beyond the error of its density ratio ...
MAX_EXCESS_SHARE = 0.05  # ... but for so many instances
SHARE_TOLERANCE = 0.25  # of a class's share, by which the ratios may miss it


@dataclass(frozen=True)
class Ceiling:
    """Best accuracy anyone could have, if class `unchanged` is as in the reference and as frequent."""

    unchanged: int
    accuracy: float  # 0..1
    constant: float  # of always answering the most frequent class


def ceiling(reference_ND: np.ndarray, labels_N: np.ndarray, traffic_MD: np.ndarray) -> Ceiling | None:
    """The lowest ceiling among the classes that can have stayed as they were, for two classes.

    With r(x) = share_k p(x | k) / p_traffic(x) the best answer is right with probability max(r, 1 - r). The density
    ratio comes from a cross-fitted logistic regression on splines of the columns. A class whose ratios exceed 1,
    or do not add up to its share, has changed.

    Args:
        reference_ND: rows of the labelled reference.
        labels_N: int64, 0 or 1.
        traffic_MD: rows of the traffic, M >= 20.

    Returns:
        None where every class has changed, or has fewer than MIN_CLASS_ROWS rows.
    """
    found = []
    for k in (0, 1):
        rows_ND = reference_ND[labels_N == k]
        if min(len(rows_ND), len(traffic_MD)) < MIN_CLASS_ROWS:
            continue
        share = len(rows_ND) / len(reference_ND)
        ratio_M = share * _density_ratio(rows_ND, traffic_MD)
        adds_up = abs(float(ratio_M.mean()) - share) <= SHARE_TOLERANCE * share
        if adds_up and float((ratio_M > MAX_EXCESS).mean()) <= MAX_EXCESS_SHARE:
            best = float(np.maximum(np.clip(ratio_M, 0, 1), 1 - np.clip(ratio_M, 0, 1)).mean())
            found.append(Ceiling(k, best, max(share, 1.0 - share)))
    return min(found, key=lambda c: c.accuracy, default=None)


def _density_ratio(rows_ND: np.ndarray, traffic_MD: np.ndarray) -> np.ndarray:
    """p(x | rows) / p(x | traffic) at each traffic row, float64 (M,)."""
    x_ND = np.nan_to_num(np.concatenate([rows_ND, traffic_MD]))
    is_traffic_N = np.repeat([0, 1], [len(rows_ND), len(traffic_MD)])
    model = make_pipeline(
        SplineTransformer(n_knots=NUM_KNOTS, knots="quantile", extrapolation="linear"), LogisticRegression(max_iter=500)
    )
    p_N2 = cross_val_predict(model, x_ND, is_traffic_N, cv=NUM_FOLDS, method="predict_proba")[len(rows_ND) :]
    return np.asarray(p_N2[:, 0] / np.maximum(p_N2[:, 1], 1e-9) * len(traffic_MD) / len(rows_ND))
