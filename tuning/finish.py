"""From the winner of a search to an adapter in the registry, and from there to the evidence that the gate judges.

Called by both runners. The gate's figures come from rows that neither trained nor chose anything.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from torch import nn

from orchestrator.datasets import Dataset
from orchestrator.drift.baseline import Sample, fit_baseline, save_baseline
from orchestrator.drift.estimate import split_mixture
from orchestrator.drift.statistics import fourier_features, squared_gap
from orchestrator.errors import DataError, HealError
from orchestrator.keys import ServiceKeys
from orchestrator.messages import GateEvidence, Kind, Placement, SearchRequest, TrialResult
from orchestrator.registry import load_adapter, save_adapter
from orchestrator.settings import SCHEMA_VERSION
from orchestrator.storage import Storage
from tuning.adapter import merged_twin
from tuning.base_model import collect_sample
from tuning.objective import statistics_layers
from tuning.records import plain
from tuning.scoring import (
    class_shares,
    corrected_posteriors,
    estimate_accuracy,
    logit_offset,
    total_variation,
)
from tuning.trainable import Exported
from tuning.workbench import Workbench, load_workbench, visible

MIN_GATE_ROWS = 8
SEEN_SHARE, LOST_SHARE = 0.02, 0.10  # a class seen for 2% under the reference is lost below a tenth of its share


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
    config, tensors = exported
    twin = merged_twin(bench.module, config, tensors)
    digest = save_adapter(storage, config, tensors, _manifest(bench, result), keys)
    baseline = fit_baseline(
        bench.request.base,
        digest,
        _sample(bench, twin, bench.reference.inputs, bench.reference.labels),
        _sample(bench, twin, bench.buffer.inputs, bench.buffer.labels),
        bench.baseline,
        num_channels=bench.baseline.num_channels,
    )
    save_baseline(storage, baseline)
    return digest


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
        evidence = _measure(load_workbench(storage, request), storage, digest)
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
    if min(len(gate), len(reference.inputs)) < MIN_GATE_ROWS:
        got = f"{len(gate)} and {len(reference.inputs)}"
        raise DataError(f"the gate needs >= {MIN_GATE_ROWS} rows of traffic and of the reference; got {got}")
    config, tensors, manifest = load_adapter(storage, digest)
    twin = merged_twin(bench.module, config, tensors)
    base_traffic = _sample(bench, bench.module, gate.inputs, None)
    base_reference = _sample(bench, bench.module, reference.inputs, None)
    traffic = _sample(bench, twin, gate.inputs, None)
    mix = _sample(bench, twin, bench.calibration_mix, None)
    reference_logits = _sample(bench, twin, reference.inputs, None).logits_NK
    saved = config.get("modules_to_save") or []
    estimates = _estimates(bench, twin, saved, base_traffic.logits_NK, traffic.logits_NK)
    shares = class_shares(traffic.logits_NK)
    known = bench.baseline.reference_class_shares_K
    return GateEvidence(
        candidate=digest,
        instances=len(gate),
        reference_base=_accuracy(base_reference.logits_NK, reference),
        reference_candidate=_accuracy(reference_logits, reference),
        reference_share=_reference_share(bench, manifest, base_reference, base_traffic),
        shift_base=_shift(bench, base_traffic, base_reference),
        shift_candidate=_shift(bench, traffic, mix),
        marginal_max=float(shares.max()),
        marginal_distance=total_variation(shares, known),
        classes_lost=int(((known >= SEEN_SHARE) & (shares < LOST_SHARE * known)).sum()),
        estimate_base=estimates[0],
        estimate_candidate=estimates[1],
        **_labelled(gate.labels, base_traffic.logits_NK, traffic.logits_NK),
    )


def _accuracy(logits_NK: np.ndarray, dataset: Dataset) -> float:
    return float((logits_NK.argmax(axis=1) == dataset.labels).mean())


def _estimates(
    bench: Workbench, twin: nn.Module, saved: list[str], base_NK: np.ndarray, candidate_NK: np.ndarray
) -> tuple[float, float]:
    """Label-free accuracy estimates of base and candidate: calibrated confidence, or corrected posteriors."""
    if bench.request.kind is Kind.PRIOR_SHIFT:
        temperature, old_K = bench.baseline.temperature, bench.baseline.confusion_KK.sum(axis=0)
        _, new_K = logit_offset(base_NK, temperature, old_K)
        posteriors = corrected_posteriors(base_NK, temperature, old_K, new_K)
        rows = np.arange(len(posteriors))
        base, candidate = (posteriors[rows, x.argmax(axis=1)].mean() for x in (base_NK, candidate_NK))
        return float(base), float(candidate)
    base_t = bench.temperature(bench.module, [])
    candidate_t = bench.temperature(twin, statistics_layers(twin, saved))
    return estimate_accuracy(base_NK, base_t), estimate_accuracy(candidate_NK, candidate_t)


def _reference_share(bench: Workbench, manifest: dict[str, Any], reference: Sample, gate: Sample) -> float:
    """Share of traffic like the reference, in the base's eyes; the other parts of the buffer join the gate's rows.

    A logit correction keeps the features: there nothing but the class shares moved, so all traffic counts as alike.
    """
    if manifest.get("trial", {}).get("config", {}).get("placement") == Placement.LOGIT_CORRECTION:
        return 1.0
    others = np.concatenate([bench.parts["choose"].inputs, bench.parts["train"].inputs])[: 3 * len(gate.logits_NK)]
    traffic = _sample(bench, bench.module, others, None)
    return split_mixture(visible(reference), np.concatenate([visible(gate), visible(traffic)])).share


def _shift(bench: Workbench, traffic: Sample, reference: Sample) -> float:
    """Distance of mean features between traffic and reference, less its expectation by chance.

    For the base that is the drift. For a candidate the reference has the traffic's look: what is left is what neither
    the look nor the adapter explains.
    """
    seen_NM, known_NM = (fourier_features(bench.baseline, sample.embedding_ND) for sample in (traffic, reference))
    variance = float(known_NM.var(axis=0).sum()) / len(known_NM)
    return float(np.sqrt(squared_gap(seen_NM, known_NM.mean(axis=0), variance)))


def _labelled(labels_N: np.ndarray, base_NK: np.ndarray, candidate_NK: np.ndarray) -> dict[str, Any]:
    known_N = labels_N >= 0
    if not known_N.any():
        return {}
    base_N = (base_NK.argmax(axis=1) == labels_N)[known_N]
    candidate_N = (candidate_NK.argmax(axis=1) == labels_N)[known_N]
    return {
        "labelled": int(known_N.sum()),
        "labelled_base": float(base_N.mean()),
        "labelled_candidate": float(candidate_N.mean()),
        "labelled_wins": int((candidate_N & ~base_N).sum()),
        "labelled_losses": int((base_N & ~candidate_N).sum()),
    }
