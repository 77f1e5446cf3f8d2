"""`Healable`: any PyTorch module, with monitoring and hot swap. Put it where the module was.

Used inside `@serve.deployment` classes of users and by `serve_app.replica`. Calling it costs a forward pass; whatever
is slow (loading adapters, reports, files) happens in threads of its own, and nothing that happens there is waited for.

    self.model = Healable(module, spec="model.yaml", storage="s3://bucket/service")
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from orchestrator.calls import parse_receivers
from orchestrator.errors import HealError, RequestError
from orchestrator.messages import BASE, Report, Target
from orchestrator.registry import read_stable
from orchestrator.settings import HealSettings, ServiceConfig
from orchestrator.spec import ModelSpec, load_spec
from orchestrator.storage import open_storage
from serve_app import tokens
from serve_app.feedback import LabelBook
from serve_app.forward import Answer, Ask, Pass, Runner, split
from serve_app.heartbeat import Link, Pulse
from serve_app.link import connect as connect_ray
from serve_app.link import deployed_s as serve_deployed_s
from serve_app.link import replica_tag
from serve_app.observer import Observer
from serve_app.probes import Probes
from serve_app.publish import publish
from serve_app.shadow import Shadow
from serve_app.traffic import TrafficLog
from serve_app.twins import Served, Twins
from tuning.base_model import feature_tap, resolve_device

FIRST_TARGET_S = 5.0  # a new replica waits this long for its target before it falls back to stable.json

log = logging.getLogger("rayheal")


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
        first_target_s: seconds to wait for the first target.
        settings: fields of `HealSettings`, e.g. mode="auto".

    Raises:
        SpecError, StorageError: the spec, the settings or the storage cannot be used.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        spec: ModelSpec | str | Path,
        storage: str,
        service: str | None = None,
        base: str | None = None,
        device: str | None = None,
        store: str = "inputs",
        deployed_s: float | None = None,
        connect: Callable[[ServiceConfig], Link] | None = None,
        first_target_s: float = FIRST_TARGET_S,
        **settings: Any,
    ) -> None:
        checked = HealSettings.from_dict(settings)
        parse_receivers(checked.notify)  # here, where it can still be mended: the orchestrator cannot start with it
        self.spec = spec if isinstance(spec, ModelSpec) else load_spec(spec)
        self.storage = open_storage(storage)
        self.device = resolve_device(device) if device else _device_of(module)
        base = base or publish(self.storage, self.spec, module)
        self._tag, self._incarnation = replica_tag(), uuid.uuid4().hex
        since_s = serve_deployed_s() if deployed_s is None else deployed_s
        self.config = ServiceConfig(service or self.spec.name, self.storage.uri, base, checked, since_s)
        module = module.to(self.device).eval()
        sample = np.zeros((1, *self.spec.input_shape), dtype=self.spec.numpy_dtype)
        self._runner = Runner(feature_tap(module, self.spec, sample), self.device)
        self._twins = Twins(module, self.storage, base, warm=partial(self._runner.warm, sample=sample))
        self._probes = Probes(self.storage, base, self.spec.layout, self.device)
        self._traffic = TrafficLog(self.storage, base, self._tag, incarnation=self._incarnation, store=store)
        self._observer = Observer(base, self._probes, self._traffic)
        self._shadow = Shadow(self._runner, self._twins.find, self.device)
        self._book = LabelBook(self.spec.num_classes)
        self._feedback_key = b""
        self._failure = ""
        self._blind: dict[str, str] = {}
        dial = connect or connect_ray
        self._pulse = Pulse(lambda: dial(self.config), self._report, self._apply, checked.heartbeat_s)
        self._pulse.start()
        if not self._pulse.applied.wait(first_target_s):
            self._start_from_stable(first_target_s)

    # ------------------------------------------------------------ request path

    def __call__(self, inputs: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Answer like the module: (N, *shape) in, logits (N, K) out, on this object's device, without gradients."""
        ask, served = Ask(inputs, uuid.uuid4().hex), self._twins.current
        with torch.no_grad():
            done = self._forward(served.module, [ask])
            self._observer.observe(served, [ask], done, split(done.logits, served, [ask]))
        # Not compared: without a token no label can ever be joined to this answer.
        return done.logits

    def infer(self, inputs: np.ndarray, segment: str = "", version: str | None = None, monitor: bool = True) -> Answer:
        """Answer with what is needed to join late labels (see `token`).

        Args:
            inputs: (N, *shape) of the spec's type, N >= 1.
            segment: where the request comes from (site, camera).
            version: a listed digest or "base"; None: what is served by default.
            monitor: False: neither counted in the statistics nor stored.

        Raises:
            RequestError: 404, the version is not listed.
        """
        return self.infer_many([Ask(inputs, uuid.uuid4().hex, segment, version, monitor)])[0]

    def infer_many(self, asks: Sequence[Ask]) -> list[Answer]:
        """Answer several requests in as few forward passes as there are versions among them; order is kept.

        Raises:
            RequestError: 404, a version is not listed; nothing is answered then.
        """
        current = self._twins.current  # read once: all of the batch sees one default version
        groups: dict[str, tuple[Served, list[int]]] = {}
        for place, ask in enumerate(asks):
            served = current if ask.version in (None, current.digest) else self._twins.get(ask.version or BASE)
            groups.setdefault(served.digest, (served, []))[1].append(place)
        answers: dict[int, Answer] = {}
        with torch.inference_mode():
            for served, places in groups.values():
                group = [asks[place] for place in places]
                done = self._forward(served.module, group)
                found = split(done.logits.float().cpu().numpy(), served, group)  # waits for the device, once
                self._observer.observe(served, group, done, found)  # after the copy: it does not delay the device
                for ask, answer in zip(group, found, strict=True):
                    self._shadow.offer(ask, answer)
                answers |= zip(places, found, strict=True)
        return [answers[place] for place in range(len(asks))]

    def _forward(self, module: nn.Module, asks: Sequence[Ask]) -> Pass:
        try:
            return self._runner.run(module, asks)
        except Exception:
            self._observer.count_errors(len(asks))
            raise

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
            Counts of accepted, unknown (not our token, no such row), expired, conflicting (another label came first).

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
        now_s, current, seen = time.time(), self._twins.current, self._observer
        counts = seen.counts()
        return Report(
            replica_tag=self._tag,
            incarnation=self._incarnation,
            sequence=sequence,
            base=self.config.base,
            generation=current.generation,
            digest=current.digest,
            versions=self._twins.versions,
            windows=seen.take(now_s),
            labels=self._book.take(),
            disagreements=self._shadow.take(),
            compared=self._shadow.compared,
            dropped=self._traffic.dropped + seen.windows.dropped + self._book.dropped + self._shadow.dropped,
            failure=self._failure,
            sent_s=now_s,
            requests=counts["requests"],
            instances=counts["instances"],
            errors=counts["errors"],
        )

    def _apply(self, target: Target) -> None:
        """Make a target true: prepare, flip, then free what nobody lists. Keeps serving what it has on failure."""
        self._feedback_key = target.feedback_key or self._feedback_key
        problems = []
        for digest in dict.fromkeys((target.digest, *target.versions)):
            try:
                self._twins.prepare(digest)
            except HealError as error:
                problems.append(f"{type(error).__name__}: {error}")
                continue
            except (OSError, RuntimeError) as error:  # the device or the disk is full
                problems.append(f"{digest} could not be loaded: {error}")
                continue
            self._refresh_probe(digest)  # before the flip, so that no batch goes unseen
            if digest == target.digest:
                self._twins.activate(target.generation, digest)
        self._shadow.aim(target.compare, target.compare_share)
        self._twins.retain(target.versions)
        self._probes.retain(self._twins.versions)
        self._failure = _said("; ".join(problems), self._failure, f"generation {target.generation} is not served")

    def _refresh_probe(self, digest: str) -> None:
        """A version without statistics is served all the same."""
        problem = ""
        try:
            self._probes.refresh(digest)
        except HealError as error:
            problem = str(error)
        self._blind[digest] = _said(problem, self._blind.get(digest, ""), f"version {digest} is not monitored")

    def _start_from_stable(self, waited_s: float) -> None:
        """No target in time: the last promoted generation, if it is of this base; else the base."""
        log.warning(
            "no target within %g s (%s); starting from stable.json", waited_s, self._pulse.problem or "no answer yet"
        )
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
        self._shadow.close()
        self._traffic.close()


def _said(problem: str, before: str, what: str) -> str:
    """`problem`, logged when it is new."""
    if problem and problem != before:
        log.warning("%s: %s", what, problem)
    return problem


def _device_of(module: nn.Module) -> torch.device:
    first = next((t for t in (*module.parameters(), *module.buffers())), None)
    return torch.device("cpu") if first is None else first.device
