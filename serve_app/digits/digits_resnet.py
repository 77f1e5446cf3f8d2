"""The embedded demo model: torchvision's ResNet-18, unchanged, behind its own pre-processing.

This file is published to the storage beside the weights, so it imports nothing of this project.
"""

import torch
from torch import nn
from torchvision.models import resnet18


class DigitsResNet(nn.Module):
    """ResNet-18 on uint8 images.

    Takes `[N, 32, 32, 3]` uint8 (or floats in 0..255), returns logits `[N, 10]` float32.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.net = resnet18(weights=None, num_classes=num_classes)

    def forward(self, images_NHWC: torch.Tensor) -> torch.Tensor:
        """Scale to about zero mean and unit variance on the model's own device, then classify."""
        x_NCHW = images_NHWC.permute(0, 3, 1, 2).to(self.net.fc.weight.dtype)
        logits_NK: torch.Tensor = self.net((x_NCHW / 255.0 - 0.5) / 0.25)
        return logits_NK


def build(num_classes: int = 10) -> nn.Module:
    """The spec's factory."""
    return DigitsResNet(num_classes)
