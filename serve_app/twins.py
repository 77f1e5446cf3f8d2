"""The base model and its merged twins: prepared off the request path, swapped by one reference assignment.

Called by `Healable`: the heartbeat thread prepares and activates, request threads read `current`. A twin is never
changed after it was prepared, so a batch that read `current` once cannot mix versions.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import nn

from orchestrator.errors import AdapterError, RequestError
from orchestrator.messages import BASE
from orchestrator.registry import load_adapter
from orchestrator.storage import Storage
from tuning.adapter import check_adapter, merged_twin

log = logging.getLogger("rayheal")


@dataclass(frozen=True)
class Served:
    """One version ready to answer: the module of `digest`, and the generation that is in force."""

    generation: int
    digest: str
    module: nn.Module


class Twins:
    """Every version that this replica can serve.

    Args:
        module: the base, in eval mode on its device; never changed.
        storage: where the adapters are.
        base: the base's digest; adapters made for another base are refused.
        warm: called with a fresh twin before it may serve: one forward pass.
    """

    def __init__(
        self, module: nn.Module, storage: Storage, base: str, warm: Callable[[nn.Module], object] | None = None
    ) -> None:
        self._storage, self._base, self._warm = storage, base, warm
        self._loading = threading.Lock()  # one twin is built at a time
        self._flip = threading.Lock()
        self._modules: dict[str, nn.Module] = {BASE: module}
        self._current = Served(0, BASE, module)

    @property
    def current(self) -> Served:
        """What is served by default now. Read it once per batch."""
        return self._current

    @property
    def versions(self) -> tuple[str, ...]:
        """Every version in memory, the base first."""
        return tuple(self._modules)

    def prepare(self, digest: str) -> nn.Module:
        """Load, check, merge and warm a version unless it is there. Slow: never on the request path.

        Raises:
            AdapterError: it does not fit this base.
            IntegrityError, StorageError: its bytes are broken or out of reach.
        """
        ready = self._modules.get(digest)
        if ready is not None:
            return ready
        with self._loading:
            ready = self._modules.get(digest)
            if ready is not None:
                return ready
            config, tensors, manifest = load_adapter(self._storage, digest)
            if manifest.get("base") != self._base:
                raise AdapterError(
                    f"adapter {digest} must be made for base {self._base}; it is for {manifest.get('base')}"
                )
            module = self._modules[BASE]
            check_adapter(module, config, tensors)
            twin = merged_twin(module, config, tensors)
            if self._warm is not None:
                self._warm(twin)
            self._modules[digest] = twin
            return twin

    def activate(self, generation: int, digest: str) -> bool:
        """Serve `digest` by default from the next batch on; it must be prepared.

        Returns:
            False when `generation` is older than the one in force: nothing changes then.
        """
        module = self._modules[digest]
        with self._flip:
            if generation < self._current.generation:
                return False
            if (generation, digest) != (self._current.generation, self._current.digest):
                log.info("serving generation %d: %s", generation, digest)
                self._current = Served(generation, digest, module)
            return True

    def get(self, version: str) -> Served:
        """A version in memory; RequestError (404) lists those there are."""
        current = self._current
        if version == current.digest:
            return current
        module = self._modules.get(version)
        if module is None:
            raise RequestError(f"version must be one of {', '.join(self.versions)}; got {ascii(version)[:80]}", 404)
        return Served(current.generation, version, module)

    def find(self, digest: str) -> nn.Module | None:
        """The module of a version in memory."""
        return self._modules.get(digest)

    def retain(self, versions: Collection[str]) -> None:
        """Free every version but these, the base and the current one; a batch under way keeps its own."""
        keep = {BASE, self._current.digest, *versions}
        with self._loading:
            for digest in [d for d in self._modules if d not in keep]:
                del self._modules[digest]
