"""The orchestrator's side of a search under Ray: starts it, asks how it stands, never waits for it.

A search lives in a detached actor of its own (`search_actor`), found by name; its outcome lies on the storage. So an
orchestrator that crashed finds the search again, and one whose search actor died learns that it did.
"""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError

from orchestrator.keys import ServiceKeys
from orchestrator.messages import GateEvidence, SearchRequest, SearchStatus
from orchestrator.settings import NAMESPACE
from orchestrator.storage import Storage
from tuning.records import encode, read_evidence, read_status, started_key
from tuning.search_actor import SearchActor

ANSWER_S = 0.5  # longest wait for an actor's answer in one pass

log = logging.getLogger("rayheal")
_Actor = ray.remote(num_cpus=0, max_restarts=1, max_task_retries=0, max_concurrency=8)(SearchActor)


class RayTrialRunner:
    """A `TrialRunner` on the Ray cluster. Needs an initialised Ray.

    Args:
        service: part of the actors' names.
        storage: of the service; the cluster's nodes must reach its URI.
        keys: sign the winners' manifests; None leaves them unsigned.
    """

    def __init__(self, service: str, storage: Storage, keys: ServiceKeys | None = None) -> None:
        self._service, self._storage, self._keys = service, storage, keys
        self._final: dict[str, SearchStatus] = {}
        self._last: dict[str, SearchStatus] = {}
        self._asked: dict[str, Any] = {}  # one question at a time per episode: a slow actor collects no queue

    def launch(self, request: SearchRequest) -> None:
        """Starts the search of an episode unless it runs, has ended or has died."""
        if self.status(request.episode).state != "absent":
            return
        self._storage.put(started_key(request.episode), encode(request))
        self._actor(request)

    def status(self, episode: str) -> SearchStatus:
        """How the search stands; answers within about half a second."""
        if episode in self._final:
            return self._final[episode]
        status = self._ask(episode) or self._stored(episode)
        if status.state in ("finished", "failed"):
            self._final[episode] = status
            self._asked.pop(episode, None)
        elif status.state == "running":
            self._last[episode] = status
        return status

    def cancel(self, episode: str) -> None:
        """Ends the search soon, if it runs; the actor goes away by itself."""
        handle = self._find(episode)
        if handle is not None:
            handle.cancel.remote()

    def measure(self, request: SearchRequest, digest: str) -> None:
        """Starts to measure a candidate, unless that was done."""
        if self.evidence(request.episode, digest) is None:
            self._actor(request).measure.remote(digest)

    def evidence(self, episode: str, digest: str) -> GateEvidence | None:
        """What was measured, or None while it is not there."""
        return read_evidence(self._storage, episode, digest)

    def _name(self, episode: str) -> str:
        return f"heal-search-{self._service}-{episode}"

    def _actor(self, request: SearchRequest) -> Any:
        name = self._name(request.episode)
        options = {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
        return _Actor.options(**options).remote(request, self._keys)

    def _find(self, episode: str) -> Any | None:
        try:
            return ray.get_actor(self._name(episode), NAMESPACE)
        except ValueError:
            return None

    def _ask(self, episode: str) -> SearchStatus | None:
        """The actor's answer, or the last one while it is slow; None when there is no actor."""
        handle = self._find(episode)
        if handle is None:
            self._asked.pop(episode, None)
            return None
        waiting = SearchStatus("running", message="the search actor starts")
        question = self._asked.get(episode)
        if question is None or ray.wait([question], timeout=0)[0]:  # an old answer is stale
            question = self._asked[episode] = handle.status.remote()
        if not ray.wait([question], timeout=ANSWER_S)[0]:
            return self._last.get(episode, waiting)
        del self._asked[episode]
        try:
            answer: SearchStatus = ray.get(question)
        except ActorUnavailableError:  # it restarts, and goes on from its records
            return self._last.get(episode, waiting)
        except RayActorError as error:
            log.warning("search actor of %s: %s", episode, error)
            return self._last.get(episode, waiting) if self._find(episode) is not None else None
        return answer

    def _stored(self, episode: str) -> SearchStatus:
        """What the storage knows of a search without an actor."""
        final = read_status(self._storage, episode)
        if final is not None:
            return final
        if self._storage.exists(started_key(episode)):
            return SearchStatus("failed", message="the search actor died and could not be restarted")
        return SearchStatus("absent")
