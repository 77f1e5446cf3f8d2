"""CoTTA: a student follows a slowly moving teacher that looks at many views; some weights return to the source.

Source: Wang et al. 2022, "Continual test-time domain adaptation". Settings: cifar/cfgs/cifar10/cotta.yaml and
cifar/cotta.py of qinenergy/cotta.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from benchmarks.healing.peers.base import Given, Peer, adam, batch_norms, cross_entropy, train_only
from benchmarks.healing.peers.views import view
from tuning.objective import recompute_statistics

TEACHER_MEMORY = 0.999  # MT
RESTORE = 0.01  # RST: probability that a weight returns to the source
SURE = 0.92  # AP: mean confidence of the source from which one view is enough
NUM_VIEWS = 32


class Cotta(Peer):
    """All weights of the student learn; the teacher answers.

    Attributes:
        teacher: exponential moving average of the student.
    """

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        self.anchor = copy.deepcopy(self.module).requires_grad_(False)
        self.teacher = copy.deepcopy(self.module).requires_grad_(False)
        self.optimizer = adam(train_only(self.module, list(self.module.parameters())), given.rate)

    def _step(self, x: torch.Tensor) -> torch.Tensor:
        student = self.module(x)
        target = self.target(x)
        self.optimizer.zero_grad()
        cross_entropy(target, student).mean().backward()
        self.optimizer.step()
        self.follow()
        restore(self.module, self.anchor, RESTORE, self.rng)
        return target

    @torch.no_grad()
    def target(self, x: torch.Tensor) -> torch.Tensor:
        """The teacher's logits (N, K): of the batch as it is, or averaged over views where the source is unsure."""
        if self.anchor(x).softmax(dim=1).max(dim=1).values.mean() >= SURE:
            return self.teacher(x)
        views = [self.teacher(view(x, self.given.layout, self.rng, smooth=True)) for _ in range(NUM_VIEWS)]
        return torch.stack(views).mean(dim=0)

    @torch.no_grad()
    def follow(self) -> None:
        """Moves the teacher's weights towards the student's."""
        for slow, fast in zip(self.teacher.parameters(), self.module.parameters(), strict=True):
            slow.copy_(TEACHER_MEMORY * slow + (1 - TEACHER_MEMORY) * fast)

    def frozen(self) -> nn.Module:
        """The teacher, with the stream's statistics."""
        self.layers = batch_norms(self.teacher)
        recompute_statistics(self.teacher, self.layers, self.stream(), self.given.device)
        return self.teacher


@torch.no_grad()
def restore(module: nn.Module, source: nn.Module, probability: float, rng: torch.Generator) -> None:
    """Puts each single weight back to the source's with a probability."""
    for parameter, origin in zip(module.parameters(), source.parameters(), strict=True):
        back = torch.rand(parameter.shape, generator=rng).to(parameter.device) < probability
        parameter.copy_(torch.where(back, origin, parameter))
