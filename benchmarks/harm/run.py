"""Plays one episode: the rehearsal that a user would run, then the truth about it.

The whole loop decides (alarm, diagnosis, search, gate, canary) on a virtual clock with the real parts. Where it did
not heal, the trials that its search would run are run again and scored on the truth: could the best have healed?
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.harm.episodes import Episode, make
from orchestrator.cli.inputs import reference_parts
from orchestrator.cli.rehearse import Rehearsal, RehearsalInputs, RehearsalOptions
from orchestrator.datasets import Dataset
from orchestrator.gate import sign_test
from orchestrator.messages import Kind, SearchRequest
from orchestrator.spec import load_spec
from serve_app.digits.images import load_images
from serve_app.digits.prepare import prepare
from tuning.adapter import merged_twin
from tuning.scoring import predict
from tuning.sequential import run_trials
from tuning.workbench import load_workbench

HARM, HARM_P = 0.01, 1e-3  # accuracy lost on the live mixture; one-sided, exact, over the same instances
HEALABLE = 0.03  # gain of the best trial on the live mixture


@dataclass
class Outcome:
    """What came of an episode. Accuracies 0..1 on evaluation rows of the live mixture."""

    episode: Episode
    verdict: str
    kind: str
    reason: str
    before: float
    after: float
    harm_p: float  # that served is no worse than the base; 1 where the base is served
    best: float  # of the trials; only known where nothing was healed, else `after`
    seconds: float

    @property
    def harmed(self) -> bool:
        """A promotion that made it worse."""
        return self.before - self.after > HARM and self.harm_p < HARM_P

    @property
    def healable(self) -> bool:
        """The best trial gains enough to matter."""
        return max(self.best, self.after) - self.before >= HEALABLE

    @property
    def healed(self) -> bool:
        """Healed, with a gain."""
        return self.verdict == "healed" and self.after > self.before

    def plain(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return asdict(self)


def play(job: tuple[Path, Episode, dict[str, Any]]) -> Outcome:
    """An episode in a process of one thread: output folder, episode, settings. Keeps the outcome as JSON."""
    out, episode, settings = job
    kept = out / f"{episode.name}.json"
    if kept.exists():
        values = json.loads(kept.read_text())
        return Outcome(**{**values, "episode": Episode(**values["episode"])})
    torch.set_num_threads(1)
    with TemporaryDirectory(prefix="harm-") as folder:
        outcome = _play(episode, settings, Path(folder))
    kept.write_text(json.dumps(outcome.plain()))
    return outcome


def _play(episode: Episode, settings: dict[str, Any], folder: Path) -> Outcome:
    start = time.monotonic()
    data, spec = make(episode, load_images()), load_spec(prepare().model)
    told = data.traffic if episode.labels != "none" else Dataset(data.traffic.inputs, None)
    inputs = RehearsalInputs(spec, told, data.evaluation, reference_parts(spec)["report"])
    rehearsal = Rehearsal(inputs, RehearsalOptions(episode.labels, str(folder), settings))
    report = rehearsal.run()
    served, base = rehearsal.answers(data.evaluation.inputs)
    truth = data.evaluation.labels
    wins, losses = int(((served == truth) & (base != truth)).sum()), int(((base == truth) & (served != truth)).sum())
    outcome = Outcome(
        episode=episode,
        verdict=str(report["verdict"]),
        kind=str(report["drift"]["kind"]),
        reason=str(report["reason"]),
        before=float(np.mean(base == truth)),
        after=float(np.mean(served == truth)),
        harm_p=sign_test(losses, wins),
        best=float(np.mean(served == truth)),
        seconds=time.monotonic() - start,
    )
    if not outcome.healed:
        outcome.best = _best(episode, rehearsal, data.evaluation, settings)
    return outcome


def _best(episode: Episode, rehearsal: Rehearsal, evaluation: Dataset, settings: dict[str, Any]) -> float:
    """True accuracy of the best trial of the search that could have been run on all the traffic."""
    request = SearchRequest(
        episode="what-if",
        base=rehearsal.base,
        storage=rehearsal.storage.uri,
        since_s=0.0,
        until_s=4e9,
        max_instances=2000,
        labels=episode.labels,
        kind=Kind.COVARIATE_HARMFUL,
        seed=0,
        budget_s=600.0,
        num_trials=int(settings["num_trials"]),
        epochs=int(settings["trial_epochs"]),
        trial_device="cpu",
    )
    bench = load_workbench(rehearsal.storage, request, keep=False)
    trials = run_trials(bench, bench.configurations(), time.time() + request.budget_s)
    found = [0.0]
    for _, exported in trials:
        if exported is not None:
            logits = predict(merged_twin(bench.module, *exported), evaluation.inputs, bench.device)
            found.append(float(np.mean(logits.argmax(axis=1) == evaluation.labels)))
    return max(found)
