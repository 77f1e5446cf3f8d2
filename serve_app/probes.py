"""The probe of each version: made when its baseline is on the storage, looked for until then.

Called by `Healable`: the heartbeat thread refreshes, request threads read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

import torch

from orchestrator.drift.baseline import load_baseline
from orchestrator.storage import Storage
from serve_app.probe import Probe

RETRY_S = 2.0  # a baseline that is not there is looked for this often at most ...
FIRST_RETRY_S = 0.25  # ... and more eagerly at first


class Probes:
    """Probes by digest.

    Args:
        storage: holds the baselines.
        base: digest of the base model.
        layout: the spec's input layout.
        device: where the model runs.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        storage: Storage,
        base: str,
        layout: str,
        device: torch.device,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._storage, self._base, self._layout, self._device = storage, base, layout, device
        self._clock = clock
        self._probes: dict[str, Probe] = {}
        self._retry: dict[str, tuple[float, float]] = {}  # digest -> not before, pause

    def get(self, digest: str) -> Probe | None:
        """The probe of a version, None while its baseline is missing: nothing is counted then."""
        return self._probes.get(digest)

    def refresh(self, digest: str) -> None:
        """Look for a missing baseline, unless it was looked for just now. Reads the storage: not on the request path.

        Raises:
            IntegrityError, StorageError: the baseline is broken or out of reach.
        """
        not_before, pause_s = self._retry.get(digest, (0.0, FIRST_RETRY_S))
        if digest in self._probes or self._clock() < not_before:
            return
        self._retry[digest] = (self._clock() + pause_s, min(2 * pause_s, RETRY_S))
        baseline = load_baseline(self._storage, base=self._base, digest=digest)
        if baseline is not None:
            self._probes[digest] = Probe(baseline, self._layout, self._device)

    def retain(self, digests: Collection[str]) -> None:
        """Forget every other version's probe."""
        for digest in [d for d in self._probes if d not in digests]:
            del self._probes[digest]
        self._retry = {d: r for d, r in self._retry.items() if d in digests}
