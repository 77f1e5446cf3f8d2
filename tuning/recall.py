"""Earlier adapters of this base: a drift that was healed before heals again without a training step.

Both runners ask before any trial. An adapter is known again by what it sees: its baseline holds how the traffic looked
to it when it was made, and traffic of the same drift looks so again. One that is known again and serves better than the
base by the label-free estimate is the winner, and nothing is trained. The gate judges it like any other.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace

import numpy as np

from orchestrator.drift.baseline import load_baseline
from orchestrator.drift.statistics import fourier_features, squared_gap
from orchestrator.errors import HealError
from orchestrator.messages import TrialResult
from orchestrator.registry import list_adapters, load_adapter
from orchestrator.storage import Storage
from tuning.adapter import merged_twin
from tuning.base_model import collect_sample
from tuning.objective import statistics_layers
from tuning.records import decode_trial
from tuning.scoring import WINNER_MARGIN
from tuning.workbench import Workbench

MAX_ADAPTERS = 8  # the newest are tried: a pass over ROWS rows each
ROWS = 400
SAME = 0.10  # squared distance to the traffic it was made for, in that of the drift from the reference
RECALLED = "recalled"

log = logging.getLogger("rayheal")


@dataclass(frozen=True)
class Recalled:
    """An adapter that was known again."""

    digest: str
    result: TrialResult


def recall(storage: Storage, bench: Workbench, public_key: bytes | None) -> Recalled | None:
    """The earlier adapter that was made for traffic like this and serves it best; None where there is none.

    Args:
        storage: holds the registry.
        bench: the episode's data and base.
        public_key: must have signed the adapter's manifest; None: unsigned ones will do.
    """
    manifests = sorted(list_adapters(storage, bench.request.base), key=_made_s, reverse=True)[:MAX_ADAPTERS]
    if not manifests:
        return None
    inputs = bench.parts["train"].inputs[:ROWS]
    seen = collect_sample(bench.module, bench.tap, inputs, bench.device, layout=bench.layout)
    drift = squared_gap(fourier_features(bench.baseline, seen.embedding_ND), bench.baseline.reference_mean_M)
    least = bench.score(bench.module, [], as_it_is=True)["score"] + WINNER_MARGIN
    found: list[Recalled] = []
    for manifest in manifests:
        try:
            known = _try(storage, bench, manifest["digest"], public_key, inputs, drift)
        except HealError as error:
            log.warning("adapter %s is no candidate: %s", manifest["digest"], error)
            continue
        if known is not None and known.result.score >= least:
            found.append(known)
    return max(found, key=lambda r: r.result.score, default=None)


def _made_s(manifest: dict[str, object]) -> float:
    data = manifest.get("data")
    return float(data.get("until_s", 0.0)) if isinstance(data, dict) else 0.0


def _try(
    storage: Storage, bench: Workbench, digest: str, public_key: bytes | None, inputs: np.ndarray, drift: float
) -> Recalled | None:
    start = time.monotonic()
    baseline = load_baseline(storage, digest, bench.request.base)
    if baseline is None:
        return None
    config, tensors, manifest = load_adapter(storage, digest, public_key)
    if not isinstance(manifest.get("trial"), dict):
        return None
    twin = merged_twin(bench.module, config, tensors)
    seen = collect_sample(twin, bench.tap, inputs, bench.device, layout=bench.layout)
    if squared_gap(fourier_features(baseline, seen.embedding_ND), baseline.normal_mean_M) > SAME * drift:
        return None
    layers = statistics_layers(twin, config.get("modules_to_save") or [])
    figures = bench.score(twin, layers, as_it_is=True)
    result = replace(
        decode_trial(manifest["trial"]),
        trial_id=f"{bench.request.episode}-recalled",
        status="finished",
        objective=RECALLED,
        score=figures["score"],
        labelled_accuracy=figures["labelled_accuracy"],
        epochs=0,
        seconds=time.monotonic() - start,
        error="",
    )
    return Recalled(digest, result)
