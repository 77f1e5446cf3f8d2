"""Runs a search in this process, without Ray: for `heal rehearse` and for tests.

`launch` returns when the search has ended: a rehearsal's clock is virtual, its traffic must not run on meanwhile. The
trials, the choice of the winner and the gate's figures are the very same as under Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from orchestrator.errors import HealError
from orchestrator.keys import ServiceKeys
from orchestrator.messages import GateEvidence, SearchRequest, SearchStatus, TrialResult
from orchestrator.storage import Storage
from tuning.finish import measure, register_winner, save_runner_up
from tuning.outset import settle
from tuning.records import encode, read_evidence, read_status, started_key, write_evidence, write_status
from tuning.scoring import choose_runner_up, choose_winner
from tuning.sequential import describe, run_trials
from tuning.workbench import load_workbench


class InProcessRunner:
    """A `TrialRunner` that works in the caller's thread.

    Args:
        storage: of the service.
        keys: sign the winner's manifest; None leaves it unsigned.
        on_trial: told each trial's result as it ends, for progress display.
    """

    def __init__(
        self,
        storage: Storage,
        keys: ServiceKeys | None = None,
        on_trial: Callable[[TrialResult], None] | None = None,
    ) -> None:
        self._storage = storage
        self._keys = keys
        self._on_trial = on_trial
        self._cancelled: set[str] = set()
        self._final: dict[str, SearchStatus] = {}

    def launch(self, request: SearchRequest) -> None:
        """Runs the search, unless it has ended already."""
        if request.episode in self._cancelled or self.status(request.episode).state != "absent":
            return
        self._storage.put(started_key(request.episode), encode(request))
        try:
            status = self._search(request)
        except HealError as error:
            status = SearchStatus("failed", message=f"{type(error).__name__}: {error}")
        write_status(self._storage, request.episode, status)
        self._final[request.episode] = status

    def status(self, episode: str) -> SearchStatus:
        """Finished, failed or absent: there is no `running` here."""
        if episode not in self._final:
            stored = read_status(self._storage, episode)
            if stored is None:
                return SearchStatus("absent")
            self._final[episode] = stored
        return self._final[episode]

    def cancel(self, episode: str) -> None:
        """A search that has not begun will not; one that has ended stays ended."""
        self._cancelled.add(episode)

    def measure(self, request: SearchRequest, digest: str) -> None:
        """Measures the candidate, unless that was done."""
        if self.evidence(request.episode, digest) is None:
            write_evidence(self._storage, request.episode, measure(self._storage, request, digest))

    def evidence(self, episode: str, digest: str) -> GateEvidence | None:
        """What was measured."""
        return read_evidence(self._storage, episode, digest)

    def _search(self, request: SearchRequest) -> SearchStatus:
        start = time.monotonic()
        bench = load_workbench(self._storage, request)
        settled = settle(self._storage, bench, self._keys)
        if settled is not None:
            return settled
        base_score = bench.score(bench.module, [])["score"]
        cold_start_s = time.monotonic() - start
        deadline_s = time.time() + max(0.0, request.budget_s - cold_start_s)
        trials = run_trials(bench, bench.configurations(), deadline_s, self._on_trial)
        results = [result for result, _ in trials]
        winner = choose_winner(results, base_score)
        second = choose_runner_up(results, base_score, winner) if winner is not None else None
        adapters = {result.trial_id: exported for result, exported in trials}
        digest = runner_up = None
        if winner is not None and (exported := adapters[winner.trial_id]) is not None:
            digest = register_winner(self._storage, bench, winner, exported, self._keys)
        if second is not None:
            runner_up = save_runner_up(self._storage, bench, second, lambda: adapters[second.trial_id], self._keys)
        return SearchStatus(
            state="finished",
            trials=tuple(results),
            winner=digest,
            winner_trial=winner.trial_id if winner else None,
            runner_up=runner_up,
            runner_up_trial=second.trial_id if second else None,
            cold_start_s=cold_start_s,
            search_s=time.monotonic() - start,
            train_s=sum(r.seconds for r in results),
            buffered=len(bench.buffer),
            message=describe(winner, base_score, results),
        )
