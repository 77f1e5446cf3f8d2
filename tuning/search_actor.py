"""The search of one episode as a detached Ray actor: it outlives a crash of the orchestrator; a hung fit hurts nobody.

It reads the traffic, lets Tune run the trials, names the winner, registers it and later measures it for the gate. Work
runs in threads; calls answer at once. The outcome lies on the storage, so the actor may end at any time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
import torch

from orchestrator.errors import HealError
from orchestrator.keys import ServiceKeys
from orchestrator.messages import GateEvidence, SearchRequest, SearchStatus, TrialConfig, TrialResult
from orchestrator.storage import open_storage
from tuning.finish import measure, register_winner, save_runner_up
from tuning.outset import settle
from tuning.progress import Progress
from tuning.records import read_evidence, read_status, write_evidence, write_status
from tuning.scoring import choose_runner_up, choose_winner
from tuning.sequential import describe, run_trials
from tuning.spare import TrialResources, spare_resources
from tuning.trainable import Exported, read_checkpoint
from tuning.tune_run import fit
from tuning.workbench import Workbench, load_workbench

LINGER_S = 60.0  # an actor with nothing left to do ends after this, so that it frees its memory

log = logging.getLogger("rayheal")


class SearchActor:
    """Runs and judges the search of one episode. Its constructor returns at once.

    Args:
        request: the search.
        keys: sign the winner's manifest; None leaves it unsigned.
    """

    def __init__(self, request: SearchRequest, keys: ServiceKeys | None) -> None:
        torch.set_num_threads(1)  # the trials need the cores
        self._request, self._keys = request, keys
        self._storage = open_storage(request.storage)
        self._measuring: dict[str, threading.Thread] = {}
        self._touched_s = time.monotonic()
        self._progress: Progress | None = None
        self._final = read_status(self._storage, request.episode)
        self._cancelled = False
        self._thread = threading.Thread(target=self._run, name="search", daemon=True)
        self._thread.start()
        threading.Thread(target=self._end_when_idle, name="linger", daemon=True).start()

    def __repr__(self) -> str:
        """Shown in the dashboard and in log lines."""
        return f"Search({self._request.episode})"

    def status(self) -> SearchStatus:
        """How it stands now."""
        if self._final is not None:
            return self._final
        progress = self._progress
        if progress is None:
            return SearchStatus("running", message="reading traffic")
        return SearchStatus("running", trials=tuple(progress.results()), buffered=progress.buffered)

    def cancel(self) -> None:
        """Ends the search soon; idempotent."""
        self._cancelled = True
        if self._progress is not None:
            self._progress.cancelled = True

    def measure(self, digest: str) -> None:
        """Starts to measure a candidate; idempotent."""
        self._touched_s = time.monotonic()
        thread = self._measuring.get(digest)
        if thread is not None and thread.is_alive():
            return
        self._measuring[digest] = threading.Thread(target=self._measure, args=(digest,), daemon=True)
        self._measuring[digest].start()

    def _measure(self, digest: str) -> None:
        if read_evidence(self._storage, self._request.episode, digest) is None:
            resources = self._spare(1)
            evidence = _on_device(_measured, resources, self._request, digest)
            write_evidence(self._storage, self._request.episode, evidence)

    def _end_when_idle(self) -> None:
        """A finished actor holds a base model and a buffer; the records on the storage say all it knows."""
        while True:
            time.sleep(1.0)
            busy = self._thread.is_alive() or any(t.is_alive() for t in self._measuring.values())
            if busy:
                self._touched_s = time.monotonic()
            elif self._cancelled or time.monotonic() - self._touched_s > LINGER_S:
                ray.kill(ray.get_runtime_context().current_actor, no_restart=True)
                return

    def _run(self) -> None:
        if self._final is not None:
            return
        try:
            status = self._search()
        except HealError as error:
            status = SearchStatus("failed", message=f"{type(error).__name__}: {error}")
        except Exception as error:  # the orchestrator waits for an answer, whatever broke here
            log.exception("search %s broke", self._request.episode)
            status = SearchStatus("failed", message=f"{type(error).__name__}: {error}")
        write_status(self._storage, self._request.episode, status)
        self._final = status

    def _spare(self, num_trials: int) -> TrialResources:
        total, available = ray.cluster_resources(), ray.available_resources()
        return spare_resources(total, available, self._request.trial_device, num_trials)

    def _search(self) -> SearchStatus:
        started_s = time.time()
        request = self._request
        progress = Progress(self._storage, request, started_s + request.budget_s)
        self._progress = progress
        progress.cancelled = self._cancelled
        progress.write()
        # This process has no GPU, whatever the trials have.
        bench = load_workbench(self._storage, replace(request, trial_device="cpu"))
        progress.buffered = len(bench.buffer)
        settled = settle(self._storage, bench, self._keys)
        if settled is not None:
            return settled
        configs = progress.missing(bench.configurations())
        resources = self._spare(len(configs))
        inline: dict[str, Exported | None] = {}
        if resources.max_concurrent == 0:
            inline = self._run_inline(bench, configs, progress)
        elif configs and not progress.cancelled:
            fit(request, configs, resources, progress)
        first_s = progress.cold_start_s or started_s
        status = SearchStatus(
            state="finished",
            cold_start_s=first_s - started_s,
            train_s=sum(r.seconds for r in progress.results()),
            buffered=progress.buffered,
        )
        if progress.cancelled:
            status = replace(status, state="failed", message="cancelled", trials=tuple(progress.results()))
        else:
            status = self._conclude(status, bench, resources, progress, inline)
        return replace(status, search_s=time.time() - started_s)

    def _run_inline(
        self, bench: Workbench, configs: list[TrialConfig], progress: Progress
    ) -> dict[str, Exported | None]:
        """Serving reserved every CPU: actors would wait for ever, so this one does the work."""
        progress.cold_start_s = time.time()
        trials = run_trials(bench, configs, progress.deadline_s, progress.saw, lambda: progress.cancelled)
        return {result.trial_id: exported for result, exported in trials}

    def _conclude(
        self,
        status: SearchStatus,
        bench: Workbench,
        resources: TrialResources,
        progress: Progress,
        inline: dict[str, Exported | None],
    ) -> SearchStatus:
        """Names the winner, if any trial is one, and puts it into the registry."""
        results = progress.results()
        usable = [r for r in results if inline.get(r.trial_id) or progress.prefix(r.trial_id)]
        if not usable:
            words = next((r.error for r in results if r.error), "none found resources in time")
            return replace(status, state="failed", trials=tuple(results), message=f"no trial finished: {words}")
        base_score = _on_device(_base_score, resources, self._request)
        winner = choose_winner(usable, base_score)
        second = choose_runner_up(usable, base_score, winner) if winner is not None else None

        def exported(trial: TrialResult) -> Exported:
            return inline.get(trial.trial_id) or read_checkpoint(self._storage, progress.prefix(trial.trial_id))

        digest = runner_up = None
        if winner is not None:
            digest = _on_device(_registered, resources, self._request, winner, exported(winner), self._keys)
        if second is not None:
            runner_up = save_runner_up(self._storage, bench, second, lambda: exported(second), self._keys)
        return replace(
            status,
            trials=tuple(results),
            winner=digest,
            winner_trial=winner.trial_id if winner else None,
            runner_up=runner_up,
            runner_up_trial=second.trial_id if second else None,
            message=describe(winner, base_score, results),
        )


def _on_device(work: Callable[..., Any], resources: TrialResources, request: SearchRequest, *args: Any) -> Any:
    """`work(request, ...)` where the trials ran: in a task with a GPU, or here."""
    if not resources.num_gpus:
        return work(replace(request, trial_device="cpu"), *args)
    task = ray.remote(work).options(num_cpus=resources.num_cpus, num_gpus=1, name=f"{work.__name__} {request.episode}")
    return ray.get(task.remote(request, *args))


def _base_score(request: SearchRequest) -> float:
    bench = load_workbench(open_storage(request.storage), request)
    return float(bench.score(bench.module, [])["score"])


def _registered(request: SearchRequest, winner: TrialResult, exported: Exported, keys: ServiceKeys | None) -> str:
    storage = open_storage(request.storage)
    return register_winner(storage, load_workbench(storage, request), winner, exported, keys)


def _measured(request: SearchRequest, digest: str) -> GateEvidence:
    return measure(open_storage(request.storage), request, digest)
