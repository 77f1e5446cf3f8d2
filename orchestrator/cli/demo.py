"""`heal demo`: starts a real service, lets its world drift, watches it heal, and checks every answer on the way.

Ray, Serve, HTTP, Tune are all real; the demo is only their client. Called by the command of that name.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.cli.client import Client, short
from orchestrator.cli.inputs import DemoInputs, accuracy
from orchestrator.cli.load import Load, Sent, Stream
from orchestrator.cli.recompute import Recomputer, choose, two_faced
from orchestrator.cli.report import build_report
from orchestrator.cli.view import View
from orchestrator.datasets import Dataset
from orchestrator.errors import HealError, ServiceError
from orchestrator.keys import heal_home, load_keys
from orchestrator.messages import BASE, Phase, Verdict
from orchestrator.storage import open_storage

POLL_S = 0.5
ROWS = 4  # instances in a request
RATE, SEARCH_RATE = 25.0, 5.0  # requests per second; few while trials need the cores
MIN_REQUESTS = 1000  # in all
CLEAN_REQUESTS = 300
CLEAN_INSTANCES = 800  # that the drift test has seen before the world changes
AFTER_REQUESTS = 100  # after the verdict
EVAL_ROWS = 32  # instances in a request that measures
READY_S = 240.0  # for the orchestrator to have judged the clean traffic
KEEP_RUNS_S = 86400.0
WARM_MS = 900_000  # Ray ends idle workers after 1 s by default

# The digits are few and small: a search on 1,000 of them says as much as one on 2,000, in half the time.
DIGITS_SETTINGS: dict[str, Any] = {
    "buffer_instances": 1000,
    "num_trials": 4,
    "trial_epochs": 2,
    "search_budget_s": 60.0,
    "canary_instances": 64,
}


@dataclass
class DemoOptions:
    """What the command line may set."""

    labels: str = "none"
    port: int = 0
    replicas: int = 2
    requests: int = MIN_REQUESTS
    timeout_s: float = 900.0  # for the verdict, after the first drifted request
    storage: str = field(default_factory=lambda: str(run_folder()))
    dashboard: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


@contextmanager
def local_service(inputs: DemoInputs, options: DemoOptions, view: View) -> Iterator[tuple[str, str]]:
    """A Ray cluster of our own with the service on it: yields URL and service name; all of it ends with the block."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # it listens on loopback only
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # a busy laptop starts processes slowly
    from orchestrator import launch

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    service = f"demo-{inputs.spec.name}"
    args = launch.AppArgs(
        model=str(inputs.model),
        storage=options.storage,
        service=service,
        replicas=options.replicas,
        **{"mode": "auto", "labels": options.labels} | (DIGITS_SETTINGS if inputs.embedded else {}) | options.settings,
    )
    scratch = tempfile.mkdtemp(prefix="heal-", dir="/tmp")  # short: Ray puts socket paths of <= 107 bytes below it
    try:
        local = launch.start_local(
            args,
            options.port,
            address="local",
            num_cpus=os.cpu_count(),
            include_dashboard=options.dashboard,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=scratch,
            _system_config={"idle_worker_killing_time_threshold_ms": WARM_MS},
        )
        launch.warm_workers(args)
        if local.dashboard:
            view.say(f"Ray's dashboard is at {local.dashboard}")
        yield local.url, service
    finally:
        launch.stop_local()
        shutil.rmtree(scratch, ignore_errors=True)


def run_folder() -> Path:
    """A fresh folder for this run's records; runs of more than a day ago are removed."""
    runs = heal_home() / "demo" / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    for old in runs.iterdir():
        if time.time() - old.stat().st_mtime > KEEP_RUNS_S:
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=runs))


