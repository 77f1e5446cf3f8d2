"""Every setting of the healing loop, with unit, meaning and source. Bottom layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from orchestrator.errors import SpecError
from orchestrator.messages import Mode

SCHEMA_VERSION = 1  # of the journal, manifests and reports
NAMESPACE = "rayheal"  # Ray namespace of all named actors
WINDOW_INSTANCES = 32  # a statistics window closes at this many instances ...
WINDOW_S = 1.0  # ... or at this age
MAX_SEGMENTS = 32  # further segments count as "other"
FEATURE_SCALE = 1 << 15  # quantisation of statistics to integers
PCA_DIMENSIONS = 64
FOURIER_FEATURES = 512

# Import paths resolved by name where a lower layer needs what a higher one wires (see docs/decisions/0002).
ORCHESTRATOR_FACTORY = "orchestrator.launch:ensure_orchestrator"
APP_FACTORY = "orchestrator.launch:app"


@dataclass(frozen=True)
class HealSettings:
    """Settings of one service's healing loop."""

    mode: Mode = Mode.APPROVE  # how much happens without a person
    without_labels: str = "provisional"  # "hold": never promote without labels; "provisional": contract 3.6
    arl_instances: int = 1_000_000  # mean instances between false alarms, independent traffic
    max_clean_loss: float = 0.03  # accuracy on the reference, weighted by the share of traffic like it
    max_unweighted_clean_loss: float | None = None  # second cap on the unweighted loss; None: no cap
    harm_threshold: float = 0.01  # estimated accuracy loss below which a drift is benign
    diagnosis_instances: int = 256  # diagnose on this many instances after the onset
    buffer_instances: int = 2000  # search on at most this many
    min_buffer_instances: int = 256  # and on no fewer
    buffer_wait_s: float = 30.0  # wait this long for the buffer to fill
    search_budget_s: float = 300.0  # trials stop after this
    num_trials: int = 6
    trial_epochs: int = 4
    trial_device: str = "auto"  # auto: spare GPUs, CPU where the cluster has none; cpu; cuda
    gate_timeout_s: float = 300.0
    canary_instances: int = 64  # served by the canary before the rest follows
    canary_max_s: float = 60.0  # a canary without traffic is inconclusive after this
    roll_timeout_s: float = 60.0  # every live replica must ack within this
    bake_s: float = 5.0  # watch after the last ack
    cooldown_s: float = 600.0  # after a verdict that changed nothing, no new episode for this long
    approval_timeout_s: float = 7 * 86400.0
    replica_lost_s: float = 10.0  # a replica silent for this long is gone
    heartbeat_s: float = 0.5
    labels: str = "all"  # labels a search may use: none, a number, all
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges; the message names setting, rule and value."""
        for name in ("arl_instances", "diagnosis_instances", "min_buffer_instances", "num_trials", "trial_epochs"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} must be >= 1; got {getattr(self, name)}")
        for name in ("max_clean_loss", "harm_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise SpecError(f"{name} must be in [0, 1]; got {getattr(self, name)}")
        if self.without_labels not in ("hold", "provisional"):
            raise SpecError(f"without_labels must be hold or provisional; got {self.without_labels!r}")
        if self.trial_device not in ("auto", "cpu", "cuda"):
            raise SpecError(f"trial_device must be auto, cpu or cuda; got {self.trial_device!r}")
        if self.labels not in ("none", "all") and not self.labels.isdigit():
            raise SpecError(f"labels must be none, all or a number; got {self.labels!r}")
        object.__setattr__(self, "mode", Mode(self.mode))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HealSettings:
        """Settings from a mapping; an unknown name is an error that lists the known ones."""
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise SpecError(f"unknown setting {name!r}; known settings: {', '.join(sorted(known))}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the journal."""
        return asdict(self)


@dataclass(frozen=True)
class ServiceConfig:
    """What names one service: its records, its base model, its settings."""

    service: str  # name; the orchestrator actor is `heal-<service>`
    storage: str  # URI
    base: str  # digest of the published base model
    settings: HealSettings = HealSettings()
