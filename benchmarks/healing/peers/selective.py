"""Entropy minimisation on chosen rows: EATA (sure, not redundant, without forgetting) and SAR (sure, flat minima).

Sources: Niu et al. 2022, "Efficient test-time model adaptation without forgetting"; Niu et al. 2023, "Towards stable
test-time adaptation in dynamic wild world". Neither published code for CIFAR-10-C; optimiser, batch, and EATA's
margin and weight are those of classification/cfgs/cifar10_c/{eata,sar}.yaml in mariodoebler/test-time-adaptation.
"""

from __future__ import annotations

import copy
import math

import torch
from torch.nn import functional as F

from benchmarks.healing.peers.base import Given, Peer, adam, entropy, norm_parameters, train_only
from tuning.base_model import batches

ENTROPY_MARGIN = 0.4  # of ln K: main.py of mr-eggplant/EATA and of mr-eggplant/SAR
SIMILARITY = 0.4  # D_MARGIN of the CIFAR-10-C settings; 0.05 is for ImageNet
MEMORY = 0.9  # of the moving averages of probabilities and of entropy: eata.py, sar.py
FISHER_WEIGHT = 1.0  # FISHER_ALPHA of the CIFAR-10-C settings; 2000 is for ImageNet
FISHER_ROWS = 2000  # fisher_size in main.py of mr-eggplant/EATA
FISHER_BATCH = 64  # batch_size there
RADIUS = 0.05  # rho of sharpness-aware minimisation: sam.py of mr-eggplant/SAR, Foret et al. 2021
RECOVERY = 0.2  # nats; a moving average of entropy below this is a collapse: sar.py
TUNED_SHARE = 0.75  # SAR leaves the last of a ResNet's four stages alone; here, the last quarter of the norm layers


class Eata(Peer):
    """Weighted entropy of rows that are sure and unlike the average answer, with a pull towards the source weights.

    Attributes:
        used: rows that took part in a step so far.
    """

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        self.parameters = train_only(self.module, norm_parameters(self.module))
        self.margin = ENTROPY_MARGIN * math.log(given.num_classes)
        self.average_K: torch.Tensor | None = None
        self.used = 0
        self.source = [p.detach().clone() for p in self.parameters]
        self.fisher = self._fisher()
        self.optimizer = adam(self.parameters, given.rate)

    def _fisher(self) -> list[torch.Tensor]:
        """Mean squared gradient of each batch's loss on its own predictions, per parameter."""
        sums = [torch.zeros_like(p) for p in self.parameters]
        count = 0
        for x in batches(self.given.source.inputs[:FISHER_ROWS], self.given.device, FISHER_BATCH):
            if len(x) < 2:
                continue
            logits = self.module(x)
            gradients = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(dim=1)), self.parameters)
            for total, gradient in zip(sums, gradients, strict=True):
                total += gradient**2
            count += 1
        return [total / max(count, 1) for total in sums]

    def chosen(self, logits_NK: torch.Tensor) -> torch.Tensor:
        """Mask bool (N,): sure enough, and unlike the moving average of what was used before."""
        logits_NK = logits_NK.detach()
        mask_N = entropy(logits_NK) < self.margin
        if self.average_K is not None:
            mask_N &= F.cosine_similarity(self.average_K[None], logits_NK.softmax(dim=1), dim=1).abs() < SIMILARITY
        return mask_N

    def _step(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.module(x)
        mask = self.chosen(logits)
        if not mask.any():
            return logits
        self.used += int(mask.sum())
        mean_K = logits[mask].detach().softmax(dim=1).mean(dim=0)
        self.average_K = mean_K if self.average_K is None else MEMORY * self.average_K + (1 - MEMORY) * mean_K
        values = entropy(logits[mask])
        loss = (values * (self.margin - values.detach()).exp()).mean()
        for parameter, fisher, origin in zip(self.parameters, self.fisher, self.source, strict=True):
            loss = loss + FISHER_WEIGHT * (fisher * (parameter - origin) ** 2).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return logits


class Sar(Peer):
    """Entropy of sure rows, its gradient taken a step uphill; back to the source weights after a collapse.

    Attributes:
        average: moving average of the entropy, nats; None before the first step.
        resets: how often it went back to the source. The authors' threshold is for a thousand classes.
    """

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        self.parameters = train_only(self.module, norm_parameters(self.module, TUNED_SHARE))
        self.margin = ENTROPY_MARGIN * math.log(given.num_classes)
        self.optimizer = adam(self.parameters, given.rate)
        self.average: float | None = None
        self.resets = 0
        self.start = copy.deepcopy((self.module.state_dict(), self.optimizer.state_dict()))

    @torch.no_grad()
    def climb(self) -> list[torch.Tensor]:
        """Moves the weights RADIUS along their gradient; returns what they were."""
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        before = [p.detach().clone() for p in self.parameters]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter += RADIUS * gradient / (norm + 1e-12)
        return before

    @torch.no_grad()
    def descend(self, before: list[torch.Tensor]) -> None:
        """Puts the weights back to what they were, to the bit."""
        for parameter, value in zip(self.parameters, before, strict=True):
            parameter.copy_(value)

    def _step(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.module(x)
        values = entropy(logits)
        sure = values.detach() < self.margin
        if not sure.any():
            return logits
        self.optimizer.zero_grad()
        values[sure].mean().backward()
        before = self.climb()
        self.optimizer.zero_grad()
        values = entropy(self.module(x))[sure]
        values = values[values.detach() < self.margin]
        if len(values):
            loss = values.mean()
            loss.backward()
        self.descend(before)
        if len(values):
            self.optimizer.step()
            self._watch(float(loss.detach()))
        return logits

    def _watch(self, value: float) -> None:
        self.average = value if self.average is None else MEMORY * self.average + (1 - MEMORY) * value
        if self.average < RECOVERY:
            self.module.load_state_dict(self.start[0])
            self.optimizer.load_state_dict(copy.deepcopy(self.start[1]))
            self.average, self.resets = None, self.resets + 1
