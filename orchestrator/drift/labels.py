"""Do true labels say that the model errs more than it should? The only way to see concept drift.

A bet on each label as it arrives, valid whenever it is looked at. Labels must be a random sample of the traffic: those
asked for on purpose say more about the hard cases than about the model. Called by the controller; pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

EXCESSES = (0.05, 0.1, 0.2, 0.4)  # error rates bet on, above what is tolerated
REFERENCE_SIGMAS = 2.0  # standard errors of the reference's error rate that are forgiven
MAX_SUM = 1e15
ONSET_LOG_CUSUM = 1.0  # evidence below this does not date an onset


def tolerated_error(accuracy: float, reference_count: int, harm_threshold: float) -> float:
    """Error rate that is no drift: the reference's, its sampling error, and the loss that counts as harmless; 0..1."""
    error = 1.0 - accuracy
    slack = REFERENCE_SIGMAS * math.sqrt(max(error * (1.0 - error), 1e-4) / max(reference_count, 1))
    return min(max(error + slack + harm_threshold, 1e-3), 0.95)


@dataclass
class LabelTest:
    """Sequential test of one digest's error rate.

    Each label multiplies a Shiryaev-Roberts sum R = (1 + R) e by the likelihood ratio of a higher error rate against
    the tolerated one; at any error rate up to that E[e] <= 1, so mean labels between false alarms >= the threshold.

    Args:
        tolerated: error rate, 0..1, see `tolerated_error`.
        threshold: mean number of labels between false alarms at the least.
    """

    tolerated: float
    threshold: float
    labels: int = 0
    errors: int = 0
    onset_s: float = 0.0
    _sums: list[float] = field(default_factory=lambda: [0.0] * len(EXCESSES))
    _log_cusum: float = 0.0

    def absorb(self, wrong: bool, time_s: float) -> bool:
        """Take a label in; whether the statistic stands at or above the threshold.

        Args:
            wrong: the prediction was another class.
            time_s: when it was predicted, seconds.
        """
        self.labels += 1
        self.errors += wrong
        ratios = [self._ratio(excess, wrong) for excess in EXCESSES]
        self._sums = [min((1.0 + s) * e, MAX_SUM) for s, e in zip(self._sums, ratios, strict=True)]
        if self._log_cusum < ONSET_LOG_CUSUM:
            self.onset_s = time_s
        self._log_cusum = max(0.0, self._log_cusum + math.log(sum(ratios) / len(ratios)))
        return self.statistic >= self.threshold

    @property
    def statistic(self) -> float:
        """Mean of the Shiryaev-Roberts sums, >= 0."""
        return sum(self._sums) / len(self._sums)

    def _ratio(self, excess: float, wrong: bool) -> float:
        other = min(self.tolerated + excess, 0.5 * (1.0 + self.tolerated))
        return other / self.tolerated if wrong else (1.0 - other) / (1.0 - self.tolerated)
