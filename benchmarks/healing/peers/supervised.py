"""With labels: all weights, or the last layer alone, trained on the labelled rows of the stream.

Recipe of full tuning: 15 epochs as in Lee et al. 2023, "Surgical fine-tuning improves adaptation to distribution
shifts", section 3 (1,000 labelled CIFAR-10-C images; they search the rate, we fix it), AdamW with a falling rate, flips
and shifts. Statistics are the drifted stream's, unlabelled rows included, so that neither peer has to learn them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from benchmarks.healing.peers.base import Given, Peer, train_only
from benchmarks.healing.peers.training import all_views, cosine, epochs_of, fit, head_name, supervised
from tuning.base_model import FeatureTap, batches
from tuning.objective import recompute_statistics, use_batch_statistics

BATCH = 64
NUM_EPOCHS = 15
MIN_STEPS = 150  # a few labels make short epochs; they are passed over until there were this many steps
FULL_RATE, HEAD_RATE = 3e-4, 1e-3  # AdamW
WEIGHT_DECAY = 1e-4
HEAD_EPOCHS = 100  # on features made once, of each image and its mirror image


class Supervised(Peer):
    """Trains after the stream; until then the base answers."""

    online = False
    labelled = True

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        self.module.eval()

    @torch.no_grad()
    def _step(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)

    def labelled_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (M, *shape) and labels int64 (M,) of the rows whose label is known.

        Raises:
            ValueError: fewer than two.
        """
        labels_N = self.given.labels_N
        known_N = np.zeros(0, bool) if labels_N is None else labels_N >= 0
        if labels_N is None or known_N.sum() < 2:
            raise ValueError(f"supervised tuning needs >= 2 labelled rows; got {known_N.sum()}")
        return self.stream()[known_N], labels_N[known_N]


class FullTuning(Supervised):
    """All weights. Batches are normalised by themselves where a batch is full, else by the stream's statistics."""

    def frozen(self) -> nn.Module:
        """The tuned model."""
        inputs, labels = self.labelled_rows()
        device, rng = self.given.device, np.random.default_rng(self.given.seed)
        recompute_statistics(self.module, self.layers, self.stream(), device)
        optimizer = torch.optim.AdamW(
            train_only(self.module, list(self.module.parameters())),
            FULL_RATE * self.given.rate,
            weight_decay=WEIGHT_DECAY,
        )
        use_batch_statistics(self.module, self.layers if len(inputs) >= BATCH else [])
        epochs = max(NUM_EPOCHS, math.ceil(MIN_STEPS / math.ceil(len(inputs) / BATCH)))
        steps, views = list(epochs_of(len(inputs), BATCH, epochs, rng)), all_views(self.given.layout)
        fit(self.module, optimizer, inputs, steps, supervised(labels, device), cosine, lambda b: views.draw(b, rng))
        recompute_statistics(self.module, self.layers, self.stream(), device)
        return self.module


class HeadTuning(Supervised):
    """The last linear layer, on the features of the stream's statistics."""

    def frozen(self) -> nn.Module:
        """The tuned model."""
        inputs, labels = self.labelled_rows()
        device, rng = self.given.device, np.random.default_rng(self.given.seed)
        recompute_statistics(self.module, self.layers, self.stream(), device)
        name = head_name(self.module)
        head = self.module.get_submodule(name)
        tap, layout = FeatureTap(name, before=True), self.given.layout
        mirrored = inputs if layout == "F" else np.flip(inputs, axis=2 if layout == "HWC" else 3)
        both = np.concatenate([inputs, mirrored])
        with torch.no_grad():
            features = np.concatenate([tap.call(self.module, x)[1].cpu().numpy() for x in batches(both, device, 256)])
        optimizer = torch.optim.AdamW(
            train_only(self.module, list(head.parameters())), HEAD_RATE * self.given.rate, weight_decay=WEIGHT_DECAY
        )
        steps = list(epochs_of(len(both), BATCH, HEAD_EPOCHS, rng))
        loss = supervised(np.concatenate([labels, labels]), device)
        fit(head, optimizer, features, steps, loss, cosine, lambda batch: batch)
        return self.module.eval()
