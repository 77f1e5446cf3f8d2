"""Frozen messages that cross process boundaries, and the words (enums) everyone shares.

Observations are in the past tense, actions in the imperative. Bottom layer: imports nothing but how to pack them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from orchestrator.packing import pack, unpack

BASE = "base"  # stands where an adapter digest would: the base model, no adapter


class Phase(StrEnum):
    """Where an episode stands; `watching` means that there is none."""

    WATCHING = "watching"
    DIAGNOSING = "diagnosing"
    SEARCHING = "searching"
    GATING = "gating"
    AWAITING_APPROVAL = "awaiting_approval"
    CANARY = "canary"
    ROLLING = "rolling"
    BAKING = "baking"


class Kind(StrEnum):
    """What kind of change an alarm was diagnosed as."""

    NONE = "none"
    OUTAGE = "outage"
    REPLICA_FAULT = "replica_fault"
    SUSPICIOUS_SOURCE = "suspicious_source"
    DATA_QUALITY = "data_quality"
    PRIOR_SHIFT = "prior_shift"
    COVARIATE_BENIGN = "covariate_benign"
    COVARIATE_HARMFUL = "covariate_harmful"
    CONCEPT = "concept"
    UNKNOWN = "unknown"


class Verdict(StrEnum):
    """How an episode ended (or where it waits)."""

    NO_DRIFT = "no_drift"
    HEALED = "healed"
    NO_ACTION = "no_action"
    REFUSED = "refused"
    ABORTED = "aborted"
    AWAITING_APPROVAL = "awaiting_approval"
    ERROR = "error"


class Mode(StrEnum):
    """How much the orchestrator may do by itself."""

    OBSERVE = "observe"
    APPROVE = "approve"
    AUTO = "auto"


class Analysis(StrEnum):
    """Outcome of a gate or canary analysis. Failed = measured and bad; Error = could not measure."""

    SUCCESSFUL = "successful"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"
    ERROR = "error"


class Placement(StrEnum):
    """Where an adapter sits in the model."""

    NORM_STATISTICS = "norm_statistics"  # normalisation statistics only, no training
    NORM = "norm"  # statistics, scale and shift
    EARLY = "early"  # LoRA on the first third of the layers, plus norm
    ALL = "all"  # LoRA everywhere, plus norm
    HEAD = "head"  # the last linear layer
    LOGIT_CORRECTION = "logit_correction"  # a bias on the last linear layer from EM priors, no training


# ---------------------------------------------------------------- replica -> orchestrator


@dataclass(frozen=True)
class Window:
    """Sums over at least one instance seen by one replica under one digest and one segment.

    `sums` is an int64 vector laid out by `orchestrator.drift.statistics.Layout`; windows of equal
    (base, digest) merge by adding their sums and counts.
    """

    base: str
    digest: str
    segment: str
    count: int
    first_s: float  # time of the first instance, seconds since the epoch
    last_s: float
    sums: np.ndarray

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """A window of 32 instances takes a fifth of its vector's bytes in a pickle."""
        sums = np.asarray(self.sums, dtype=np.int64)
        key = (self.base, self.digest, self.segment, self.count, self.first_s, self.last_s)
        return _window, (*key, len(sums), pack(sums))


def _window(base: str, digest: str, segment: str, count: int, first_s: float, last_s: float, *packed: Any) -> Window:
    size, sums = packed
    return Window(base, digest, segment, count, first_s, last_s, unpack(sums, size))


@dataclass(frozen=True)
class LabelArrived:
    """A true label, joined to what was predicted by the signed feedback token."""

    instance_id: str
    digest: str
    prediction: int
    label: int
    predicted_s: float


@dataclass(frozen=True)
class Disagreement:
    """One instance that two versions answer differently, side by side on the same replica."""

    instance_id: str
    digest: str  # what was served
    prediction: int
    against: str  # what it was compared with
    against_prediction: int


