"""ROID: certainty and diversity weights, a soft likelihood ratio, views that agree, weights drawn back to the source.

Source: Marsden, Doebler & Yang 2024, "Universal test-time adaptation through weight ensembling, diversity weighting,
and prior correction". Settings: ROID in classification/conf.py and cfgs/cifar10_c/roid.yaml of
mariodoebler/test-time-adaptation.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from benchmarks.healing.peers.base import (
    BATCH,
    Given,
    Peer,
    adam,
    cross_entropy,
    entropy,
    norm_parameters,
    train_only,
)
from benchmarks.healing.peers.views import view

KEPT = 0.99  # MOMENTUM_SRC: share of the adapted weights; the rest is the source's
MEMORY = 0.9  # MOMENTUM_PROBS: of the average prediction
TEMPERATURE = 1 / 3  # of the weights
CLIP, TINY = 0.99, 1e-5  # of the soft likelihood ratio: utils/losses.py


class Roid(Peer):
    """One step a batch on scales and shifts, then each a hundredth of the way back to the source."""

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        self.parameters = train_only(self.module, norm_parameters(self.module))
        self.source = [p.detach().clone() for p in self.parameters]
        self.optimizer = adam(self.parameters, given.rate)
        self.average_K = torch.full((given.num_classes,), 1 / given.num_classes, device=given.device)

    def _step(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.module(x)
        weights = self.weights(logits.detach())
        chosen = weights > 0
        if chosen.any():
            loss = (likelihood_ratio(logits[chosen]) * weights[chosen]).sum() / BATCH
            if int(chosen.sum()) > 1:
                other = self.module(view(x[chosen], self.given.layout, self.rng, smooth=False))
                loss = loss + (symmetric(other, logits[chosen]) * weights[chosen]).sum() / BATCH
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.draw_back()
        return prior_corrected(logits.detach())

    def weights(self, logits_NK: torch.Tensor) -> torch.Tensor:
        """Weight (N,) of each row: sure and unlike the average prediction; 0 for the less diverse ones."""
        p_NK = logits_NK.softmax(dim=1)
        diverse_N = unit(1 - F.cosine_similarity(self.average_K[None], p_NK, dim=1))
        sure_N = unit(-entropy(logits_NK))
        self.average_K = MEMORY * self.average_K + (1 - MEMORY) * p_NK.mean(dim=0)
        weights_N = (diverse_N * sure_N / TEMPERATURE).exp()
        return torch.where(diverse_N < diverse_N.mean(), torch.zeros_like(weights_N), weights_N)

    @torch.no_grad()
    def draw_back(self) -> None:
        """Weight ensembling: KEPT of each weight as adapted, the rest of it as it was in the source."""
        for parameter, origin in zip(self.parameters, self.source, strict=True):
            parameter.copy_(KEPT * parameter + (1 - KEPT) * origin)


def unit(values_N: torch.Tensor) -> torch.Tensor:
    """Stretched to 0..1; zeros where all are equal."""
    return (values_N - values_N.min()) / (values_N.max() - values_N.min()).clamp_min(1e-12)


def likelihood_ratio(logits_NK: torch.Tensor) -> torch.Tensor:
    """Soft likelihood ratio (N,): minus the expected log odds, whose gradient does not vanish for sure rows."""
    p_NK = logits_NK.softmax(dim=1).clamp(max=CLIP)
    return -(p_NK * (p_NK / (1 - p_NK) + TINY).log()).sum(dim=1)


def symmetric(a_NK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    """Mean of the cross-entropies (N,) in both directions."""
    return 0.5 * (cross_entropy(a_NK, b_NK) + cross_entropy(b_NK, a_NK))


def prior_corrected(logits_NK: torch.Tensor) -> torch.Tensor:
    """Answers weighted by the batch's smoothed class shares; the authors' code weights the logits themselves."""
    prior_K = logits_NK.softmax(dim=1).mean(dim=0)
    num, classes = logits_NK.shape
    smooth = max(1 / num, 1 / classes) / prior_K.max()
    return logits_NK * (prior_K + smooth) / (1 + smooth * classes)
