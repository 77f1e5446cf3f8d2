"""SHOT: the classifier stays, the rest learns to be sure, diverse and true to pseudo-labels from class centroids.

Source: Liang, Hu & Feng 2020, "Do we really need to access the source data?". Settings: object/image_target.py of
tim-learn/SHOT; they have none for CIFAR-10-C. Our base has no bottleneck, so all layers get the backbone's rate.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.healing.peers.base import Given, Peer, train_only
from benchmarks.healing.peers.training import all_views, epochs_of, fit, head_name
from tuning.base_model import batches
from tuning.objective import information_loss, use_batch_statistics

NUM_EPOCHS = 15  # max_epoch; pseudo-labels are made anew before each, as `interval` is 15 too
BATCH = 64
LEARNING_RATE = 1e-3  # lr 1e-2 * lr_decay1 0.1, the backbone's
WEIGHT_DECAY, MOMENTUM = 1e-3, 0.9  # with Nesterov
GAMMA, POWER = 10.0, 0.75  # rate falls as (1 + GAMMA progress) ** -POWER
PSEUDO_WEIGHT = 0.3  # cls_par; information maximisation has weight 1 (ent_par)
ROUNDS = 2  # of centroids and labels


class Shot(Peer):
    """Offline: trains on the whole stream after it ended. Until then the base answers.

    Attributes:
        epochs: passes over the stream.
    """

    online = False

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        self.module.eval()
        self.epochs = NUM_EPOCHS

    @torch.no_grad()
    def _step(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)

    def frozen(self) -> nn.Module:
        """The trained model, with the running statistics that training left."""
        inputs, device = self.stream(), self.given.device
        head = self.module.get_submodule(head_name(self.module))
        kept = {id(p) for p in head.parameters()}
        parameters = train_only(self.module, [p for p in self.module.parameters() if id(p) not in kept])
        rate = LEARNING_RATE * self.given.rate
        optimizer = torch.optim.SGD(parameters, rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
        rng, views = np.random.default_rng(self.given.seed), all_views(self.given.layout)
        for epoch in range(self.epochs):
            pseudo = torch.from_numpy(self.pseudo_labels(inputs)).to(device)
            use_batch_statistics(self.module, self.layers)
            for group in optimizer.param_groups:
                group["lr"] = rate

            def loss(logits: torch.Tensor, rows: np.ndarray, pseudo: torch.Tensor = pseudo) -> torch.Tensor:
                return information_loss(logits) + PSEUDO_WEIGHT * F.cross_entropy(logits, pseudo[rows])

            steps = list(epochs_of(len(inputs), BATCH, 1, rng))
            fit(
                self.module,
                optimizer,
                inputs,
                steps,
                loss,
                lambda progress, epoch=epoch: (1 + GAMMA * (epoch + progress) / self.epochs) ** -POWER,
                lambda batch: views.draw(batch, rng),
            )
        return self.module.eval()

    @torch.no_grad()
    def pseudo_labels(self, inputs: np.ndarray) -> np.ndarray:
        """Labels int64 (N,) of the nearest centroids, by the model as it is."""
        self.module.eval()
        pairs = [self.given.tap.call(self.module, x) for x in batches(inputs, self.given.device, 256)]
        logits_NK, features_ND = (torch.cat([pair[i].float().cpu() for pair in pairs]) for i in range(2))
        return centroid_labels(features_ND, logits_NK.softmax(dim=1)).numpy()


def centroid_labels(features_ND: torch.Tensor, p_NK: torch.Tensor) -> torch.Tensor:
    """Labels (N,) by nearest class centroid in direction; centroids weighted by `p_NK` first, then by the labels.

    A class that no row is nearest to, or that no row was predicted as at first, gets no centroid.
    """
    ones = torch.ones(len(features_ND), 1)
    unit_ND = F.normalize(torch.cat([features_ND, ones], dim=1), dim=1)
    labels_N = p_NK.argmax(dim=1)
    for _ in range(ROUNDS):
        centroids_KD = p_NK.T @ unit_ND / (p_NK.sum(dim=0)[:, None] + 1e-8)
        near_NK = unit_ND @ F.normalize(centroids_KD, dim=1).T
        empty_K = torch.bincount(labels_N, minlength=p_NK.shape[1]) == 0
        labels_N = near_NK.masked_fill(empty_K[None], -torch.inf).argmax(dim=1)
        p_NK = F.one_hot(labels_N, p_NK.shape[1]).float()
    return labels_N
