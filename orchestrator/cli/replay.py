"""One virtual replica for a rehearsal: answers recorded instances, reports, and applies its target, in one thread.

Made of the very parts that a live replica is made of (twins, probes, windows, traffic files); what is left out is
what needs a clock or a network. Used by `rehearse`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn

from orchestrator.errors import StorageError
from orchestrator.messages import LabelArrived, Report, Target
from orchestrator.spec import ModelSpec
from orchestrator.storage import Storage
from serve_app.forward import Ask, Runner
from serve_app.probes import Probes
from serve_app.traffic import FLUSH_ROWS, Rows, TrafficLog
from serve_app.twins import Twins
from serve_app.windows import Windows
from tuning.base_model import feature_tap

TAG = "rehearsal"
EVAL_ROWS = 256  # instances of a forward pass that measures


class VirtualReplica:
    """A replica that lives in the caller's thread.

    Args:
        module: the base, on `device`.
        spec: its spec.
        storage: of the rehearsal.
        base: the base's digest.
        device: where the module is.
        clock: virtual seconds.
    """

    def __init__(
        self,
        module: nn.Module,
        spec: ModelSpec,
        storage: Storage,
        base: str,
        device: torch.device,
        clock: Callable[[], float],
    ) -> None:
        sample = np.zeros((1, *spec.input_shape), dtype=spec.numpy_dtype)
        self._storage, self._base, self._clock = storage, base, clock
        self._runner = Runner(feature_tap(module, spec, sample), device)
        self.twins = Twins(module, storage, base, warm=partial(self._runner.warm, sample=sample))
        self._probes = Probes(storage, base, spec.layout, device, clock)
        self._windows = Windows(base, collect=lambda sums: np.asarray(sums.cpu().numpy(), dtype=np.int64))
        self._rows: list[Rows] = []
        self._late: list[tuple[str, int]] = []
        self._arrived: list[LabelArrived] = []
        self._files = self._sequence = self.instances = 0

    def answer(self, inputs: np.ndarray, labels: np.ndarray, keep: bool) -> None:
        """Serve a batch.

        Args:
            inputs: (N, *shape).
            labels: int64 (N,), what is told at once about each; -1: nothing.
            keep: store the instances as traffic.
        """
        served, now_s = self.twins.current, self._clock()
        request_id = f"row{self.instances:07d}"
        with torch.inference_mode():
            done = self._runner.run(served.module, [Ask(inputs, request_id)])
            probe = self._probes.get(served.digest)
            if probe is not None:
                sums = probe.observe(done.inputs, done.embedding, done.logits)
                self._windows.add(served.digest, "", len(inputs), now_s, sums)
            logits_NK = done.logits.float().cpu().numpy()
        self.instances += len(inputs)
        ids = tuple(f"{request_id}/{row}" for row in range(len(inputs)))
        if keep:
            self._rows.append(Rows(ids, now_s, "", served.digest, served.generation, inputs, logits_NK))
        predictions = logits_NK.argmax(axis=1)
        for row in np.flatnonzero(labels >= 0):
            label = int(labels[row])
            self._late.append((ids[row], label))
            self._arrived.append(LabelArrived(ids[row], served.digest, int(predictions[row]), label, now_s))
        if sum(len(r.ids) for r in self._rows) >= FLUSH_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what was kept, so that a search sees it.

        Raises:
            StorageError: it cannot be written.
        """
        if not self._rows and not self._late:
            return
        log = TrafficLog(self._storage, self._base, TAG, incarnation=f"{self._files:08d}")
        self._files += 1
        taken = all(log.offer(rows) for rows in self._rows)
        log.offer_labels(self._late, self._clock())
        log.close(timeout_s=60.0)
        if log.dropped or not taken:
            raise StorageError(f"recorded traffic could not be written to {self._storage.uri}: {log.problem}")
        self._rows, self._late = [], []

    def report(self) -> Report:
        """The next heartbeat."""
        now_s, current = self._clock(), self.twins.current
        labels, self._arrived = tuple(self._arrived), []
        self._sequence += 1
        return Report(
            replica_tag=TAG,
            incarnation="0",
            sequence=self._sequence,
            base=self._base,
            generation=current.generation,
            digest=current.digest,
            versions=self.twins.versions,
            windows=self._windows.take(now_s),
            labels=labels,
            requests=self.instances,
            instances=self.instances,
            sent_s=now_s,
        )

    def apply(self, target: Target) -> None:
        """Make a target true, as a live replica does."""
        for digest in dict.fromkeys((target.digest, *target.versions)):
            self.twins.prepare(digest)
            self._probes.refresh(digest)
        self.twins.activate(target.generation, target.digest)
        self.twins.retain(target.versions)
        self._probes.retain(self.twins.versions)

    def predict(self, inputs: np.ndarray, version: str | None = None) -> np.ndarray:
        """Classes (N,) as predicted by a version, by default what is served now; nothing is counted or kept."""
        module = (self.twins.get(version) if version else self.twins.current).module
        found = []
        with torch.inference_mode():
            for start in range(0, len(inputs), EVAL_ROWS):
                done = self._runner.run(module, [Ask(inputs[start : start + EVAL_ROWS], "")])
                found.append(done.logits.argmax(dim=1).cpu().numpy())
        return np.concatenate(found)
