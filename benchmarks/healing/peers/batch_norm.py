"""Normalise by the batch at test time; TENT also makes each batch's answers surer.

Sources: Schneider et al. 2020 and Nado et al. 2020 (batch statistics); Wang et al. 2021, "Tent: fully test-time
adaptation by entropy minimization". Settings: `base`.
"""

from __future__ import annotations

import torch

from benchmarks.healing.peers.base import Given, Peer, adam, entropy, norm_parameters, train_only


class BatchStatistics(Peer):
    """Each batch is normalised by its own mean and variance; nothing is learned."""

    rated = False

    @torch.no_grad()
    def _step(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


class Tent(Peer):
    """One step a batch on scales and shifts: lower mean entropy of the predictions."""

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        self.optimizer = adam(train_only(self.module, norm_parameters(self.module)), given.rate)

    def _step(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.module(x)
        self.optimizer.zero_grad()
        entropy(logits).mean().backward()
        self.optimizer.step()
        return logits
