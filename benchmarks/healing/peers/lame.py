"""LAME: the model stays as it is; a batch's answers are corrected so that neighbours agree.

Source: Boudiaf et al. 2022, "Parameter-free online test-time adaptation". Affinity of the nearest neighbours with
KNN = 5: configs/method/best/LAME/overall_best.yaml of fiveai/LAME, and the choice of Gong et al. 2022 (NOTE) for
CIFAR-10-C, whose batch of 64 is taken too; the authors have no CIFAR settings of their own.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.healing.peers.base import Given, Peer

NEIGHBOURS = 5
NUM_STEPS = 100  # STEPS in configs/method/default/lame.yaml; it stops sooner when the objective does not move
CONVERGED = 1e-8  # relative


class Lame(Peer):
    """Nothing is learned. After the stream the base is what is left."""

    batch = 64
    rated = False

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        self.module.eval()
        self.layers = []

    @torch.no_grad()
    def _step(self, x: torch.Tensor) -> torch.Tensor:
        logits, features = self.given.tap.call(self.module, x)
        return agree(logits.float().log_softmax(dim=1), affinity(features.float())).clamp_min(1e-20).log()

    def frozen(self) -> nn.Module:
        """The base."""
        return self.module.eval()


def affinity(features_ND: torch.Tensor) -> torch.Tensor:
    """(N, N): 1 where the column is one of the row's NEIGHBOURS nearest others in direction."""
    unit_ND = F.normalize(features_ND, dim=1)
    near_NN = unit_ND @ unit_ND.T
    near_NN.fill_diagonal_(-torch.inf)
    number = min(NEIGHBOURS, len(near_NN) - 1)
    return torch.zeros_like(near_NN).scatter_(1, near_NN.topk(number, dim=1).indices, 1.0)


def agree(log_p_NK: torch.Tensor, affinity_NN: torch.Tensor) -> torch.Tensor:
    """Assignments (N, K) by the concave-convex procedure: close to the model's answers, smooth over neighbours."""
    z_NK = log_p_NK.exp()
    last = torch.inf
    for step in range(NUM_STEPS):
        pull_NK = affinity_NN @ z_NK
        z_NK = (log_p_NK + pull_NK).softmax(dim=1)
        value = float((z_NK * (z_NK.clamp_min(1e-20).log() - log_p_NK - pull_NK)).sum())
        if step > 1 and abs(value - last) <= CONVERGED * abs(last):
            break
        last = value
    return z_NK
