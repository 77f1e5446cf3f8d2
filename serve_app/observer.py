"""What is learned from a pass: counters, drift statistics by segment, sampled traffic.

Called by `Healable` after a batch was answered. It never fails a request: what breaks here is logged once and counted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from serve_app.forward import Answer, Ask, Pass
from serve_app.probes import Probes
from serve_app.traffic import Rows, TrafficLog
from serve_app.twins import Served
from serve_app.windows import Windows

log = logging.getLogger("rayheal")


class Observer:
    """Counts and summarises what one replica answers.

    Args:
        base: digest of the base model.
        probes: by digest.
        traffic: takes the samples.
    """

    def __init__(self, base: str, probes: Probes, traffic: TrafficLog) -> None:
        self.windows = Windows(base, collect=_to_numpy)
        self.requests = self.instances = self.errors = 0  # since this process began
        self._probes, self._traffic = probes, traffic
        self._lock = threading.Lock()
        self._complained = False

    def count_errors(self, count: int) -> None:
        """Count requests that the model failed on."""
        with self._lock:
            self.errors += count

    def observe(self, served: Served, asks: Sequence[Ask], done: Pass, answers: Sequence[Answer]) -> None:
        """Account for a pass that answered `asks`; `answers` in the same order."""
        try:
            self._summarise(served.digest, asks, done, time.time())
            if self._traffic.store != "none":
                for ask, answer in zip(asks, answers, strict=True):
                    self._store(ask, answer, time.time())
        except Exception:  # monitoring must not fail a request; it must not fail unseen either
            if not self._complained:
                log.exception("a batch could not be monitored; further ones are not reported")
            self._complained = True
        with self._lock:  # last: instances that a report counts are in its windows or in earlier ones
            self.requests += len(asks)
            self.instances += len(done.logits)

    def counts(self) -> dict[str, int]:
        """Requests, instances and errors since this process began; read before windows are taken."""
        with self._lock:
            return {"requests": self.requests, "instances": self.instances, "errors": self.errors}

    def _summarise(self, digest: str, asks: Sequence[Ask], done: Pass, now_s: float) -> None:
        probe = self._probes.get(digest)
        if probe is None:
            return
        rows: dict[str, list[slice]] = {}
        start = 0
        for ask in asks:
            if ask.monitor:
                rows.setdefault(ask.segment, []).append(slice(start, start + len(ask.inputs)))
            start += len(ask.inputs)
        for segment, slices in rows.items():
            seen = (done.inputs, done.embedding, done.logits)
            count = sum(s.stop - s.start for s in slices)
            inputs, embedding, logits = seen if count == start else (_pick(t, slices) for t in seen)
            self.windows.add(digest, segment, count, now_s, probe.observe(inputs, embedding, logits))

    def _store(self, ask: Ask, answer: Answer, now_s: float) -> None:
        if not ask.monitor:
            return
        segment = self.windows.segment(ask.segment)
        logits = answer.logits.detach() if isinstance(answer.logits, torch.Tensor) else answer.logits
        self._traffic.offer(
            Rows(answer.ids, now_s, segment, answer.digest, answer.generation, _own(ask.inputs), logits)
        )


def _own(inputs: Any) -> Any:
    """A copy where the caller could write to it later; a read-only array is a request's body and stays."""
    if isinstance(inputs, torch.Tensor):
        return inputs.detach().clone()
    return inputs.copy() if inputs.flags.writeable else inputs


def _pick(values: torch.Tensor, slices: list[slice]) -> torch.Tensor:
    return values[slices[0]] if len(slices) == 1 else torch.cat([values[s] for s in slices])


def _to_numpy(sums: Any) -> np.ndarray:
    return np.asarray(sums.cpu().numpy(), dtype=np.int64)
