"""`Healable`: any PyTorch module, with monitoring and hot swap. Put it where the module was.

Used inside `@serve.deployment` classes of users and by `serve_app.replica`. Calling it costs a forward pass; whatever
is slow (loading adapters, reports, files) happens in threads of its own, and nothing that happens there is waited for.

    self.model = Healable(module, spec="model.yaml", storage="s3://bucket/service")
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from orchestrator.errors import HealError, RequestError
from orchestrator.messages import BASE, LabelArrived, Report, Target
from orchestrator.registry import read_stable
from orchestrator.settings import HealSettings, ServiceConfig
from orchestrator.spec import ModelSpec, load_spec
from orchestrator.storage import Storage, open_storage
from serve_app import tokens
from serve_app.feedback import LabelBook
from serve_app.heartbeat import Link, Pulse
from serve_app.link import connect as connect_ray
from serve_app.link import replica_identity
from serve_app.probes import Probes
from serve_app.publish import publish
from serve_app.traffic import Rows, TrafficLog
from serve_app.twins import Served, Twins
from serve_app.windows import Windows
from tuning.base_model import feature_tap, resolve_device

FIRST_TARGET_S = 5.0  # a new replica waits this long for its target before it falls back to stable.json
FORWARD_ROWS = 256  # larger requests run in pieces of this, all under one version

log = logging.getLogger("rayheal")


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
    """The answer to one request, wholly from one version; `logits` is float32 (N, K)."""

    logits: Any
    generation: int
    digest: str
    request_id: str

    @property
    def ids(self) -> tuple[str, ...]:
        """Id of each instance."""
        return tuple(f"{self.request_id}/{row}" for row in range(len(self.logits)))


class Healable:
    """A module that reports what it sees and serves what it is told.

    Args:
        module: the base model; it is put in eval mode on `device` and must not be changed afterwards.
        spec: the model spec or its path.
        storage: URI of the service's records, the same on every replica.
        service: name of the service; None: the spec's name.
        base: digest of the published base; None: this module is published.
        device: auto, cpu or cuda; None: where the module is.
        store: "inputs" samples traffic for healing, "none" keeps none.
        deployed_s: when the application was deployed; None: as Serve says, 0 outside Serve.
        connect: finds the orchestrator; None: the Ray actor named in `settings.ORCHESTRATOR_FACTORY`.
        settings: fields of `HealSettings`, e.g. mode="auto".

    Raises:
        SpecError, StorageError: the spec, the settings or the storage cannot be used.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        spec: ModelSpec | str | Path,
        storage: str | Storage,
        service: str | None = None,
        base: str | None = None,
        device: str | None = None,
        store: str = "inputs",
        deployed_s: float | None = None,
        connect: Callable[[ServiceConfig], Link] | None = None,
        **settings: Any,
    ) -> None:
        self.spec = spec if isinstance(spec, ModelSpec) else load_spec(spec)
        self.storage = storage if isinstance(storage, Storage) else open_storage(storage)
        self.device = resolve_device(device) if device else _device_of(module)
        base = base or publish(self.storage, self.spec, module)
        tag, deployed = replica_identity()
        self.config = ServiceConfig(
            service or self.spec.name,
            self.storage.uri,
            base,
            HealSettings.from_dict(settings),
            deployed if deployed_s is None else deployed_s,
        )
        self._tag, self._incarnation = tag, uuid.uuid4().hex
        module = module.to(self.device).eval()
        sample = np.zeros((1, *self.spec.input_shape), dtype=self.spec.numpy_dtype)
        self._tap = feature_tap(module, self.spec, sample)
        self._twins = Twins(module, self.storage, base, warm=partial(self._forward, inputs=sample))
        self._probes = Probes(self.storage, base, self.spec.layout, self.device)
        self._windows = Windows(base, collect=_to_numpy)
        self._traffic = TrafficLog(self.storage, base, tag, incarnation=self._incarnation, store=store)
        self._book = LabelBook(self.spec.num_classes)
        self._counting = threading.Lock()
        self._requests = self._instances = self._errors = 0
        self._feedback_key = b""
        self._failure = ""
        dial = connect or connect_ray
        self._pulse = Pulse(lambda: dial(self.config), self._report, self._apply, self.config.settings.heartbeat_s)
        self._pulse.start()
        if not self._pulse.applied.wait(FIRST_TARGET_S):
            self._start_from_stable()

    # ------------------------------------------------------------ request path

    def __call__(self, inputs: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Answer like the module: (N, *shape) in, logits (N, K) out, on this object's device, without gradients."""
        ask = Ask(inputs, uuid.uuid4().hex)
        with torch.no_grad():
            answer = self._run(self._twins.current, [ask])[0]
        logits: torch.Tensor = answer.logits
        return logits

    def infer(self, inputs: np.ndarray, segment: str = "", version: str | None = None, monitor: bool = True) -> Answer:
        """Answer with what is needed to join late labels (see `token`).

        Args:
            inputs: (N, *shape) of the spec's type, N >= 1.
            segment: where the request comes from (site, camera).
            version: a listed digest or "base"; None: what is served by default.
            monitor: False: neither counted nor stored.

        Raises:
            RequestError: 404, the version is not listed.
        """
        return self.infer_many([Ask(inputs, uuid.uuid4().hex, segment, version, monitor)])[0]

    def infer_many(self, asks: Sequence[Ask]) -> list[Answer]:
        """Answer several requests in as few forward passes as there are versions among them; order is kept."""
        current = self._twins.current  # read once: all of the batch sees one default version
        groups: dict[str, tuple[Served, list[int]]] = {}
        for place, ask in enumerate(asks):
            served = current if ask.version in (None, current.digest) else self._twins.get(ask.version or BASE)
            groups.setdefault(served.digest, (served, []))[1].append(place)
        answers: dict[int, Answer] = {}
        with torch.inference_mode():
            for served, places in groups.values():
                found = self._run(served, [asks[place] for place in places])
                answers |= {
                    place: replace(answer, logits=answer.logits.float().cpu().numpy())
                    for place, answer in zip(places, found, strict=True)
                }
        return [answers[place] for place in range(len(asks))]

    def _run(self, served: Served, asks: Sequence[Ask]) -> list[Answer]:
        """One version, one forward pass (or pieces of FORWARD_ROWS), then the statistics of the same pass."""
        try:
            x = _as_tensor([ask.inputs for ask in asks]).to(self.device)
            logits, embedding = self._forward(served.module, x)
        except Exception:
            with self._counting:
                self._errors += len(asks)
            raise
        answers, start = [], 0
        for ask in asks:
            rows = slice(start, start + len(ask.inputs))
            start = rows.stop
            answers.append(Answer(logits[rows], served.generation, served.digest, ask.request_id))
        self._observe(served.digest, asks, x, embedding, logits, answers)
        return answers

    def _forward(self, module: nn.Module, inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            x = torch.as_tensor(inputs).to(self.device)
            parts = [self._tap.call(module, piece) for piece in x.split(FORWARD_ROWS)]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _observe(
        self,
        digest: str,
        asks: Sequence[Ask],
        x: torch.Tensor,
        embedding: torch.Tensor,
        logits: torch.Tensor,
        answers: Sequence[Answer],
    ) -> None:
        now_s, probe = time.time(), self._probes.get(digest)
        by_segment: dict[str, list[slice]] = {}
        start = 0
        for ask, answer in zip(asks, answers, strict=True):
            rows = slice(start, start + len(ask.inputs))
            start = rows.stop
            if ask.monitor:
                by_segment.setdefault(ask.segment, []).append(rows)
                self._store(ask, answer, now_s)
        with self._counting:
            self._requests += len(asks)
            self._instances += start
        if probe is None:
            return
        for segment, slices in by_segment.items():
            seen = (x, embedding, logits)
            if sum(s.stop - s.start for s in slices) < start:
                seen = tuple(torch.cat([t[s] for s in slices]) for t in seen)  # type: ignore[assignment]
            self._windows.add(digest, segment, len(seen[2]), now_s, probe.observe(*seen))

    def _store(self, ask: Ask, answer: Answer, now_s: float) -> None:
        if self._traffic.store == "none":
            return
        # A caller may reuse its tensor; an array that is read-only belongs to a request and stays.
        inputs = ask.inputs
        if isinstance(inputs, torch.Tensor):
            inputs = inputs.detach().clone()
        elif inputs.flags.writeable:
            inputs = inputs.copy()
        segment = self._windows.segment(ask.segment)
        rows = Rows(answer.ids, now_s, segment, answer.digest, answer.generation, inputs, answer.logits.detach())
        self._traffic.offer(rows)

    # ------------------------------------------------------------ versions, labels

    @property
    def current(self) -> Served:
        """What is served by default now."""
        return self._twins.current

    @property
    def versions(self) -> tuple[str, ...]:
        """Every version that can be asked for by name."""
        return self._twins.versions

    @property
    def link(self) -> Link | None:
        """The connection to the orchestrator, None while there is none."""
        return self._pulse.link

    def token(self, answer: Answer) -> str:
        """A signed token that lets any replica join late labels to this answer; empty before the first target."""
        predictions = np.asarray(answer.logits).argmax(axis=1).tolist()
        return tokens.mint(self._feedback_key, answer.request_id, answer.digest, time.time(), predictions)

    def feedback(self, items: Sequence[tuple[str, int, int]]) -> dict[str, int]:
        """Take true labels.

        Args:
            items: (token, row of the request, class) triples.

        Returns:
            Counts of accepted, unknown (not our token, no such row), expired and conflicting (another label came first).

        Raises:
            RequestError: a class outside of the model's; 503 before the first target brought the key.
        """
        if not self._feedback_key:
            raise RequestError("labels cannot be checked before the orchestrator was reached once; try again", 503)
        now_s = time.time()
        counts, fresh = self._book.check(self._feedback_key, items, now_s)
        self._traffic.offer_labels([(label.instance_id, label.label) for label in fresh], now_s)
        return counts

    # ------------------------------------------------------------ heartbeat thread

    def _report(self, sequence: int) -> Report:
        now_s, current = time.time(), self._twins.current
        with self._counting:
            counts = {"requests": self._requests, "instances": self._instances, "errors": self._errors}
        return Report(
            replica_tag=self._tag,
            incarnation=self._incarnation,
            sequence=sequence,
            base=self.config.base,
            generation=current.generation,
            digest=current.digest,
            versions=self._twins.versions,
            windows=self._windows.take(now_s),
            labels=self._book.take(),
            dropped=self._traffic.dropped + self._windows.dropped + self._book.dropped,
            failure=self._failure,
            sent_s=now_s,
            **counts,
        )

    def _apply(self, target: Target) -> None:
        """Make a target true: prepare, flip, then free what nobody lists. Keeps serving what it has on failure."""
        self._feedback_key = target.feedback_key or self._feedback_key
        problems = []
        for digest in dict.fromkeys((target.digest, *target.versions)):
            try:
                self._twins.prepare(digest)
                self._probes.refresh(digest)
                if digest == target.digest:
                    self._twins.activate(target.generation, digest)
            except HealError as error:
                problems.append(f"{type(error).__name__}: {error}")
            except (OSError, RuntimeError) as error:  # the device or the disk is full
                problems.append(f"{digest} could not be loaded: {error}")
        self._twins.retain(target.versions)
        self._probes.retain(self._twins.versions)
        failure = "; ".join(problems)
        if failure and failure != self._failure:
            log.warning("generation %d could not be applied: %s", target.generation, failure)
        self._failure = failure

    def _start_from_stable(self) -> None:
        """No target in time: the last promoted generation, if it is of this base; else the base."""
        log.warning("no target within %g s (%s); starting from stable.json", FIRST_TARGET_S, self._pulse.problem)
        try:
            stable = read_stable(self.storage)
        except HealError as error:
            log.warning("stable.json cannot be read, starting from the base: %s", error)
            return
        if stable is not None and stable.get("base") == self.config.base:
            self._apply(Target(int(stable["generation"]), str(stable["digest"]), (BASE, str(stable["digest"]))))

    def close(self) -> None:
        """Stop the threads; what was sampled is written first."""
        self._pulse.close()
        self._traffic.close()


def _device_of(module: nn.Module) -> torch.device:
    first = next((t for t in (*module.parameters(), *module.buffers())), None)
    return torch.device("cpu") if first is None else first.device


def _as_tensor(inputs: Sequence[Any]) -> torch.Tensor:
    if all(isinstance(i, torch.Tensor) for i in inputs):
        return inputs[0] if len(inputs) == 1 else torch.cat(list(inputs))
    arrays = [np.asarray(i) for i in inputs]
    whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return torch.from_numpy(whole if whole.flags.writeable else whole.copy())


def _to_numpy(sums: Any) -> np.ndarray:
    return np.asarray(sums.cpu().numpy(), dtype=np.int64)
