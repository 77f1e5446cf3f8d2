"""Runs trials one after the other in the caller's process: rehearsals, and clusters with no CPU left to reserve."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from orchestrator.errors import HealError
from orchestrator.messages import TrialConfig, TrialResult
from tuning.trainable import Exported, TrialRun
from tuning.workbench import Workbench

HOPELESS = 0.02  # a trial this far below the best score after an epoch is stopped

log = logging.getLogger("rayheal")


def run_trials(
    bench: Workbench,
    configs: Sequence[TrialConfig],
    deadline_s: float,
    on_trial: Callable[[TrialResult], None] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> list[tuple[TrialResult, Exported | None]]:
    """Cheapest first; the first runs in any case, the others while there is time.

    Args:
        bench: the episode's data and base.
        configs: what to try, in order.
        deadline_s: seconds since the epoch.
        on_trial: told each result as its trial ends.
        cancelled: asked between epochs; True ends it all.

    Returns:
        Results with their adapters; None for an adapter of a trial that failed.
    """
    trials: list[tuple[TrialResult, Exported | None]] = []
    best = float("-inf")
    for number, config in enumerate(configs):
        if cancelled() or (number and time.time() >= deadline_s):
            break
        trials.append(_run_trial(bench, config, f"{bench.request.episode}-{number}", deadline_s, best, cancelled))
        result = trials[-1][0]
        best = max(best, result.score) if result.score == result.score else best
        if on_trial is not None:
            on_trial(result)
    return trials


def _run_trial(
    bench: Workbench,
    config: TrialConfig,
    trial_id: str,
    deadline_s: float,
    best: float,
    cancelled: Callable[[], bool],
) -> tuple[TrialResult, Exported | None]:
    try:
        run = TrialRun(bench, config, trial_id, deadline_s)
        while run.epoch == 0 or not run.done:
            if run.step()["score"] < best - HOPELESS or cancelled():
                return run.result("stopped"), run.export()
        return run.result(), run.export()
    except (HealError, RuntimeError) as error:  # out of memory, an op the device lacks: the others may still work
        log.warning("trial %s failed: %s", trial_id, error)
        return TrialResult(trial_id, config, "failed", error=f"{type(error).__name__}: {error}"), None


def describe(winner: TrialResult | None, base_score: float, results: Sequence[TrialResult]) -> str:
    """The choice in one line, with its inequality."""
    if winner is not None:
        return f"{winner.config.placement} score {winner.score:.3f} > base {base_score:.3f}"
    failed = [r for r in results if r.status == "failed"]
    best = max((r.score for r in results if r.score == r.score), default=float("nan"))
    words = f"no trial beat the base by the margin: best score {best:.3f}, base {base_score:.3f}"
    return words + (f"; {len(failed)} failed, first: {failed[0].error}" if failed else "")
