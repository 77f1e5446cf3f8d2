"""What is learned from a pass: counters, drift statistics by segment, sampled traffic.

Called by `Healable` after a batch was answered. It never fails a request: what breaks here is logged once and counted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from orchestrator.messages import Window
from orchestrator.settings import WINDOW_INSTANCES, WINDOW_S
from serve_app.forward import Answer, Ask, Pass
from serve_app.probes import Probes
from serve_app.traffic import Rows, TrafficLog
from serve_app.twins import Served
from serve_app.windows import Windows

REDUCED_ROWS = 4 * WINDOW_INSTANCES  # gathered before they are summed: operators cost more than pixels below this
KEPT_BYTES = 8 << 20  # inputs waiting for their window, of one version and segment

log = logging.getLogger("rayheal")


@dataclass
class _Kept:
    """Rows of one (digest, segment) that are not summed yet."""

    first_s: float
    last_s: float = 0.0
    count: int = 0
    num_bytes: int = 0
    passes: list[Pass] = field(default_factory=list)


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
        self._kept: dict[tuple[str, str], _Kept] = {}
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

    def take(self, now_s: float) -> tuple[Window, ...]:
        """Windows for a report, those of rows included that fill a window or waited for WINDOW_S."""
        for key, kept in tuple(self._kept.items()):
            if kept.count >= WINDOW_INSTANCES or now_s - kept.first_s >= WINDOW_S:
                self._reduce(key)
        return self.windows.take(now_s)

    def _summarise(self, digest: str, asks: Sequence[Ask], done: Pass, now_s: float) -> None:
        if self._probes.get(digest) is None:
            return
        rows: dict[str, list[slice]] = {}
        start = 0
        for ask in asks:
            if ask.monitor:
                segment = self.windows.segment(ask.segment)
                rows.setdefault(segment, []).append(slice(start, start + len(ask.inputs)))
            start += len(ask.inputs)
        owned = _owned(done)
        for segment, slices in rows.items():
            whole = sum(s.stop - s.start for s in slices) == start
            self._keep((digest, segment), owned if whole else _pick(owned, slices), now_s)

    def _keep(self, key: tuple[str, str], fresh: Pass, now_s: float) -> None:
        """Gather rows: one reduction of REDUCED_ROWS costs half as much a row as one of WINDOW_INSTANCES."""
        with self._lock:
            kept = self._kept.setdefault(key, _Kept(now_s))
            kept.passes.append(fresh)
            kept.last_s = now_s
            kept.count += len(fresh.logits)
            kept.num_bytes += fresh.inputs.nbytes
            full = kept.count >= REDUCED_ROWS or kept.num_bytes >= KEPT_BYTES
        if full:
            self._reduce(key)

    def _reduce(self, key: tuple[str, str]) -> None:
        with self._lock:
            kept = self._kept.pop(key, None)
        probe = self._probes.get(key[0])
        if kept is None or probe is None:  # another thread was faster, or the version was retired meanwhile
            return
        seen = [(p.inputs, p.embedding, p.logits) for p in kept.passes]
        columns = seen[0] if len(seen) == 1 else tuple(torch.cat(column) for column in zip(*seen, strict=True))
        self.windows.add(*key, kept.count, kept.last_s, probe.observe(*columns), kept.first_s)

    def _store(self, ask: Ask, answer: Answer, now_s: float) -> None:
        if not ask.monitor:
            return
        segment = self.windows.segment(ask.segment)
        logits = answer.logits.detach() if isinstance(answer.logits, torch.Tensor) else answer.logits
        self._traffic.offer(Rows(answer.ids, now_s, segment, answer.digest, answer.generation, own(ask.inputs), logits))


def own(inputs: Any) -> Any:
    """A copy where the caller could write to it later; a read-only array is a request's body and stays."""
    if isinstance(inputs, torch.Tensor):
        return inputs.detach().clone()
    return inputs.copy() if inputs.flags.writeable else inputs


def _owned(done: Pass) -> Pass:
    """The same values in memory that no caller can write to: rows wait for their window."""
    logits = done.logits.clone()
    embedding = logits if done.embedding is done.logits else done.embedding
    return Pass(done.inputs.clone(), logits, embedding)


def _pick(done: Pass, slices: list[slice]) -> Pass:
    def rows(values: torch.Tensor) -> torch.Tensor:
        return values[slices[0]] if len(slices) == 1 else torch.cat([values[s] for s in slices])

    return Pass(rows(done.inputs), rows(done.logits), rows(done.embedding))


def _to_numpy(sums: Any) -> np.ndarray:
    return np.asarray(sums.cpu().numpy(), dtype=np.int64)
