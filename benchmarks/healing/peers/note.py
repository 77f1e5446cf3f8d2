"""NOTE: instance-aware normalisation, and learning from a memory that is balanced over predicted classes.

Source: Gong et al. 2022, "NOTE: robust continual test-time adaptation against temporal correlation". Settings: tta.sh
of TaesikGong/NOTE, method NOTE on cifar10.
"""

from __future__ import annotations

import random

import torch
from torch import nn

from benchmarks.healing.peers.base import Given, Peer, batch_norms, entropy, norm_parameters, train_only
from benchmarks.healing.peers.iabn import replace_norms

MEMORY_ROWS = 64  # memory_size
EVERY = 64  # update_every_x: instances between two steps
LEARNING_RATE = 1e-4  # Adam
MOMENTUM = 0.01  # bn_momentum: of the running statistics


class Note(Peer):
    """Answers by running statistics alone, so a batch's composition does not matter; learns every 64 instances."""

    batch = EVERY

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        replace_norms(self.module, MOMENTUM)
        self.layers = batch_norms(self.module)
        self.module.eval()
        parameters = train_only(self.module, norm_parameters(self.module))
        self.optimizer = torch.optim.Adam(parameters, LEARNING_RATE * given.rate)
        self.memory = BalancedMemory(MEMORY_ROWS, given.seed)
        self._waiting = 0

    def _step(self, x: torch.Tensor) -> torch.Tensor:
        self.module.eval()
        with torch.no_grad():  # nothing changes between two steps: a batch answers as one by one would
            logits = self.module(x)
        for row, label in zip(x, logits.argmax(dim=1).tolist(), strict=True):
            self.memory.add(row, label)
        self._waiting += len(x)
        if self._waiting >= EVERY:
            self._waiting = 0
            self._learn()
        return logits

    def _learn(self) -> None:
        for layer in self.layers:
            layer.train()
        loss = entropy(self.module(torch.stack(self.memory.rows()))).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.module.eval()

    def frozen(self) -> nn.Module:
        """The model with the running statistics that it ended with."""
        return self.module.eval()


class BalancedMemory:
    """Prediction-balanced reservoir sampling: a sample of the past in which no predicted class crowds out others.

    Args:
        size: rows kept.
        seed: of the draws.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._kept: dict[int, list[torch.Tensor]] = {}
        self._met: dict[int, int] = {}
        self._rng = random.Random(seed)

    def counts(self) -> dict[int, int]:
        """Rows kept by predicted class."""
        return {label: len(rows) for label, rows in self._kept.items() if rows}

    def rows(self) -> list[torch.Tensor]:
        """All that is kept."""
        return [row for rows in self._kept.values() for row in rows]

    def add(self, row: torch.Tensor, label: int) -> None:
        """Takes a row in: in the place of one of a largest class, or, of a largest class itself, by chance."""
        self._met[label] = self._met.get(label, 0) + 1
        own = self._kept.setdefault(label, [])
        if sum(map(len, self._kept.values())) >= self.size:
            most = max(map(len, self._kept.values()))
            if len(own) == most:
                if self._rng.random() > len(own) / self._met[label]:
                    return
                crowded = own
            else:
                crowded = self._rng.choice([rows for rows in self._kept.values() if len(rows) == most])
            crowded.pop(self._rng.randrange(len(crowded)))
        own.append(row)
