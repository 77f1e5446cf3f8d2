"""A small network for card fraud: 10 numbers in, normal or fraud out."""

from __future__ import annotations

import torch
from torch import nn


class FraudNet(nn.Module):
    """Two hidden layers; forward takes float32 (N, 10) and returns logits (N, 2)."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.head(self.body(x.float()))


def build(hidden: int = 64) -> nn.Module:
    """Factory named by the model spec."""
    return FraudNet(hidden)
