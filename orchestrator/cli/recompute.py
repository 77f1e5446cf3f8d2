"""Was every reply computed wholly by the version that it claims? The client does the sum again and compares.

Used by `heal demo` after its traffic: all replies near a swap, a share of the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from orchestrator.cli.load import Sent
from orchestrator.datasets import Dataset
from orchestrator.messages import BASE
from orchestrator.models import fetch_model, load_published_spec
from orchestrator.registry import load_adapter
from orchestrator.storage import Storage
from tuning.adapter import merged_twin
from tuning.base_model import build_module

TOLERANCE = 1e-3  # of a logit: another batch size changes the order of sums, never this much
NEAR_S = 2.0  # a reply this close to a change of digest is near a swap
SHARE = 0.05  # of the replies elsewhere
MAX_NEAR, MAX_ELSEWHERE = 400, 200  # requests recomputed at most: a minute of one core for a ResNet-18


def choose(replies: Sequence[Sent], seed: int = 0) -> list[Sent]:
    """The replies to recompute: those near a swap (evenly thinned to MAX_NEAR), SHARE of the rest."""
    ordered = sorted(replies, key=lambda r: r.at_s)
    times = np.array([r.at_s for r in ordered])
    changes = [b.at_s for a, b in itertools.pairwise(ordered) if a.digest != b.digest]
    near = np.zeros(len(ordered), dtype=bool)
    for change_s in changes:
        near |= np.abs(times - change_s) <= NEAR_S
    close, far = np.flatnonzero(near), np.flatnonzero(~near)
    wanted = min(int(np.ceil(SHARE * len(far))), MAX_ELSEWHERE)
    drawn = np.random.default_rng(seed).choice(far, wanted, replace=False) if wanted else far[:0]
    if len(close) > MAX_NEAR:
        close = close[np.linspace(0, len(close) - 1, MAX_NEAR).astype(int)]
    return [ordered[i] for i in np.sort(np.concatenate([close, drawn]))]


def two_faced(replies: Sequence[Sent]) -> int:
    """Replies whose generation names another digest than its first reply did: a generation names one digest."""
    first: dict[int, str] = {}
    return sum(first.setdefault(r.generation, r.digest) != r.digest for r in sorted(replies, key=lambda r: r.at_s))


class Recomputer:
    """Loads each claimed version once.

    Args:
        storage: of the service.
        base: digest of its base.
    """

    def __init__(self, storage: Storage, base: str) -> None:
        folder: Path = fetch_model(storage, base)
        self._storage = storage
        self._modules: dict[str, nn.Module] = {BASE: build_module(folder, load_published_spec(folder))}

    def logits(self, digest: str, inputs: np.ndarray) -> np.ndarray:
        """What `digest` answers to `inputs`, float32 (N, K)."""
        if digest not in self._modules:
            config, tensors, _ = load_adapter(self._storage, digest)
            self._modules[digest] = merged_twin(self._modules[BASE], config, tensors).eval()
        with torch.inference_mode():
            out: np.ndarray = self._modules[digest](torch.from_numpy(np.ascontiguousarray(inputs))).float().numpy()
        return out

    def count_mixed(
        self,
        replies: Sequence[Sent],
        data: Mapping[str, Dataset],
        tick: Callable[[], None] = lambda: None,
    ) -> int:
        """How many of `replies` differ from what their version answers, by more than TOLERANCE in any logit."""
        mixed = 0
        for reply in replies:
            assert reply.logits_NK is not None
            expected_NK = self.logits(reply.digest, data[reply.stream].inputs[reply.rows])
            mixed += not np.allclose(expected_NK, reply.logits_NK, rtol=0.0, atol=TOLERANCE)
            tick()
        return mixed
