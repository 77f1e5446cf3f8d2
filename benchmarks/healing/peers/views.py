"""The augmentation that CoTTA and ROID share: colours, then a small affine move, then (CoTTA) blur and noise.

Ranges: `get_tta_transforms` in cifar/cotta.py of qinenergy/cotta; ROID's variant (reflected edges, no blur, no noise)
in classification/augmentations/transforms_cotta.py of mariodoebler/test-time-adaptation. As there, one draw is used for
the whole batch. Written with torch and torchvision's colour functions on images of 0..1, rounded back to bytes, as a
model under test takes its inputs as they arrive.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F
from torchvision.transforms import functional as colour

BRIGHTNESS, CONTRAST, SATURATION = (0.6, 1.4), (0.7, 1.3), (0.5, 1.5)
HUE, GAMMA = (-0.06, 0.06), (0.7, 1.3)
DEGREES, SHIFT, SCALE = 15.0, 1 / 16, (0.9, 1.1)
BLUR_SIGMA, NOISE = (0.001, 0.5), 0.005
FLIP = 0.5


def view(x: torch.Tensor, layout: str, rng: torch.Generator, smooth: bool) -> torch.Tensor:
    """A random view of a batch of images.

    Args:
        x: uint8, HWC (N, H, W, C) or CHW (N, C, H, W); anything else comes back unchanged.
        layout: HWC, CHW or F.
        rng: draws the view.
        smooth: True for CoTTA's blur and noise and repeated edges, False for ROID's reflected edges.

    Returns:
        A tensor like `x`.
    """
    if x.ndim != 4 or x.dtype != torch.uint8:
        return x
    images = (x if layout == "CHW" else x.permute(0, 3, 1, 2)).float() / 255
    images = move(jitter(images, rng), rng, "border" if smooth else "reflection")
    if smooth:
        images = blur(images, _between(BLUR_SIGMA, rng))
    if float(torch.rand((), generator=rng)) < FLIP:
        images = images.flip(3)
    if smooth:
        images = images + NOISE * torch.randn(images.shape, generator=rng).to(images.device)
    drawn = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return drawn if layout == "CHW" else drawn.permute(0, 2, 3, 1).contiguous()


def jitter(images_NCHW: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Brightness, contrast, saturation, hue and gamma, in random order; the middle two need three channels."""
    steps = [
        (colour.adjust_brightness, BRIGHTNESS),
        (colour.adjust_contrast, CONTRAST),
        (lambda images, value: colour.adjust_gamma(images.clamp(1e-8, 1), value), GAMMA),
    ]
    if images_NCHW.shape[1] == 3:
        steps += [(colour.adjust_saturation, SATURATION), (colour.adjust_hue, HUE)]
    elif images_NCHW.shape[1] != 1:
        steps.pop(1)  # contrast is defined over grey, which needs one channel or three
    for number in torch.randperm(len(steps), generator=rng).tolist():
        change, span = steps[number]
        images_NCHW = change(images_NCHW, _between(span, rng))
    return images_NCHW


def move(images_NCHW: torch.Tensor, rng: torch.Generator, edges: str) -> torch.Tensor:
    """Turns, moves and scales all images alike; `edges` says what lies outside, as `grid_sample` names it."""
    angle = math.radians(_between((-DEGREES, DEGREES), rng))
    scale = _between(SCALE, rng)
    dx, dy = (2 * _between((-SHIFT, SHIFT), rng) for _ in range(2))  # grid_sample's image is 2 wide
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    theta = torch.tensor([[cos, sin, dx], [-sin, cos, dy]], device=images_NCHW.device)
    grid = F.affine_grid(theta.expand(len(images_NCHW), 2, 3), list(images_NCHW.shape), align_corners=False)
    return F.grid_sample(images_NCHW, grid, mode="bilinear", padding_mode=edges, align_corners=False)


def blur(images_NCHW: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur, 5 x 5, edges reflected."""
    weights = torch.exp(-0.5 * (torch.arange(-2.0, 3.0, device=images_NCHW.device) / sigma) ** 2)
    weights = weights / weights.sum()
    channels = images_NCHW.shape[1]
    padded = F.pad(images_NCHW, (2, 2, 2, 2), mode="reflect")
    across = F.conv2d(padded, weights.view(1, 1, 1, 5).expand(channels, 1, 1, 5), groups=channels)
    return F.conv2d(across, weights.view(1, 1, 5, 1).expand(channels, 1, 5, 1), groups=channels)


def _between(span: tuple[float, float], rng: torch.Generator) -> float:
    return span[0] + (span[1] - span[0]) * float(torch.rand((), generator=rng))
