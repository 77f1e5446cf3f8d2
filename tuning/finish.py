"""From the winner of a search to an adapter in the registry, and from there to the evidence that the gate judges.

Called by both runners. The gate's figures come from rows that neither trained nor chose anything.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from torch import nn

from orchestrator.drift.baseline import Sample, fit_baseline, load_baseline, save_baseline
from orchestrator.drift.estimate import Mixture, split_mixture
from orchestrator.drift.statistics import fourier_features, probabilities, squared_gap
from orchestrator.errors import DataError, HealError
from orchestrator.keys import ServiceKeys
from orchestrator.messages import GateEvidence, Kind, Placement, SearchRequest, TrialResult
from orchestrator.metric import metric_name, score
from orchestrator.registry import load_adapter, save_adapter
from orchestrator.settings import SCHEMA_VERSION
from orchestrator.storage import Storage
from tuning.adapter import check_adapter, merged_twin
from tuning.base_model import collect_sample
from tuning.objective import statistics_layers
from tuning.paired import (
    LookRows,
    decisive_evidence,
    estimate_bound,
    labelled_evidence,
    look_evidence,
    see_look_rows,
    segment_evidence,
)
from tuning.records import plain
from tuning.scoring import (
    class_shares,
    corrected_posteriors,
    logit_offset,
    total_variation,
)
from tuning.trainable import Exported
from tuning.workbench import Workbench, known_labels, load_workbench, visible

MIN_GATE_ROWS = 8
# A class answered for 2% of the reference is lost below a tenth of that share, unless the candidate still recalls half
# of its rows with the traffic's look: then the traffic has few of it.
SEEN_SHARE, LOST_SHARE, KEPT_RECALL = 0.02, 0.10, 0.5

log = logging.getLogger("rayheal")


def register_winner(
    storage: Storage, bench: Workbench, result: TrialResult, exported: Exported, keys: ServiceKeys | None
) -> str:
    """Saves the winner and its drift baseline; the same winner again changes nothing.

    Args:
        storage: of the registry.
        bench: the episode's data and base.
        result: the trial's figures, for the manifest.
        exported: PEFT config and tensors.
        keys: sign the manifest; None leaves it unsigned.

    Returns:
        The adapter's digest.

    Raises:
        AdapterError: the adapter does not fit its base.
    """
    digest = save_candidate(storage, bench, result, exported, keys)
    save_baseline_of(storage, bench, digest)
    return digest


def save_candidate(
    storage: Storage, bench: Workbench, result: TrialResult, exported: Exported, keys: ServiceKeys | None
) -> str:
    """Saves an adapter alone: its drift baseline takes passes over all data, and it may never be asked for.

    Raises:
        AdapterError: the adapter does not fit its base.
    """
    config, tensors = exported
    check_adapter(bench.module, config, tensors)
    return save_adapter(storage, config, tensors, _manifest(bench, result), keys)


def save_runner_up(
    storage: Storage,
    bench: Workbench,
    result: TrialResult,
    read: Callable[[], Exported | None],
    keys: ServiceKeys | None,
) -> str | None:
    """The digest of the second choice; None where it cannot be had: the winner stands without it."""
    try:
        exported = read()
        return None if exported is None else save_candidate(storage, bench, result, exported, keys)
    except HealError as error:
        log.warning("the second choice of %s is not kept: %s", bench.request.episode, error)
        return None


def save_baseline_of(storage: Storage, bench: Workbench, digest: str) -> None:
    """Measures and saves the drift baseline of an adapter in the registry, unless there is one."""
    if load_baseline(storage, digest, bench.request.base) is not None:
        return
    config, tensors, _ = load_adapter(storage, digest)
    twin = merged_twin(bench.module, config, tensors)
    baseline = fit_baseline(
        bench.request.base,
        digest,
        _sample(bench, twin, bench.reference.inputs, bench.reference.labels),
        _sample(bench, twin, bench.buffer.inputs, bench.buffer.labels),
        bench.baseline,
        num_channels=bench.baseline.num_channels,
    )
    save_baseline(storage, baseline)


def _manifest(bench: Workbench, result: TrialResult) -> dict[str, Any]:
    request = bench.request
    return {
        "schema_version": SCHEMA_VERSION,
        "base": request.base,
        "episode": request.episode,
        "data": {
            "since_s": request.since_s,
            "until_s": request.until_s,
            "instances": len(bench.buffer),
            "labelled": bench.buffer.num_labelled,
            "parts": {name: len(part) for name, part in bench.parts.items()},
        },
        "trial": plain(asdict(result)),
        "request": asdict(request),
        "seeds": {"search": request.seed, "trial": result.config.seed},
    }


def _sample(bench: Workbench, module: nn.Module, inputs: np.ndarray, labels: np.ndarray | None) -> Sample:
    return collect_sample(module, bench.tap, inputs, bench.device, labels=labels, layout=bench.layout)


def measure(storage: Storage, request: SearchRequest, digest: str) -> GateEvidence:
    """Measures a candidate beside the base on the gate rows and on the gate part of the reference.

    Args:
        storage: holds the adapter and the episode's traffic.
        request: the search that made it.
        digest: the candidate.

    Returns:
        The evidence; where it could not be measured, `error` says why and the figures are nan.
    """
    start = time.monotonic()
    try:
        bench = load_workbench(storage, request)
        evidence = _measure(bench, storage, digest)
        save_baseline_of(storage, bench, digest)
    except (HealError, ValueError) as error:
        nan = float("nan")
        evidence = GateEvidence(
            candidate=digest, instances=0, reference_base=nan, reference_candidate=nan, reference_share=nan,
            shift_base=nan, shift_candidate=nan, marginal_max=nan, marginal_distance=nan, classes_lost=0,
            estimate_base=nan, estimate_candidate=nan, error=f"{type(error).__name__}: {error}",
        )  # fmt: skip
    return replace(evidence, seconds=time.monotonic() - start)


def _measure(bench: Workbench, storage: Storage, digest: str) -> GateEvidence:
    gate, reference = bench.parts["gate"], bench.reference_gate
    labels = known_labels(reference)
    if min(len(gate), len(labels)) < MIN_GATE_ROWS:
        got = f"{len(gate)} and {len(labels)}"
        raise DataError(f"the gate needs >= {MIN_GATE_ROWS} rows of traffic and of the reference; got {got}")
    config, tensors, manifest = load_adapter(storage, digest)
    twin = merged_twin(bench.module, config, tensors)
    base_traffic = _sample(bench, bench.module, gate.inputs, None)
    base_reference = _sample(bench, bench.module, reference.inputs, None)
    traffic = _sample(bench, twin, gate.inputs, None)
    mix = _sample(bench, twin, bench.calibration_mix, None)
    reference_N = _sample(bench, twin, reference.inputs, None).logits_NK.argmax(axis=1)
    reference_base_N = base_reference.logits_NK.argmax(axis=1)
    look = see_look_rows(bench, twin)
    saved = config.get("modules_to_save") or []
    base_confidence_N, confidence_N, bound = _confidences(bench, twin, saved, base_traffic, traffic, look)
    split, segments = _split_from_reference(bench, manifest, base_reference, base_traffic)
    drifted = None if split is None else split.drifted_N
    shares = class_shares(traffic.logits_NK)
    known = bench.baseline.reference_class_shares_K
    metric, names = bench.spec.metric, bench.spec.classes
    return GateEvidence(
        candidate=digest,
        instances=len(gate),
        reference_base=float((reference_base_N == labels).mean()),
        reference_candidate=float((reference_N == labels).mean()),
        reference_share=1.0 if split is None else split.share,
        shift_base=_shift(bench, base_traffic, base_reference),
        shift_candidate=_shift(bench, traffic, mix),
        marginal_max=float(shares.max()),
        marginal_distance=total_variation(shares, known),
        classes_lost=_classes_lost(known, shares, look),
        estimate_base=float(base_confidence_N.mean()),
        estimate_candidate=float(confidence_N.mean()),
        estimate_bound=bound,
        metric=metric_name(metric),
        metric_base=score(metric, names, labels, reference_base_N),
        metric_candidate=score(metric, names, labels, reference_N),
        segments=segment_evidence(gate, confidence_N - base_confidence_N, segments, drifted),
        **look_evidence(bench, look),
        **decisive_evidence(
            gate,
            (base_traffic.logits_NK.argmax(axis=1), base_confidence_N),
            (traffic.logits_NK.argmax(axis=1), confidence_N),
        ),
        **labelled_evidence(bench, gate, base_traffic.logits_NK, traffic.logits_NK),
    )


def _classes_lost(known_K: np.ndarray, shares_K: np.ndarray, look: LookRows) -> int:
    """Classes that the candidate hardly answers any more, for all that can be told."""
    right_N = look.candidate_NK.argmax(axis=1) == look.labels_N
    rows_K, right_K = (np.bincount(look.labels_N, w, minlength=len(known_K)) for w in (None, right_N))
    recalled_K = right_K >= KEPT_RECALL * np.maximum(rows_K, 1)
    return int(((known_K >= SEEN_SHARE) & (shares_K < LOST_SHARE * known_K) & ~recalled_K).sum())


def _confidences(
    bench: Workbench, twin: nn.Module, saved: list[str], base: Sample, candidate: Sample, look: LookRows
) -> tuple[np.ndarray, np.ndarray, float]:
    """Label-free chances of being right, of base and candidate on each row, and the lower bound of the candidate's.

    Calibrated confidences, or corrected posteriors. No bound under a prior shift: the look's rows have the reference's
    class shares, on which corrected posteriors do not hold.
    """
    base_NK, candidate_NK = base.logits_NK, candidate.logits_NK
    if bench.request.kind is Kind.PRIOR_SHIFT:
        temperature, old_K = bench.baseline.temperature, bench.baseline.confusion_KK.sum(axis=0)
        _, new_K = logit_offset(base_NK, temperature, old_K)
        posteriors = corrected_posteriors(base_NK, temperature, old_K, new_K)
        rows = np.arange(len(posteriors))
        base_N, candidate_N = (posteriors[rows, x.argmax(axis=1)] for x in (base_NK, candidate_NK))
        return base_N, candidate_N, float("nan")
    base_N = probabilities(base_NK, bench.temperature(bench.module, [])).max(axis=1)
    heat = bench.temperature(twin, statistics_layers(twin, saved))
    candidate_N, look_N = (probabilities(x, heat).max(axis=1) for x in (candidate_NK, look.candidate_NK))
    return base_N, candidate_N, estimate_bound(candidate_N, look, look_N)


def _split_from_reference(
    bench: Workbench, manifest: dict[str, Any], reference: Sample, gate: Sample
) -> tuple[Mixture | None, np.ndarray]:
    """Which traffic looks like the reference in the base's eyes, with each row's segment.

    Train rows, those that the look was fitted on, join the gate's. A logit correction keeps the features: there nothing
    but the class shares moved, so all traffic counts as alike, and nothing is told apart (None).
    """
    if manifest.get("trial", {}).get("config", {}).get("placement") == Placement.LOGIT_CORRECTION:
        return None, np.empty(0, np.str_)
    mixture = split_mixture(visible(reference), np.concatenate([visible(gate), visible(bench.seen_traffic)]))
    segments = bench.parts["train"].segments[: len(bench.seen_traffic.logits_NK)]
    return mixture, np.concatenate([bench.parts["gate"].segments, segments])


def _shift(bench: Workbench, traffic: Sample, reference: Sample) -> float:
    """Distance of mean features between traffic and reference, less its expectation by chance.

    For the base that is the drift. For a candidate the reference has the traffic's look: what is left is what neither
    the look nor the adapter explains.
    """
    seen_NM, known_NM = (fourier_features(bench.baseline, sample.embedding_ND) for sample in (traffic, reference))
    variance = float(known_NM.var(axis=0).sum()) / len(known_NM)
    return float(np.sqrt(squared_gap(seen_NM, known_NM.mean(axis=0), variance)))
