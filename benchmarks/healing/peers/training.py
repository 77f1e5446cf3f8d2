"""Training after the stream, in several epochs: what SHOT and the supervised peers share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from orchestrator.messages import Placement
from tuning.augment import Views
from tuning.base_model import computes_bfloat16
from tuning.targets import plan_targets

Loss = Callable[[torch.Tensor, np.ndarray], torch.Tensor]


def head_name(module: nn.Module) -> str:
    """Name of the last linear layer.

    Raises:
        AdapterError: there is none.
    """
    return plan_targets(module, Placement.HEAD).trained[0]


def all_views(layout: str) -> Views:
    """Flips and shifts for images, nothing for tables."""
    return Views(layout != "F", layout != "F", layout)


def epochs_of(num_rows: int, batch: int, epochs: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Row numbers of each step: shuffled anew each epoch, single rows left out."""
    for _ in range(epochs):
        order = rng.permutation(num_rows)
        yield from (rows for rows in np.array_split(order, math.ceil(num_rows / batch)) if len(rows) > 1)


def fit(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: np.ndarray,
    steps: list[np.ndarray],
    loss: Loss,
    decay: Callable[[float], float],
    draw: Callable[[np.ndarray], np.ndarray],
) -> None:
    """Minimises a loss over given steps, in bfloat16 where the machine computes in it, as our own trials do.

    Args:
        module: in the mode it is to be trained in.
        optimizer: of what is trained; its rates are the first step's.
        inputs: (N, *shape).
        steps: row numbers of each step.
        loss: of logits (B, K) and the row numbers (B,).
        decay: factor of the rates at a progress 0..1.
        draw: a view of a batch.
    """
    device = next(module.parameters()).device
    rates = [group["lr"] for group in optimizer.param_groups]
    for number, rows in enumerate(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * decay(number / len(steps))
        x = torch.from_numpy(np.ascontiguousarray(draw(inputs[rows]))).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=computes_bfloat16(device)):
            logits = module(x)
        optimizer.zero_grad(set_to_none=True)
        loss(logits.float(), rows).backward()
        optimizer.step()


def cosine(progress: float) -> float:
    """Factor of the learning rate, 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def supervised(labels_N: np.ndarray, device: torch.device) -> Loss:
    """Cross-entropy on these labels."""
    return lambda logits, rows: F.cross_entropy(logits, torch.from_numpy(labels_N[rows]).to(device))