class Labeller:
    """Sends true labels back: none, all, or those of the first N drifted instances."""

    def __init__(self, client: Client, model: str, labels: str, data: dict[str, Dataset]) -> None:
        self._client, self._model, self._data = client, model, data
        self._left = float("inf") if labels == "all" else int(labels)
        self._only = None if labels == "all" else "drifted"
        self._lock = threading.Lock()

    def __call__(self, sent: Sent, token: str) -> None:
        """Label one answer."""
        truth = self._data[sent.stream].labels
        if truth is None or not token or (self._only and sent.stream != self._only):
            return
        with self._lock:
            count = int(min(len(sent.rows), self._left))
            self._left -= count
        labels = [(token, row, int(truth[sent.rows[row]])) for row in range(count) if truth[sent.rows[row]] >= 0]
        if labels:
            self._client.feedback(self._model, labels)


class Demo:
    """One run against a service that stands.

    Args:
        client: with an operator's token.
        inputs: model and data.
        options: of the command line.
        view: shows it.
    """

    def __init__(self, client: Client, inputs: DemoInputs, options: DemoOptions, view: View) -> None:
        self._client, self._inputs, self._options, self._view = client, inputs, options, view
        self._spec = inputs.spec
        self._met = False  # whether the orchestrator has answered yet
        self._away = ""  # why the orchestrator last did not answer
        self._data = {"clean": inputs.clean, "drifted": inputs.drifted}
        labeller = None
        if options.labels not in ("none", "0"):
            labeller = Labeller(client, self._spec.name, options.labels, self._data)
        self._drifted = Stream("drifted", inputs.drifted)
        self.load = Load(
            client, self._spec.name, self._spec.input_dtype, Stream("clean", inputs.clean), RATE, ROWS, labeller
        )

    def run(self) -> dict[str, Any]:
        """All of it; the report."""
        measured = {
            "clean_before": self._measure(self._inputs.eval_clean, BASE),
            "traffic_before": self._measure(self._inputs.eval_drifted, BASE),
        }
        self.load.start()
        try:
            self._view.say("clean traffic")
            self._watch(self._clean_enough, READY_S, "the drift baseline")
            self._view.say("the world drifts")
            self.load.switch(self._drifted)
            ended = self._watch(self._episode_closed, self._options.timeout_s)
            self.load.rate = RATE
            enough = max(self._options.requests, self.load.num_sent + AFTER_REQUESTS)
            self._watch(lambda _: self.load.num_sent >= enough, self._options.timeout_s)
            self._view.say("measuring what is served now, while requests flow")
            measured["traffic_after"] = self._measure(self._inputs.eval_drifted, None)
            measured["clean_after"] = self._measure(self._inputs.eval_clean, None)
        finally:
            self.load.stop()
        return self._report(measured, ended)

    def failed(self, reason: str) -> dict[str, Any]:
        """The report of a run that broke off; replies were not recomputed, so none is known to be mixed."""
        counts = {"sent": self.load.num_sent, "failed": self.load.failed}
        return failed_report(reason, self._options, requests=counts, onset_s=self._drifted.first_s)

    # ------------------------------------------------------------ waiting

    def _watch(self, done: Callable[[dict[str, Any]], bool], timeout_s: float, needed: str = "") -> bool:
        """Poll the state until `done`; False after `timeout_s`, or ServiceError where it is `needed`."""
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            state = self._state()
            if state is not None:
                searching = state["phase"] in (Phase.SEARCHING, Phase.GATING)
                self.load.rate = SEARCH_RATE if searching else RATE
                self._view.update(state, self.load.sent, self.load.stream.name)
                if done(state):
                    return True
            time.sleep(POLL_S)
        if needed:
            problem = (self._state() or {}).get("problem") or f"{self.load.failures[:1]}"
            raise ServiceError(f"{needed} was not there within {timeout_s:.0f} s: {problem}")
        return False

    def _state(self) -> dict[str, Any] | None:
        """The state; None while the orchestrator is away, which traffic does not notice."""
        try:
            state = self._client.state()
        except ServiceError as error:
            if str(error) != self._away and self._met:  # before, it is still starting
                self._view.say(str(error))
            self._away = str(error)
            return None
        self._met = True
        return state

    def _clean_enough(self, state: dict[str, Any]) -> bool:
        seen = sum(s["instances"] for name, s in state["drift"]["scopes"].items() if name.endswith("global"))
        return seen >= CLEAN_INSTANCES and self.load.num_sent >= CLEAN_REQUESTS

    def _episode_closed(self, state: dict[str, Any]) -> bool:
        last = state.get("last_verdict")
        return state.get("episode") is None and last is not None and last["closed_s"] >= (self._drifted.first_s or 0)

    # ------------------------------------------------------------ measuring

    def _measure(self, data: Dataset, version: str | None) -> float | None:
        """Accuracy over HTTP; not monitored, not stored."""
        logits = [
            self._client.infer(
                self._spec.name, data.inputs[i : i + EVAL_ROWS], self._spec.input_dtype, version, monitor=False
            ).logits
            for i in range(0, len(data), EVAL_ROWS)
        ]
        return accuracy(np.concatenate(logits).argmax(axis=1), data.labels)

    def _episode(self) -> dict[str, Any] | None:
        """The record of the first episode that was still open when the drift began, or opened since."""
        began_s = self._drifted.first_s or 0.0
        found = [e for e in self._client.get("/healing/episodes") if (e["closed_s"] or began_s) >= began_s]
        return found[0] if found else None

    def _report(self, measured: dict[str, float | None], ended: bool) -> dict[str, Any]:
        state, episode = self._client.state(), self._episode()
        alarm = (episode or {}).get("alarm")
        sent, good = self.load.sent, [s for s in self.load.sent if not s.error]
        after = None
        if alarm is not None:
            after = sum(len(s.rows) for s in sent if s.stream == "drifted" and s.at_s <= float(alarm["raised_s"]))
        self._view.say("recomputing replies with the versions that they claim")
        chosen = choose(good)
        mixed = Recomputer(open_storage(state["storage"]), state["base"]).count_mixed(chosen, self._data)
        self._view.say(f"recomputed {len(chosen)} of {len(good)} replies")
        for problem in self.load.failures:
            self._view.say(problem)
        fallback = (Verdict.NO_DRIFT, "no alarm was raised")
        if episode is not None and not ended:
            fallback = (Verdict.ERROR, f"no verdict within {self._options.timeout_s:.0f} s; phase {state['phase']}")
        self._view.say(f"serving generation {state['generation']}: {short(state['stable'])}")
        return build_report(
            episode,
            accuracy=measured,
            alarm_after=after,
            onset_s=self._drifted.first_s,
            seeds={"service": self._options.settings.get("seed", 0)},
            fallback=fallback,
            requests={"sent": len(sent), "failed": self.load.failed, "mixed_generation": mixed + two_faced(good)},
        )


def run_demo(inputs: DemoInputs, options: DemoOptions, view: View) -> dict[str, Any]:
    """Start, run, stop; the report. What could not be started or measured is a verdict too: `error`."""
    view.say("starting Ray and Serve")
    try:
        with local_service(inputs, options, view) as (url, service):
            view.say(f"serving {inputs.spec.name} at {url}")
            client = Client(url, load_keys(service).tokens["operator"])
            demo = Demo(client, inputs, options, view)
            try:
                return demo.run()
            except HealError as error:
                return demo.failed(str(error))
            finally:
                client.close()
    except HealError as error:
        return failed_report(str(error), options)


def failed_report(reason: str, options: DemoOptions, **known: Any) -> dict[str, Any]:
    """A report of a run that could not be measured: every key is there, and what is not known is null."""
    values = {"accuracy": {}, "alarm_after": None, "onset_s": None, "requests": {}} | known
    return build_report(
        None, seeds={"service": options.settings.get("seed", 0)}, fallback=(Verdict.ERROR, reason), **values
    )
