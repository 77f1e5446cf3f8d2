"""What all peers share: one interface, and the parts of a model that most of them touch.

Called by `peer_run`. A peer knows a module whose forward takes a batch as it arrives, and nothing of scenes or scores.
Who normalises by the batch at test time has no fixed model; to freeze one, its running statistics are set to the plain
average over the whole stream (`tuning.objective.recompute_statistics`), the kindest choice for it.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from orchestrator.datasets import Dataset
from tuning.base_model import FeatureTap
from tuning.objective import recompute_statistics, use_batch_statistics
from tuning.targets import has_statistics, is_norm

# Tent, CoTTA and ROID name the same values for CIFAR-10-C: cfgs/tent.yaml of DequanWang/tent,
# cifar/cfgs/cifar10/cotta.yaml of qinenergy/cotta, classification/cfgs/cifar10_c/roid.yaml of
# mariodoebler/test-time-adaptation.
BATCH = 200
LEARNING_RATE = 1e-3  # Adam, one step a batch
BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class Given:
    """What a peer may use.

    Attributes:
        module: the base; a peer works on copies of it.
        tap: reads the input of its classifier.
        device: where it is.
        source: labelled clean rows of the reference; EATA alone looks at them, without labels.
        num_classes: K.
        layout: HWC, CHW or F.
        labels_N: int64 (N,), of the stream's rows in order, -1 where unknown; None without labels.
        seed: of all that a peer draws.
        rate: the authors' learning rate is multiplied by this.
    """

    module: nn.Module
    tap: FeatureTap
    device: torch.device
    source: Dataset
    num_classes: int
    layout: str = "HWC"
    labels_N: np.ndarray | None = None
    seed: int = 0
    rate: float = 1.0


class Peer(ABC):
    """A method: sees the stream batch by batch, answers each batch at once, and can be frozen afterwards.

    Attributes:
        batch: rows that the authors adapt on at a time.
        online: whether its answers to a batch differ from the base's; False for those who train after the stream.
        rated: whether it has a learning rate.
        labelled: whether it needs labels.
    """

    batch: ClassVar[int] = BATCH
    online: ClassVar[bool] = True
    rated: ClassVar[bool] = True
    labelled: ClassVar[bool] = False

    def __init__(self, given: Given) -> None:
        self.given = given
        self.module = copy.deepcopy(given.module)
        self.layers = batch_norms(self.module)
        self.rng = torch.Generator().manual_seed(given.seed)
        self._seen: list[np.ndarray] = []
        use_batch_statistics(self.module, self.layers)

    def adapt(self, x: torch.Tensor) -> torch.Tensor:
        """Answers a batch and learns from it.

        Args:
            x: (N, *shape), as the module's forward takes it.

        Returns:
            Logits or log probabilities (N, K) that a caller would have got at that moment.
        """
        self.keep(x)
        return self._step(x).detach()

    def keep(self, x: torch.Tensor) -> None:
        """Remembers a batch without answering it."""
        self._seen.append(x.cpu().numpy())

    def stream(self) -> np.ndarray:
        """All rows seen, (N, *shape)."""
        return np.concatenate(self._seen)

    def frozen(self) -> nn.Module:
        """The model after the stream, in eval mode; it no longer changes. Call it once, at the end."""
        recompute_statistics(self.module, self.layers, self.stream(), self.given.device)
        return self.module

    @abstractmethod
    def _step(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of a batch, and one step of learning from it."""


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """Layers with running statistics, in the order in which they were built."""
    return [layer for layer in module.modules() if has_statistics(layer)]


def train_only(module: nn.Module, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Asks for gradients of these parameters and of no others; returns them."""
    module.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def norm_parameters(module: nn.Module, share: float = 1.0) -> list[nn.Parameter]:
    """Scales and shifts of the first `share` of the normalisation layers.

    Raises:
        ValueError: the module has none.
    """
    norms = [layer for layer in module.modules() if is_norm(layer)]
    chosen = norms[: max(1, round(share * len(norms)))]
    parameters = [p for layer in chosen for p in layer.parameters(recurse=False)]
    if not parameters:
        raise ValueError("a peer that tunes normalisation needs layers with scale and shift; the module has none")
    return parameters


def adam(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """Adam with the common settings, learning rate LEARNING_RATE * rate."""
    return torch.optim.Adam(parameters, LEARNING_RATE * rate, betas=BETAS)


def entropy(logits_NK: torch.Tensor) -> torch.Tensor:
    """Of each row's prediction, (N,) nats."""
    return cross_entropy(logits_NK, logits_NK)


def cross_entropy(target_NK: torch.Tensor, logits_NK: torch.Tensor) -> torch.Tensor:
    """Of predictions under soft targets, both given as logits: (N,) nats."""
    return -(target_NK.softmax(dim=1) * logits_NK.log_softmax(dim=1)).sum(dim=1)
