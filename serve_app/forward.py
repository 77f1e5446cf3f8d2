"""One forward pass over the requests of a batch. Called by `Healable`; knows no versions and keeps nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from serve_app.twins import Served
from tuning.base_model import FeatureTap

FORWARD_ROWS = 256  # larger batches run in pieces of this, all of them by the same module


@dataclass(frozen=True)
class Ask:
    """One request: `inputs` (N, *shape), N >= 1; `version` None means whatever is served by default."""

    inputs: Any
    request_id: str
    segment: str = ""
    version: str | None = None
    monitor: bool = True


@dataclass(frozen=True)
class Answer:
    """The answer to one request, wholly from one version; `logits` is float32 numpy (N, K)."""

    logits: Any
    generation: int
    digest: str
    request_id: str

    @property
    def ids(self) -> tuple[str, ...]:
        """Id of each instance."""
        return tuple(f"{self.request_id}/{row}" for row in range(len(self.logits)))


@dataclass(frozen=True)
class Pass:
    """What went into one forward pass and what came out, rows in the order of the requests, on the device."""

    inputs: torch.Tensor
    logits: torch.Tensor
    embedding: torch.Tensor


class Runner:
    """Runs modules on one device.

    Args:
        tap: reads the embedding out of the same pass.
        device: where the modules are.
    """

    def __init__(self, tap: FeatureTap, device: torch.device) -> None:
        self._tap, self._device = tap, device

    def run(self, module: nn.Module, asks: Sequence[Ask]) -> Pass:
        """Forward the inputs of all `asks` through `module`, in pieces of FORWARD_ROWS."""
        x = _as_tensor([ask.inputs for ask in asks]).to(self._device)
        parts = [self._tap.call(module, piece) for piece in x.split(FORWARD_ROWS)]
        if len(parts) == 1:
            return Pass(x, *parts[0])
        return Pass(x, torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))

    def warm(self, module: nn.Module, sample: np.ndarray) -> None:
        """One pass that waits for the device: kernels are chosen and memory is there before the first request."""
        with torch.inference_mode():
            self.run(module, [Ask(sample, "")]).logits.cpu()


def split(logits: Any, served: Served, asks: Sequence[Ask]) -> list[Answer]:
    """Cut the logits of a pass into answers, one per request."""
    answers, start = [], 0
    for ask in asks:
        stop = start + len(ask.inputs)
        answers.append(Answer(logits[start:stop], served.generation, served.digest, ask.request_id))
        start = stop
    return answers


def _as_tensor(inputs: Sequence[Any]) -> torch.Tensor:
    if all(isinstance(i, torch.Tensor) for i in inputs):
        return inputs[0] if len(inputs) == 1 else torch.cat(list(inputs))
    arrays = [np.asarray(i) for i in inputs]
    whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return torch.from_numpy(whole if whole.flags.writeable else whole.copy())  # torch wants memory it may write
