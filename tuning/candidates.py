"""The search space: which adapters are worth trying for a kind of drift, the cheapest first. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice, zip_longest

from torch import nn

from orchestrator.errors import AdapterError
from orchestrator.messages import Kind, Placement, SearchRequest, TrialConfig
from tuning.targets import plan_targets

ADAPTER_RANKS = (8, 4, 16)
# Learning rates: without labels 1e-3 loses accuracy from the first epoch on, 2e-4 gains (gaussian_noise, 4 epochs).
UNLABELLED_RATES = (2e-4, 5e-4, 1e-4)
LABELLED_RATES = (1e-3, 3e-4, 3e-3)
# Replay costs half as much again; without labels it changed neither accuracy (.802 and .799) nor the clean loss (.64).
UNLABELLED_REPLAY = (0.0, 0.5, 1.0)
LABELLED_REPLAY = (0.5, 1.0, 0.0)


def search_space(request: SearchRequest, module: nn.Module) -> list[TrialConfig]:
    """At most `num_trials` configurations that this model has layers for, cheapest first.

    Recomputed norm statistics come always and first: whatever trains must beat them. A prior shift gets a logit
    correction, and training only where there are labels, of the head.

    Args:
        request: kind, labels, epochs, seed and number of trials.
        module: the base model.

    Returns:
        Configurations; empty when no placement fits.
    """
    labelled = request.labels not in ("none", "0")
    free = [Placement.LOGIT_CORRECTION] if request.kind is Kind.PRIOR_SHIFT else [Placement.NORM_STATISTICS]
    trained = [Placement.NORM, Placement.EARLY, Placement.ALL]
    if request.kind is Kind.PRIOR_SHIFT:
        trained = [Placement.HEAD] if labelled else []
    elif labelled:
        trained.append(Placement.HEAD)
        if request.kind is Kind.CONCEPT:
            trained = [Placement.HEAD, Placement.ALL, Placement.EARLY, Placement.NORM]
    untrained = [TrialConfig(p, seed=request.seed) for p in free if _fits(module, p)]
    grids = [_grid(request, p, labelled) for p in trained if _fits(module, p)]
    mixed = chain.from_iterable(zip_longest(*grids))  # every placement once before any twice
    return [*untrained, *islice((c for c in mixed if c is not None), max(0, request.num_trials - len(untrained)))]


def _fits(module: nn.Module, placement: Placement) -> bool:
    try:
        plan_targets(module, placement)
    except AdapterError:
        return False
    return True


def _grid(request: SearchRequest, placement: Placement, labelled: bool) -> Iterator[TrialConfig]:
    """Variants of one placement: the setting that did best in trials first, then one change at a time."""
    has_rank = placement in (Placement.EARLY, Placement.ALL)
    rates = LABELLED_RATES if labelled else UNLABELLED_RATES
    weights = LABELLED_REPLAY if labelled else UNLABELLED_REPLAY
    for rate, weight in zip(rates, weights, strict=True):
        for adapter_rank in ADAPTER_RANKS if has_rank else (0,):
            yield TrialConfig(
                placement=placement,
                adapter_rank=adapter_rank,
                learning_rate=rate,
                replay_weight=weight,
                epochs=request.epochs,
                seed=request.seed,
            )
