"""The orchestrator as a Ray actor: detached, named, restarted by Ray, replaced by a newer deployment.

Replicas reach it through `ensure_orchestrator`, named in `settings.ORCHESTRATOR_FACTORY`. The controller inside
does the work; this file holds what only Ray needs: threads, names, restarts.
"""

from __future__ import annotations

import logging
import threading
import time
from importlib.metadata import version
from typing import Any

import ray
from ray.exceptions import RayActorError

from orchestrator.calls import parse_receivers
from orchestrator.controller import Controller, run_pass
from orchestrator.drift.baseline import Baseline, load_baseline
from orchestrator.errors import ServiceError
from orchestrator.journal import Journal
from orchestrator.keys import ServiceKeys, load_keys
from orchestrator.messages import Command, Report, Target
from orchestrator.notifier import Notifier
from orchestrator.ports import Ports
from orchestrator.registry import write_stable
from orchestrator.settings import NAMESPACE, ServiceConfig
from orchestrator.snapshots import Snapshots
from orchestrator.storage import Storage, open_storage
from tuning.prepare import prepare_base
from tuning.search import RayTrialRunner

PAGE = 200  # journal entries read at once for a notifier that is far behind
PASS_S = 0.25  # seconds between two passes
HELLO_TIMEOUT_S = 60.0  # an actor that replays a long journal may take a while to answer
SOFTWARE = version("rayheal")

log = logging.getLogger("rayheal")


def actor_name(service: str) -> str:
    """The name of a service's orchestrator in the namespace `rayheal`."""
    return f"heal-{service}"


class _Baselines:
    """Baselines on the storage; the base's own is measured by a task."""

    def __init__(self, storage: Storage, config: ServiceConfig) -> None:
        self._storage, self._config = storage, config
        self._task: Any = None

    def load(self, digest: str) -> Baseline | None:
        return load_baseline(self._storage, digest, self._config.base)

    def prepare_base(self) -> None:
        if self._task is not None:
            done, _ = ray.wait([self._task], timeout=0)
            if not done:
                return
            try:
                ray.get(self._task)
            except ray.exceptions.RayTaskError as error:
                raise ServiceError(f"the base's drift baseline could not be measured: {error.cause}") from error
        self._task = _measure_base.options(name=f"heal-baseline {self._config.service}").remote(
            self._config.storage, self._config.base
        )


@ray.remote(num_cpus=0, max_retries=3)
def _measure_base(storage: str, base: str) -> None:
    prepare_base(storage, base, device="cpu")


class _Stable:
    """`stable.json`."""

    def __init__(self, storage: Storage, base: str) -> None:
        self._storage, self._base = storage, base

    def write(self, generation: int, digest: str) -> None:
        write_stable(self._storage, self._base, generation, digest)


class Orchestrator:
    """One service's orchestrator. Its constructor returns only after the journal was replayed.

    Args:
        config: the service.
        keys: signs the journal; its feedback key goes to the replicas.
    """

    def __init__(self, config: ServiceConfig, keys: ServiceKeys) -> None:
        storage = open_storage(config.storage)
        ports = Ports(
            runner=RayTrialRunner(config.service, storage, keys),
            records=Journal(storage, keys),
            baselines=_Baselines(storage, config),
            stable=_Stable(storage, config.base),
            snapshots=Snapshots(storage, config.base),
        )
        self._controller = Controller(config, ports, time.time, keys.feedback_key)
        self._read_only = Journal(storage, None)
        self._notifiers = [
            Notifier(config.service, receiver, keys.webhook_secret, storage, self._entries)
            for receiver in parse_receivers(config.settings.notify)
        ]
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="passes", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.wait(PASS_S):
            try:
                run_pass(self._controller)
            except Exception as error:  # a bug must be seen and must not end the loop silently
                log.exception("a pass failed")
                self._controller.note_problem(f"{type(error).__name__}: {error}")
            for notifier in self._notifiers:
                notifier.wake()

    def _entries(self, after: int) -> list[dict[str, Any]]:
        """Journal entries for the notifiers: from memory, from the storage where that begins too late."""
        recent = self._controller.events(after)
        if not recent or recent[0]["seq"] <= after + 1 or after < 0:
            return recent
        older = self._read_only.entries(after, PAGE)
        return [{"seq": e.seq, "time_s": e.time_s, "event": e.event, "body": e.body} for e in older]

    def hello(self) -> tuple[ServiceConfig, str]:
        """The configuration and the software version this actor runs."""
        return self._controller.config, SOFTWARE

    def heartbeat(self, report: Report) -> Target:
        """A replica's report, answered with its target."""
        return self._controller.receive(report)

    def state(self) -> dict[str, Any]:
        """What `GET /healing` answers."""
        waiting = {notifier.name: notifier.trouble for notifier in self._notifiers if notifier.trouble}
        return self._controller.state() | {"notify": waiting}

    def command(self, command: Command) -> dict[str, Any]:
        """Queue a person's command."""
        return self._controller.command(command)

    def episodes(self) -> list[dict[str, Any]]:
        """Every episode's record."""
        return self._controller.episodes()

    def episode(self, episode_id: str) -> dict[str, Any] | None:
        """One episode's record."""
        return self._controller.episode(episode_id)

    def events(self, after: int = -1) -> list[dict[str, Any]]:
        """Journal entries after a sequence number."""
        return self._controller.events(after)

    def retire(self) -> None:
        """Finish the pass under way and start no other; the actor is replaced next."""
        self._stopping.set()
        self._thread.join(timeout=5)
        for notifier in self._notifiers:
            notifier.close()


_Actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=16)(Orchestrator)


def ensure_orchestrator(config: ServiceConfig) -> Any:
    """The handle of the service's orchestrator; made when absent, replaced when an older deployment made it.

    Safe to call from many replicas at once. Needs an initialised Ray.

    Raises:
        ServiceError: another storage is in use under this service's name, or the actor does not answer.
    """
    for _ in range(5):
        handle = _Actor.options(
            name=actor_name(config.service), namespace=NAMESPACE, lifetime="detached", get_if_exists=True
        ).remote(config, load_keys(config.service))
        try:
            running, software = ray.get(handle.hello.remote(), timeout=HELLO_TIMEOUT_S)
        except RayActorError:
            continue  # it was being replaced: ask again for the one that stands now
        if running.storage != config.storage:
            raise ServiceError(
                f"service {config.service!r} keeps its records at {running.storage}; got {config.storage}: "
                "use another service name for another storage"
            )
        if running.deployed_s > config.deployed_s or (running.deployed_s, running.base) == (
            config.deployed_s,
            config.base,
        ):
            return handle
        log.info("replacing the orchestrator of %s (%s) by %s", config.service, software, SOFTWARE)
        _replace(handle, config.service)
    raise ServiceError(f"the orchestrator of {config.service!r} did not start in 5 tries: see the actor's log")


def _replace(handle: Any, service: str) -> None:
    """Let the old actor finish its pass, end it, and wait until its name is free."""
    try:
        ray.get(handle.retire.remote(), timeout=10)
    except (RayActorError, ray.exceptions.GetTimeoutError) as error:
        log.warning("the old orchestrator did not retire by itself: %s", error)
    ray.kill(handle, no_restart=True)
    for _ in range(100):
        try:
            if ray.get_actor(actor_name(service), NAMESPACE)._actor_id != handle._actor_id:
                return
        except ValueError:
            return
        threading.Event().wait(0.1)  # Ray frees the name in its own time and tells nobody