@dataclass(frozen=True)
class Report:
    """One heartbeat of one replica.

    `sequence` grows by one per report of one `incarnation` (a process), so that a repeated or late report is
    recognised and a lost one is counted.
    """

    replica_tag: str
    incarnation: str
    sequence: int
    base: str
    generation: int  # the newest generation this replica has fully applied
    digest: str  # the digest it serves by default now
    versions: tuple[str, ...]  # every digest it can serve at once
    windows: tuple[Window, ...] = ()
    labels: tuple[LabelArrived, ...] = ()
    disagreements: tuple[Disagreement, ...] = ()
    compared: int = 0  # instances answered by two versions since the incarnation began
    requests: int = 0  # since the incarnation began
    instances: int = 0
    errors: int = 0
    dropped: int = 0  # traffic samples dropped by the bounded queue
    failure: str = ""  # why the target could not be applied, if it could not
    sent_s: float = 0.0


@dataclass(frozen=True)
class Target:
    """What one replica should serve: the answer to a heartbeat."""

    generation: int
    digest: str
    versions: tuple[str, ...] = (BASE,)  # digests every replica serves on request and keeps warm
    cohort: str = "stable"  # or "canary"
    feedback_key: bytes = b""  # HMAC key of the feedback tokens
    compare: str = ""  # digest that answers a sample of the served requests as well; "" for none
    compare_share: float = 0.0  # of requests, 0..1


# ---------------------------------------------------------------- drift -> plan


@dataclass(frozen=True)
class Alarm:
    """The sequential test crossed its threshold."""

    scope: str  # "global", "replica:<tag>", "segment:<name>"
    digest: str
    statistic: float
    threshold: float
    onset_s: float  # estimated time of the first drifted instance
    raised_s: float
    instances: int  # seen by the test under this digest until the alarm
    returned: bool = False  # under an adapter: the traffic looks like the reference again
    cause: str = "drift"  # what was seen: drift (of inputs or outputs), labels (more errors), failures (of requests)


@dataclass(frozen=True)
class Diagnosis:
    """Which kind of drift, with its evidence as numbers."""

    kind: Kind
    reason: str
    instances: int  # diagnosed on
    estimated_loss: float = 0.0  # accuracy, 0..1, label-free
    evidence: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------- tuning


@dataclass(frozen=True)
class TrialConfig:
    """One point of the search space."""

    placement: Placement
    adapter_rank: int = 0
    learning_rate: float = 0.0
    replay_weight: float = 0.0
    epochs: int = 0
    seed: int = 0


@dataclass(frozen=True)
class TrialResult:
    """What one trial measured. Accuracies and shares are 0..1, nan where not measured."""

    trial_id: str
    config: TrialConfig
    status: str  # finished, stopped, failed
    score: float = float("nan")  # selection score, higher is better, never from eval data
    objective: str = ""  # infomax, restyled, semi_supervised, supervised, recalled, none
    epochs: int = 0
    reference_accuracy: float = float("nan")
    labelled_accuracy: float = float("nan")  # on held-out labelled traffic, when there is any
    seconds: float = 0.0
    parameters: int = 0
    error: str = ""


@dataclass(frozen=True)
class SearchRequest:
    """Everything a search needs; equal requests give equal searches."""

    episode: str
    base: str
    storage: str
    since_s: float  # the buffer holds traffic from here ...
    until_s: float  # ... to here
    max_instances: int
    labels: str  # "none", "all" or a number
    kind: Kind
    seed: int
    budget_s: float
    num_trials: int
    epochs: int
    trial_device: str  # auto, cpu, cuda
    recall: bool = True  # an earlier adapter that fits is the winner, and nothing is trained


@dataclass(frozen=True)
class SearchStatus:
    """Observed state of an episode's search."""

    state: str  # absent, running, finished, failed
    trials: tuple[TrialResult, ...] = ()
    winner: str | None = None  # digest in the registry
    winner_trial: str | None = None
    runner_up: str | None = None  # digest; judged where the gate refuses the winner
    runner_up_trial: str | None = None
    recalled: bool = False  # the winner is an earlier adapter, and nothing was trained
    cold_start_s: float = 0.0
    search_s: float = 0.0
    train_s: float = 0.0
    buffered: int = 0
    message: str = ""


