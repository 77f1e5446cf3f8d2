"""What a trial minimises, and how normalisation statistics are kept out of its way.

Pure torch over a module, batches and labels; knows nothing of trials, storage or Ray.

The main term is cross-entropy on labelled reference rows that were given the traffic's look (`restyle`): their labels
are true, and the base, which sees the same rows as they were, says more than a label. Traffic without labels adds
information maximisation: be certain of each instance, and diverse over the batch (Liang et al. 2020, SHOT). Labelled
traffic adds cross-entropy; where all of it is labelled, that replaces information maximisation. Reference rows pass in
a batch of their own, and the running statistics are recomputed from traffic alone after every epoch.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tuning.base_model import batches
from tuning.targets import has_statistics

MOSTLY_LABELLED = 0.9  # of the training rows; from here on the unlabelled terms only add noise
INFOMAX, RESTYLED, SEMI_SUPERVISED, SUPERVISED = "infomax", "restyled", "semi_supervised", "supervised"
NO_TRAINING = "none"
INFORMATION_BESIDE = 0.3  # weight of information maximisation where labelled reference rows lead
# Weight of the traffic's labels in multiples of the share of rows that have one, at most 1: a few labels, shown again
# and again, teach what is odd about them.
LABELLED_WEIGHT = 3.0
_TINY = 1e-9


def choose_objective(num_labelled: int, num_rows: int, replay_weight: float) -> str:
    """`infomax`, `restyled`, `semi_supervised` or `supervised`, by labelled training rows and weight of the replay."""
    if num_labelled == 0:
        return RESTYLED if replay_weight else INFOMAX
    return SUPERVISED if num_labelled >= MOSTLY_LABELLED * num_rows else SEMI_SUPERVISED


def information_loss(logits_NK: torch.Tensor) -> torch.Tensor:
    """Mean conditional entropy minus the entropy of the mean prediction, nats; lowest when certain and diverse.

    Args:
        logits_NK: (N, K), N >= 2.
    """
    log_NK = logits_NK.float().log_softmax(dim=1)
    p_NK = log_NK.exp()
    mean_K = p_NK.mean(dim=0)
    return (mean_K * mean_K.clamp_min(_TINY).log()).sum() - (p_NK * log_NK).sum(dim=1).mean()


def traffic_loss(
    objective: str,
    logits_NK: torch.Tensor,
    labels_N: torch.Tensor,
    information_weight: float = 1.0,
    labelled_share: float = 1.0,
) -> torch.Tensor:
    """Loss of one batch of traffic.

    Args:
        objective: see `choose_objective`.
        logits_NK: (N, K).
        labels_N: int64 (N,), -1 where unknown.
        information_weight: of the term that needs no labels.
        labelled_share: of all training rows, 0..1; not of the batch, into which labels are drawn.
    """
    known_N = labels_N >= 0
    supervised = (
        F.cross_entropy(logits_NK[known_N].float(), labels_N[known_N]) if known_N.any() else logits_NK.sum() * 0
    )
    if objective == SUPERVISED:
        return supervised
    return information_weight * information_loss(logits_NK) + min(1.0, LABELLED_WEIGHT * labelled_share) * supervised


def replay_loss(logits_NK: torch.Tensor, labels_N: torch.Tensor, taught_NK: torch.Tensor) -> torch.Tensor:
    """Loss of a batch of the labelled reference in the traffic's look, mean over its rows.

    Half of it is cross-entropy with the labels, half with what the base answers to the same rows as they were: that
    tells of each row how alike the classes are (Hinton et al. 2015).

    Args:
        logits_NK: of the model in training, on the rows with the traffic's look.
        labels_N: int64 (N,), all known.
        taught_NK: logits of the base on the rows as they were.
    """
    logits_NK = logits_NK.float()
    taught = F.cross_entropy(logits_NK, taught_NK.float().softmax(dim=1))
    return 0.5 * F.cross_entropy(logits_NK, labels_N) + 0.5 * taught


def statistics_layers(module: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """Those of the named layers that keep running statistics."""
    layers = [module.get_submodule(name) for name in names]
    return [layer for layer in layers if has_statistics(layer)]


def use_batch_statistics(module: nn.Module, layers: list[nn.Module]) -> None:
    """Eval mode (no dropout) in which only `layers` normalise by their batch."""
    module.eval()
    for layer in layers:
        layer.train()


def recompute_statistics(
    module: nn.Module, layers: list[nn.Module], inputs: np.ndarray, device: torch.device, batch: int = 250
) -> None:
    """Sets the running statistics of `layers` to the plain average over `inputs`; leaves the module in eval mode.

    Args:
        module: the model.
        layers: its normalisation layers to set; none: nothing happens.
        inputs: (N, *shape); fewer than two rows change nothing.
        device: where the module is.
        batch: rows per forward pass; a last batch of one row is left out, its variance says nothing.
    """
    module.eval()
    if not layers or len(inputs) < 2:
        return
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()  # type: ignore[operator]
        layer.momentum = None  # type: ignore[assignment]
        layer.train()
    try:
        with torch.no_grad():
            for x in batches(inputs, device, batch):
                if len(x) > 1:
                    module(x)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
            layer.eval()
