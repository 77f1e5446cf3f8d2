"""What is known of a running search: shared by Tune's thread and the search actor's calls, and kept on the storage.

Nothing here is ever unpickled: after a restart the trials that had a checkpoint are read back from JSON and
safetensors, and only the others run again: `Tuner.restore` would unpickle what anyone who can write the storage put
there.
"""

from __future__ import annotations

import json
import threading
from dataclasses import asdict

from orchestrator.errors import NotFound
from orchestrator.messages import SearchRequest, TrialConfig, TrialResult
from orchestrator.storage import Storage
from tuning.records import decode_trial, plain


class Progress:
    """Results and checkpoints of one search, by trial id. Thread-safe.

    Args:
        storage: keeps the progress beside the trials.
        request: the search.
        deadline_s: seconds since the epoch.
    """

    def __init__(self, storage: Storage, request: SearchRequest, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self.cancelled = False
        self.cold_start_s = 0.0
        self.buffered = 0
        self._storage, self._request = storage, request
        self._key = f"trials/{request.episode}/progress.json"
        self._lock = threading.Lock()
        self._results: dict[str, TrialResult] = {}
        self._checkpoints: dict[str, str] = {}  # trial id -> key prefix
        self._read_back()

    def _read_back(self) -> None:
        try:
            stored = json.loads(self._storage.get(self._key))
        except NotFound:
            return
        self.deadline_s, self.cold_start_s = float(stored["deadline_s"]), float(stored["cold_start_s"])
        for values, prefix in stored["trials"]:
            if values["status"] != "running" and (not prefix or self._storage.exists(f"{prefix}/trial.json")):
                self._results[values["trial_id"]] = decode_trial(values)
                self._checkpoints[values["trial_id"]] = prefix

    def write(self) -> None:
        """Puts the progress on the storage."""
        with self._lock:
            trials = [(plain(asdict(r)), self._checkpoints.get(r.trial_id, "")) for r in self._results.values()]
        body = {"deadline_s": self.deadline_s, "cold_start_s": self.cold_start_s, "trials": trials}
        self._storage.put(self._key, json.dumps(body).encode())

    def saw(self, result: TrialResult, prefix: str = "") -> None:
        """Notes a trial's newest result, and where its checkpoint lies."""
        with self._lock:
            self._results[result.trial_id] = result
            if prefix:
                self._checkpoints[result.trial_id] = prefix

    def results(self) -> list[TrialResult]:
        """Every trial's newest result."""
        with self._lock:
            return list(self._results.values())

    def prefix(self, trial_id: str) -> str:
        """Where a trial's checkpoint lies; empty when it has none."""
        with self._lock:
            return self._checkpoints.get(trial_id, "")

    def missing(self, configs: list[TrialConfig]) -> list[TrialConfig]:
        """Configurations that have no final result yet."""
        known = [r.config for r in self.results() if r.status != "running"]
        return [c for c in configs if c not in known]