@dataclass(frozen=True)
class Compared:
    """Base and candidate on the same labelled rows of one class or segment. Figures are 0..1."""

    name: str
    instances: int
    base: float  # share of its rows that are right: of a class, the recall
    candidate: float
    wins: int  # candidate right, base wrong
    losses: int
    f1_base: float = float("nan")  # of a class, as if all classes were equally frequent
    f1_candidate: float = float("nan")


@dataclass(frozen=True)
class SegmentEstimate:
    """What is known of one segment without labels; nan where it has too few rows."""

    name: str
    instances: int  # held-out
    estimate_change: float = float("nan")  # of the estimated accuracy, candidate less base
    estimate_error: float = float("nan")  # its standard error over instances
    share: float = float("nan")  # of its traffic that surely still looks like the reference: a lower bound


@dataclass(frozen=True)
class GateEvidence:
    """What was measured about a candidate beside the base, on data that trained neither. Accuracies are 0..1."""

    candidate: str
    instances: int  # held-out traffic instances
    reference_base: float  # accuracy on the gate part of the reference
    reference_candidate: float
    reference_share: float  # share of live traffic that still looks like the reference
    shift_base: float  # residual shift statistic of the traffic under the base
    shift_candidate: float
    marginal_max: float  # share of the most predicted class under the candidate
    marginal_distance: float  # total variation to the reference class shares
    classes_lost: int  # classes predicted for >= 2% under the reference and < 10% of that share now
    estimate_base: float  # label-free accuracy estimate
    estimate_candidate: float
    labelled: int = 0  # held-out labelled traffic instances
    labelled_base: float = float("nan")
    labelled_candidate: float = float("nan")
    labelled_wins: int = 0  # candidate right, base wrong
    labelled_losses: int = 0
    seconds: float = 0.0
    error: str = ""
    metric: str = "accuracy"  # as the spec declares it; its figures are nan in evidence of older releases
    metric_base: float = float("nan")  # score on the gate part of the reference, see `orchestrator.metric`
    metric_candidate: float = float("nan")
    labelled_metric_base: float = float("nan")  # score on the held-out labelled traffic
    labelled_metric_candidate: float = float("nan")
    labelled_p_gain: float = float("nan")  # of a swap test on the declared metric; nan for accuracy: counts are exact
    labelled_p_harm: float = float("nan")
    look_instances: int = 0  # labelled rows of the reference's gate part, shown as the traffic would show them
    look_base: float = float("nan")  # accuracy on them
    look_change: float = float("nan")  # candidate less base
    look_change_error: float = float("nan")  # its standard error
    estimate_bound: float = float("nan")  # lower 95% bound of the candidate's accuracy on the traffic, label-free
    num_classes: int = 0  # compared on the look rows; at most 32 of them are kept in `classes`, worst first
    classes: tuple[Compared, ...] = ()
    num_labelled_classes: int = 0  # the same on labelled traffic
    labelled_classes: tuple[Compared, ...] = ()
    labelled_segments: tuple[Compared, ...] = ()  # worst first; none where all traffic is of one segment
    segments: tuple[SegmentEstimate, ...] = ()
    disagreements: int = 0  # held-out instances that base and candidate answer differently
    decisive: tuple[str, ...] = ()  # ids of some: those whose labels would decide soonest come first


@dataclass(frozen=True)
class GateDecision:
    """The gate's verdict with the inequality in words."""

    analysis: Analysis
    message: str
    provisional: bool
    checks: tuple[tuple[str, float, float, bool], ...] = ()  # name, value, limit, passed


# ---------------------------------------------------------------- people


@dataclass(frozen=True)
class Command:
    """What a person asked for. `command_id` makes a repeated delivery harmless."""

    command_id: str
    name: str  # start, approve, pause, resume, promote, abort, rollback, mode
    actor: str
    reason: str
    argument: str = ""  # rollback: digest or "base"; mode: the mode
