"""How much of the allowed rate of false alarms each test of a detector may spend, and where it alarms.

The levels of all tests per instance sum to 1 / threshold. Called by `detector`; pure.
"""

from __future__ import annotations

import math

import numpy as np

from orchestrator.drift.baseline import Array, Baseline
from orchestrator.drift.null import SCALES, critical_value
from orchestrator.drift.statistics import CHECKS

SHARES = {"outputs": 0.6, "inputs": 0.2, "classes": 0.1, "checks": 0.1}  # of the allowed rate of false alarms
OVERLAP = 4  # a window of OVERLAP blocks moves on by one block
PLAIN_FIRST = SCALES.index(32)  # index of the smallest scale that is always tested
CLASSES_FIRST = SCALES.index(512)  # traffic comes in bursts: class shares need more
# Windows below 32 instances are tested only where a false alarm may be this likely: a null table is drawn from some
# 4,000 windows, and what it says of one in a million is least certain where an odd instance or two make the mean.
MIN_LEVEL = 1.0e-5


class Levels:
    """Of one detector.

    Attributes:
        first: index of the smallest scale that is tested.
        critical_PST: the statistic from which a part's window of a scale alarms, when its null is that of a table;
            inf where it is not tested. Parts in the order of SHARES.
        tails_PT: mean excess of a part's statistic beyond the last quantile of a table.
    """

    def __init__(self, baseline: Baseline, threshold: float, with_classes: bool = True) -> None:
        self.threshold = threshold
        self.first = 0
        while self.first < PLAIN_FIRST and self.level("outputs", self.first) < MIN_LEVEL:
            self.first += 1
        tables = {part: _tables(baseline, part) for part in SHARES}
        self.critical_PST = np.full((len(SHARES), len(SCALES), len(SCALES)), math.inf)
        self.tails_PT = np.ones((len(SHARES), len(SCALES)))
        for p, part in enumerate(SHARES):
            if (part != "checks" and not tables[part]) or (part == "classes" and not with_classes):
                continue
            for scale in range(self._first_of(part), len(SCALES)):
                level = self.level(part, scale)
                if part == "checks":
                    self.critical_PST[p, scale] = math.log(len(CHECKS) / level)
                else:
                    self.critical_PST[p, scale] = [critical_value(level, table_T) for table_T in tables[part]]
            if tables[part]:
                self.tails_PT[p] = [table_T[-1] for table_T in tables[part]]

    def level(self, part: str, scale: int) -> float:
        """Probability of a false alarm that one test of this part and scale may spend."""
        scales = len(SCALES) - self._first_of(part)
        return min(SHARES[part] / scales * self.stride(scale) / self.threshold, 1.0)

    def stride(self, scale: int) -> float:
        """Instances between two tests of a scale at the least."""
        return float(max(SCALES[scale] // OVERLAP, SCALES[self.first]))

    def is_tested(self, part: str, scale: int) -> bool:
        """Whether a part is tested at a scale."""
        return bool(np.isfinite(self.critical_PST[list(SHARES).index(part), scale]).all())

    def _first_of(self, part: str) -> int:
        return {"classes": CLASSES_FIRST, "checks": PLAIN_FIRST}.get(part, self.first)


def _tables(baseline: Baseline, part: str) -> list[Array]:
    """Null table of each scale; none where the part is not tested, or needs none."""
    if part == "classes":
        return [baseline.classes_table_T] * len(SCALES) if baseline.num_classes > 1 else []
    stick = {"outputs": baseline.outputs, "inputs": baseline.inputs}.get(part)
    return [] if stick is None else list(stick.tables_ST)
