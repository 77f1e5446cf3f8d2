"""Sequential test of one scope: has the traffic changed, and since when?

Windows are merged to steps of at least 32 instances, steps to windows of 32, 64, ... 8,192 that overlap by three
quarters. Each of them is tested in each part of the `evidence` at a level a = share * stride / threshold, where stride
is how many instances pass between two such tests at the least (a busy scope's steps hold more than 32). So the expected
number of false alarms among N instances is at most the sum of all levels spent on them: N / threshold.

That is an e-detector whose e-values are all or nothing, 1{p <= a} / a: whatever the dependence between the tests, the
mean number of instances between false alarms is at least the threshold. Sources: Shin, Ramdas & Rinaldo 2024,
E-detectors, NEJSDS 2:229; the scan over dyadic windows is Siegmund & Venkatraman's (1995, Ann. Stat. 23:255).
Called by `monitor`; pure.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np

from orchestrator.drift import evidence as ev
from orchestrator.drift.baseline import Array, Baseline
from orchestrator.drift.evidence import Evidence
from orchestrator.drift.null import SCALES, SURVIVAL_Q
from orchestrator.drift.statistics import CHECKS

SHARES = {"outputs": 0.6, "inputs": 0.2, "classes": 0.1, "checks": 0.1}  # of the allowed rate of false alarms
OVERLAP = 4  # a window of OVERLAP blocks moves on by one block
LEVELS = len(SCALES) - 2  # blocks of 1, 2, 4, ... steps
MIN_STEP_S = 1 / 16  # a busy scope's steps are larger rather than more frequent: a thousand replicas cost it no more
MIN_CLASS_SCALE = 4  # index of the smallest scale at which class shares are tested: traffic comes in bursts
DISPERSION_STEPS = 256  # time constant of the estimate of how class counts vary from step to step
SHARE_STEPS = 32  # of the class shares that they vary about
DISPERSION_FACTOR = 4.0  # what a step of 32 shows of it: runs of one class outlast a step


class Detector:
    """Test of one scope under one digest.

    Args:
        baseline: of the digest.
        threshold: mean number of instances between false alarms at the least, > 0.
    """

    def __init__(self, baseline: Baseline, threshold: float) -> None:
        if threshold <= 0:
            raise ValueError(f"threshold must be > 0 instances; got {threshold}")
        self.baseline = baseline
        self.threshold = threshold
        self.instances = 0
        self.onset_s = 0.0
        self._stepped_s = -math.inf
        self._pending: tuple[Array, float] | None = None  # evidence that does not fill a step yet
        self._blocks: list[deque[tuple[Array, float]]] = [deque(maxlen=OVERLAP) for _ in range(LEVELS)]
        self._steps = 0
        self._found = np.zeros(len(SCALES))  # the statistic of the newest window of each scale
        self._shares_K = baseline.class_shares_K.copy()
        self._dispersion = 1.0
        self._tolerated_C = ev.tolerated_rates(baseline)
        scales = range(len(SCALES))
        self._critical = {part: [self._critical_value(part, scale) for scale in scales] for part in SHARES}
        self._tails = {part: [self._tail(part, scale) for scale in scales] for part in SHARES}

    def absorb(self, found: Evidence, first_s: float, last_s: float) -> bool:
        """Take a window's evidence in; whether the statistic stands at or above the threshold now.

        Args:
            found: under this detector's baseline.
            first_s: time of the window's first instance, seconds.
            last_s: of its last.
        """
        self.instances += int(found.count)
        if self._pending is None:
            self._pending = found.vector, first_s
        else:
            self._pending = self._pending[0] + found.vector, min(self._pending[1], first_s)
        vector, since_s = self._pending
        if vector[-1] >= SCALES[0] and abs(last_s - self._stepped_s) >= MIN_STEP_S:
            self._pending, self._stepped_s = None, last_s
            self._step(vector, since_s)
        return self.statistic >= self.threshold

    @property
    def statistic(self) -> float:
        """In how many instances of normal traffic a window as odd as the oddest newest one is seen once, >= 0."""
        return float(self._found.max())

    # ------------------------------------------------------------ inside

    def _level(self, part: str, scale: int) -> float:
        """Probability of a false alarm that one test of this part and scale may spend."""
        scales = len(SCALES) - MIN_CLASS_SCALE if part == "classes" else len(SCALES)
        return SHARES[part] / scales * self._stride(scale) / self.threshold

    @staticmethod
    def _stride(scale: int) -> float:
        return float(max(SCALES[scale] // OVERLAP, SCALES[0]))

    def _critical_value(self, part: str, scale: int) -> float:
        """The statistic from which a part's p-value is at most its level."""
        level = self._level(part, scale)
        if part == "checks":
            return math.log(len(CHECKS) / level)
        table_T = self._table(part, scale)
        if table_T is None or (part == "classes" and scale < MIN_CLASS_SCALE):
            return math.inf
        return float(table_T[-2] + table_T[-1] * max(0.0, math.log(SURVIVAL_Q[-1] / level)))

    def _tail(self, part: str, scale: int) -> float:
        """Mean excess of a part's statistic beyond its last quantile."""
        table_T = None if part == "checks" else self._table(part, scale)
        return 1.0 if table_T is None else float(table_T[-1])

    def _table(self, part: str, scale: int) -> Array | None:
        baseline = self.baseline
        if part == "classes":
            return baseline.classes_table_T if baseline.num_classes > 1 else None
        stick = baseline.outputs if part == "outputs" else baseline.inputs
        return None if stick is None else stick.tables_ST[scale]

    def _step(self, vector: Array, first_s: float) -> None:
        self._steps += 1
        self._follow(Evidence(vector, self.baseline).classes_K)
        self._blocks[0].append((vector, first_s))
        for level in range(LEVELS):
            blocks = self._blocks[level]
            if self._steps % (1 << level):
                break  # no new block at this level, nor above
            if level == 0:
                self._test(0, list(blocks)[-1:])
                self._test(1, list(blocks)[-2:])
            self._test(level + 2, list(blocks))
            if self._steps % (2 << level) == 0 and level + 1 < LEVELS:
                (left, since_s), (right, _) = list(blocks)[-2:]
                self._blocks[level + 1].append((left + right, since_s))

    def _follow(self, classes_K: Array) -> None:
        """Keep track of how class counts vary about their own recent mean: a shift does not count as variation."""
        num = float(classes_K.sum())
        if num == 0 or self.baseline.num_classes < 2:
            return
        expected_K = num * (self._shares_K + 1e-3)
        seen = float(((classes_K - num * self._shares_K) ** 2 / expected_K).sum()) / (self.baseline.num_classes - 1)
        self._dispersion += (seen - self._dispersion) / min(self._steps, DISPERSION_STEPS)
        self._shares_K = self._shares_K + (classes_K / num - self._shares_K) / SHARE_STEPS

    def _test(self, scale: int, blocks: list[tuple[Array, float]]) -> None:
        if len(blocks) < min(1 << scale, OVERLAP):
            return
        found = Evidence(_total(blocks), self.baseline)
        statistics = self._statistics(found, scale)
        # The tail is exponential: this far beyond the critical value is so much rarer than the level.
        beyond = {part: (value - self._critical[part][scale]) / self._tails[part][scale] for part, value in statistics}
        part = max(beyond, key=beyond.__getitem__)
        self._found[scale] = self.threshold * math.exp(min(beyond[part], 50.0))
        if beyond[part] >= 0.0 and self._found[scale] >= self._found.max():
            self.onset_s = self._onset(scale, part, blocks)

    def _statistics(self, found: Evidence, scale: int) -> list[tuple[str, float]]:
        baseline = self.baseline
        parts = [
            ("outputs", baseline.outputs.statistic(found.outputs_W, found.classes_K)),
            ("inputs", ev.inputs_statistic(baseline, found)),
            ("checks", ev.checks_statistic(self._tolerated_C, found.checks_C, found.count)),
        ]
        if scale >= MIN_CLASS_SCALE:
            parts.append(
                ("classes", ev.classes_statistic(baseline, found.classes_K, DISPERSION_FACTOR * self._dispersion))
            )
        return parts

    def _onset(self, scale: int, part: str, blocks: list[tuple[Array, float]]) -> float:
        """Start of the shortest suffix of a window that is as odd as the window: rather late than normal traffic in."""
        best, onset_s = -math.inf, blocks[-1][1]
        for start in range(len(blocks) - 1, -1, -1):
            found = Evidence(_total(blocks[start:]), self.baseline)
            statistic = dict(self._statistics(found, scale))[part]
            if statistic > best:
                best, onset_s = statistic, blocks[start][1]
        return onset_s

    # ------------------------------------------------------------ across restarts

    def snapshot(self) -> dict[str, Any]:
        """Arrays and numbers; instances that wait to fill a step are not kept."""
        blocks = [[(vector.astype(np.float32), first_s) for vector, first_s in level] for level in self._blocks]
        return {
            "instances": self.instances,
            "onset_s": self.onset_s,
            "steps": self._steps,
            "found": self._found.tolist(),
            "shares": self._shares_K.tolist(),
            "dispersion": self._dispersion,
            "vectors": np.array([vector for level in blocks for vector, _ in level], dtype=np.float32),
            "starts": [[first_s for _, first_s in level] for level in blocks],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a snapshot taken under the same baseline."""
        self.instances, self._steps = int(state["instances"]), int(state["steps"])
        self.onset_s, self._dispersion = float(state["onset_s"]), float(state["dispersion"])
        self._found = np.array(state["found"])
        self._shares_K = np.array(state["shares"])
        vectors = iter(np.asarray(state["vectors"], dtype=np.float64))
        for level, starts in zip(self._blocks, state["starts"], strict=True):
            level.clear()
            level.extend((next(vectors), float(first_s)) for first_s in starts)


def _total(blocks: list[tuple[Array, float]]) -> Array:
    total = blocks[0][0]
    for vector, _ in blocks[1:]:
        total = total + vector
    return total
