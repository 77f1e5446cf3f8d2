"""Where the drift monitor's state waits for a restart of the orchestrator: one object on the storage, replaced.

Written each minute by the controller, read once when it starts. Losing it costs detection delay, never a false alarm.
"""

from __future__ import annotations

from orchestrator.errors import NotFound
from orchestrator.storage import Storage


class Snapshots:
    """The monitor's snapshot of one base.

    Args:
        storage: of the service.
        base: digest of the base model.
    """

    def __init__(self, storage: Storage, base: str) -> None:
        self._storage, self._key = storage, f"monitor/{base}.npz"

    def save(self, data: bytes) -> None:
        """Replace it."""
        self._storage.put(self._key, data)

    def load(self) -> bytes | None:
        """The last one, or None."""
        try:
            return self._storage.get(self._key)
        except NotFound:
            return None
