"""The search space: which adapters are worth trying for a kind of drift, the cheapest first. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice, zip_longest

from torch import nn

from orchestrator.errors import AdapterError
from orchestrator.messages import Kind, Placement, SearchRequest, TrialConfig
from tuning.objective import MOSTLY_LABELLED
from tuning.targets import plan_targets

ADAPTER_RANKS = (8, 16, 4)
# (learning rate, replay weight). A look is never quite the traffic's: a high rate learns what is off about it, unless
# labels of the traffic hold against that. Without replay a high rate loses accuracy at once.
GENTLE, STRONG, WITHOUT_REPLAY = (1e-3, 1.0), (2e-3, 1.0), (2e-4, 0.0)


def search_space(request: SearchRequest, module: nn.Module, labelled_share: float) -> list[TrialConfig]:
    """At most `num_trials` configurations that this model has layers for, cheapest first.

    Recomputed norm statistics come always and first: whatever trains must beat them. A prior shift gets a logit
    correction, and training only where there are labels, of the head.

    Args:
        request: kind, epochs, seed and number of trials.
        module: the base model.
        labelled_share: of the traffic to train on, 0..1.

    Returns:
        Configurations; empty when no placement fits.
    """
    labelled = labelled_share > 0
    free = [Placement.LOGIT_CORRECTION] if request.kind is Kind.PRIOR_SHIFT else [Placement.NORM_STATISTICS]
    trained = [Placement.ALL, Placement.EARLY, Placement.NORM]
    if request.kind is Kind.PRIOR_SHIFT:
        trained = [Placement.HEAD] if labelled else []
    elif labelled:
        trained.append(Placement.HEAD)
        if request.kind is Kind.CONCEPT:
            trained = [Placement.HEAD, Placement.ALL, Placement.EARLY, Placement.NORM]
    untrained = [TrialConfig(p, seed=request.seed) for p in free if _fits(module, p)]
    grids = [_grid(request, p, labelled_share) for p in trained if _fits(module, p)]
    mixed = chain.from_iterable(zip_longest(*grids))  # every placement once before any twice
    return [*untrained, *islice((c for c in mixed if c is not None), max(0, request.num_trials - len(untrained)))]


def _fits(module: nn.Module, placement: Placement) -> bool:
    try:
        plan_targets(module, placement)
    except AdapterError:
        return False
    return True


def _grid(request: SearchRequest, placement: Placement, labelled_share: float) -> Iterator[TrialConfig]:
    """Variants of one placement: the setting that did best in trials first, then one change at a time."""
    has_rank = placement in (Placement.EARLY, Placement.ALL)
    pairs = (GENTLE, WITHOUT_REPLAY, STRONG) if labelled_share == 0 else (GENTLE, STRONG)
    if labelled_share >= MOSTLY_LABELLED:
        pairs = (STRONG, GENTLE)
    for adapter_rank in ADAPTER_RANKS if has_rank else (0,):
        for rate, weight in pairs:
            yield TrialConfig(
                placement=placement,
                adapter_rank=adapter_rank,
                learning_rate=rate,
                replay_weight=weight,
                epochs=request.epochs,
                seed=request.seed,
            )
