"""Instance-aware batch normalisation: NOTE's layer, put in the place of every 2-D batch normalisation.

Source: Gong et al. 2022, "NOTE: robust continual test-time adaptation against temporal correlation". The authors train
the source model with this layer; a base that was trained with plain batch normalisation, as ours, is at a disadvantage.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

WIDTH = 4.0  # iabn_k in tta.sh of TaesikGong/NOTE: standard errors that an instance may stray uncorrected


class InstanceAwareNorm(nn.BatchNorm2d):
    """Normalises by running (eval) or batch (train) statistics, corrected for instances far from them."""

    @classmethod
    def replacing(cls, layer: nn.BatchNorm2d, momentum: float) -> InstanceAwareNorm:
        """One with the layer's weights and running statistics."""
        new = cls(layer.num_features, layer.eps, momentum, layer.affine)
        new.load_state_dict(layer.state_dict())
        new.train(layer.training)
        return new.to(next(layer.buffers()).device)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """Same shape; positions of one instance and channel share mean and variance."""
        assert self.running_mean is not None
        assert self.running_var is not None
        positions = x_NCHW.shape[2] * x_NCHW.shape[3]
        if self.training:
            var_C, mean_C = torch.var_mean(x_NCHW, dim=(0, 2, 3), unbiased=True)
            with torch.no_grad():
                self.running_mean.lerp_(mean_C, self.momentum or 0.0)
                self.running_var.lerp_(var_C, self.momentum or 0.0)
        else:
            var_C, mean_C = self.running_var, self.running_mean
        mean, var = mean_C.view(1, -1, 1, 1), var_C.view(1, -1, 1, 1)
        if positions > 1:
            own_var, own_mean = torch.var_mean(x_NCHW, dim=(2, 3), keepdim=True, unbiased=True)
            noise = var + self.eps
            mean = mean + _beyond(own_mean - mean, WIDTH * (noise / positions).sqrt())
            var = (var + _beyond(own_var - var, WIDTH * noise * math.sqrt(2 / (positions - 1)))).clamp_min(0)
        y = (x_NCHW - mean) * (var + self.eps).rsqrt()
        return y * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1) if self.affine else y


def _beyond(value: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """What of a value lies outside plus and minus `width`."""
    return F.relu(value - width) - F.relu(-value - width)


def replace_norms(module: nn.Module, momentum: float) -> None:
    """Puts an instance-aware layer in the place of every 2-D batch normalisation with running statistics."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d and child.track_running_stats:
            setattr(module, name, InstanceAwareNorm.replacing(child, momentum))
        else:
            replace_norms(child, momentum)
