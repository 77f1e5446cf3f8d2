"""Sequential test of one scope: has the traffic changed, and since when?

Windows are merged to steps (of at least 32 instances, 4 where alarms may be frequent), steps to windows of 1, 2, 4, ...
up to 8,192 instances that overlap by three quarters. Each of them is tested in each part of the `evidence` at a level
a = share * stride / threshold, where stride is how many instances pass between two such tests at the least (a busy
scope's steps are larger). So the expected number of false alarms among N instances is at most the sum of all levels
spent on them: N / threshold.

That is an e-detector whose e-values are all or nothing, 1{p <= a} / a: whatever the dependence between the tests, the
mean number of instances between false alarms is at least the threshold. Sources: Shin, Ramdas & Rinaldo 2024,
E-detectors, NEJSDS 2:229; the scan over dyadic windows is Siegmund & Venkatraman's (1995, Ann. Stat. 23:255).
Called by `monitor`; pure.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from orchestrator.drift import evidence as ev
from orchestrator.drift.baseline import Array, Baseline
from orchestrator.drift.evidence import Evidence
from orchestrator.drift.levels import CLASSES_FIRST, OVERLAP, Levels
from orchestrator.drift.null import SCALES

MIN_STEP_S = 1 / 16  # a busy scope's steps are larger rather than more frequent: a thousand replicas cost it no more
DISPERSION_STEPS = 256  # time constant of the estimate of how class counts vary from step to step
SHARE_STEPS = 32  # of the class shares that they vary about
DISPERSION_FACTOR = 4.0  # what a step of 32 shows of it: runs of one class outlast a step
MAX_BEYOND = 50.0  # mean excesses beyond a critical value that a statistic is told apart up to
_SCALES = np.array(SCALES, dtype=np.float64)


class Detector:
    """Test of one scope under one digest.

    Args:
        baseline: of the digest.
        threshold: mean number of instances between false alarms at the least, > 0.
        with_classes: whether class shares are tested, too: only the whole fleet's are known from the reference. A site
            or a replica may have a mix of its own.
    """

    def __init__(self, baseline: Baseline, threshold: float, with_classes: bool = True) -> None:
        if threshold <= 0:
            raise ValueError(f"threshold must be > 0 instances; got {threshold}")
        self.baseline = baseline
        self.threshold = threshold
        self.instances = 0
        self.onset_s = 0.0
        self._levels = Levels(baseline, threshold, with_classes)
        self._stepped_s = -math.inf
        self._pending: tuple[Array, float] | None = None  # evidence that does not fill a step yet
        # Rings of the last OVERLAP blocks of 1, 2, 4, ... steps: block number i of a ring lies at i % OVERLAP.
        rings = len(SCALES) - self._levels.first - 2
        width = ev.evidence_size(baseline)
        self._blocks_LOV = np.zeros((rings, OVERLAP, width), dtype=np.float32)
        self._starts_LO = np.zeros((rings, OVERLAP))
        self._totals_RV = np.zeros((rings + 2, width), dtype=np.float32)
        self._steps = 0
        self._found_S = np.zeros(len(SCALES))  # the statistic of the newest window of each scale
        self._shares_K = baseline.class_shares_K.copy()
        self._dispersion = 1.0
        self._tolerated_C = ev.tolerated_rates(baseline)

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
        if vector[-1] >= SCALES[self._levels.first] and abs(last_s - self._stepped_s) >= MIN_STEP_S:
            self._pending, self._stepped_s = None, last_s
            self._step(vector, since_s)
        return self.statistic >= self.threshold

    @property
    def statistic(self) -> float:
        """In how many instances of normal traffic a window as odd as the oddest newest one is seen once, >= 0."""
        return float(self._found_S.max())

    # ------------------------------------------------------------ inside

    def _step(self, vector: Array, first_s: float) -> None:
        self._steps += 1
        self._follow(Evidence(vector, self.baseline).classes_K)
        windows = []
        for ring, blocks_OV in enumerate(self._blocks_LOV):
            number, rest = divmod(self._steps, 1 << ring)
            if rest:
                break  # no new block in this ring, nor in those of larger blocks
            if ring:
                pair = self._slots(ring - 1, 2)
                vector, first_s = self._blocks_LOV[ring - 1, pair].sum(axis=0), self._starts_LO[ring - 1, pair].min()
            slot = (number - 1) % OVERLAP
            blocks_OV[slot], self._starts_LO[ring, slot] = vector, first_s
            sizes = (OVERLAP,) if ring else (1, 2, OVERLAP)
            windows += [(ring, size) for size in sizes if number >= size]
        self._test(windows)

    def _slots(self, ring: int, num: int) -> list[int]:
        """Where the last `num` blocks of a ring lie, the newest first."""
        newest = self._steps // (1 << ring) - 1
        return [(newest - i) % OVERLAP for i in range(num)]

    def _scale(self, ring: int, size: int) -> int:
        """Scale of a window of `size` blocks."""
        return self._levels.first + ring + size.bit_length() - 1

    def _follow(self, classes_K: Array) -> None:
        """Keep track of how class counts vary about their own recent mean: a shift does not count as variation."""
        num = float(classes_K.sum())
        if num == 0 or self.baseline.num_classes < 2:
            return
        expected_K = num * (self._shares_K + 1e-3)
        seen = float(((classes_K - num * self._shares_K) ** 2 / expected_K).sum()) / (self.baseline.num_classes - 1)
        self._dispersion += (seen - self._dispersion) / min(self._steps, DISPERSION_STEPS)
        self._shares_K = self._shares_K + (classes_K / num - self._shares_K) / SHARE_STEPS

    def _test(self, windows: list[tuple[int, int]]) -> None:
        """Test windows of (ring, blocks) together: operators cost more than numbers."""
        scales = [self._scale(ring, size) for ring, size in windows]
        totals_RV = self._totals_RV[: len(windows)]
        for total_V, (ring, size) in zip(totals_RV, windows, strict=True):
            np.add.reduce(self._blocks_LOV[ring, self._slots(ring, size)], axis=0, out=total_V)
        found = Evidence(totals_RV, self.baseline)
        tables = np.searchsorted(_SCALES, found.count, side="right") - 1  # a busy scope's windows hold more
        statistics_PR = self._statistics(found, scales[-1] >= CLASSES_FIRST)
        # The tail is exponential: this far beyond the critical value is so much rarer than the level.
        beyond_PR = (statistics_PR - self._levels.critical_PST[:, scales, tables]) / self._levels.tails_PT[:, tables]
        beyond_R = beyond_PR.max(axis=0)
        self._found_S[scales] = self.threshold * np.exp(np.minimum(beyond_R, MAX_BEYOND))
        row = int(beyond_R.argmax())
        if beyond_R[row] >= 0.0 and self._found_S[scales[row]] >= self.statistic:
            self.onset_s = self._onset(*windows[row], int(beyond_PR[:, row].argmax()))

    def _statistics(self, found: Evidence, with_classes: bool) -> Array:
        """Of each part in the order of SHARES: float64 (P, R)."""
        baseline = self.baseline
        factor = DISPERSION_FACTOR * self._dispersion
        nothing = np.zeros(len(found.count))
        return np.stack(
            [
                baseline.outputs.statistic(found.outputs_W, found.classes_K),
                ev.inputs_statistic(baseline, found),
                ev.classes_statistic(baseline, found.classes_K, factor) if with_classes else nothing,
                ev.checks_statistic(self._tolerated_C, found.checks_C, found.count),
            ]
        )

    def _onset(self, ring: int, size: int, part: int) -> float:
        """Start of the shortest suffix of a window that is as odd as the window: rather late than normal traffic in."""
        slots = self._slots(ring, size)
        suffixes = Evidence(self._blocks_LOV[ring, slots].cumsum(axis=0), self.baseline)
        oddest = int(self._statistics(suffixes, True)[part].argmax())
        return float(self._starts_LO[ring, slots[oddest]])

    # ------------------------------------------------------------ across restarts

    def snapshot(self) -> dict[str, Any]:
        """Arrays and numbers; instances that wait to fill a step are not kept."""
        return {
            "instances": self.instances,
            "onset_s": self.onset_s,
            "steps": self._steps,
            "found": self._found_S.tolist(),
            "shares": self._shares_K.tolist(),
            "dispersion": self._dispersion,
            "vectors": self._blocks_LOV.copy(),
            "starts": self._starts_LO.tolist(),
        }

    def restore(self, state: dict[str, Any]) -> bool:
        """Continue from a snapshot taken under the same baseline; False: of another threshold's scales, not used."""
        vectors_LOV = np.asarray(state["vectors"], dtype=np.float32)
        if vectors_LOV.shape != self._blocks_LOV.shape:
            return False
        self.instances, self._steps = int(state["instances"]), int(state["steps"])
        self.onset_s, self._dispersion = float(state["onset_s"]), float(state["dispersion"])
        self._found_S, self._shares_K = np.array(state["found"]), np.array(state["shares"])
        self._blocks_LOV, self._starts_LO = vectors_LOV.copy(), np.array(state["starts"])
        return True
