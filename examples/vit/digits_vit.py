"""A small vision transformer of torchvision's for handwritten digits; uint8 (N, 32, 32, 3) in, logits (N, 10) out."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models import VisionTransformer


class DigitsViT(nn.Module):
    """Patches of 8 pixels, four layers of four heads; pre-processing is the first step of forward."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.body = VisionTransformer(
            image_size=32,
            patch_size=8,
            num_layers=4,
            num_heads=4,
            hidden_dim=64,
            mlp_dim=128,
            num_classes=num_classes,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        scaled = x.permute(0, 3, 1, 2).to(self.body.conv_proj.weight.dtype) / 127.5 - 1.0
        return self.body(scaled)


def build(num_classes: int = 10) -> nn.Module:
    """Factory named by the model spec."""
    return DigitsViT(num_classes)
