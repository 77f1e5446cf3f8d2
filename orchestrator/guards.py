"""Guard metrics of a version that is being rolled out, from what its replicas reported of its own answers. Pure."""

from __future__ import annotations

from orchestrator.drift.baseline import Baseline
from orchestrator.drift.statistics import read
from orchestrator.messages import Window

COLLAPSE_SHARE = 0.95  # one class at this share of the answers ...
COLLAPSE_EXCESS = 0.30  # ... and this far above its share in the reference is a collapse
MAX_BROKEN_EXCESS = 0.01  # share of answers that are not finite, above the stable version's


def anomaly(baseline: Baseline, window: Window, stable: tuple[Baseline, Window] | None, least: int) -> str:
    """What is wrong with a version's answers, in words; empty when nothing is, or when there are too few.

    Args:
        baseline: of the version.
        window: its answers since it entered the canary.
        stable: baseline and recent answers of the version that it replaces, on the same traffic; None where unknown.
        least: instances below which nothing is said.
    """
    if window.count < max(least, 1):
        return ""
    now = read(baseline.layout, window)
    broken, before = 1.0 - now.num_valid / window.count, 0.0
    if stable is not None and stable[1].count:
        before = 1.0 - read(stable[0].layout, stable[1]).num_valid / stable[1].count
    if broken > before + MAX_BROKEN_EXCESS:
        return f"answers that are not finite: share {broken:.3f} > {before + MAX_BROKEN_EXCESS:.3f}"
    top = int(now.class_shares_K.argmax())
    limit = max(COLLAPSE_SHARE, float(baseline.class_shares_K[top]) + COLLAPSE_EXCESS)
    if now.num_valid == 0 or now.class_shares_K[top] <= limit:
        return ""
    return f"predictions collapsed: class {top} share {now.class_shares_K[top]:.3f} > {limit:.3f}"
