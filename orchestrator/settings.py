"""Every setting of the healing loop, with unit, meaning and source. Bottom layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from orchestrator.errors import SpecError
from orchestrator.messages import Mode

SCHEMA_VERSION = 1  # of the journal, manifests and reports
NAMESPACE = "rayheal"  # Ray namespace of all named actors
WINDOW_INSTANCES = 32  # a statistics window closes at this many instances ...
WINDOW_S = 1.0  # ... or at this age
MAX_SEGMENTS = 32  # further segments count as "other"
FEATURE_SCALE = 1 << 13  # quantisation of an instance's statistics to integers
# The same of its Fourier features. They are cosines of a variance of about 1/2, to which rounding to 1/128 adds 5e-6;
# every further bit lengthens a report by 64 bytes. Not for confidence and entropy, which may all lie next to a bound.
FOURIER_SCALE = 1 << 7
PCA_DIMENSIONS = 64
FOURIER_FEATURES = 512

# Import paths resolved by name where a lower layer needs what a higher one wires (see docs/decisions/0002).
ORCHESTRATOR_FACTORY = "orchestrator.actor:ensure_orchestrator"
APP_FACTORY = "orchestrator.launch:app"


def _setting(default: Any, doc: str) -> Any:
    """A dataclass field that carries its own documentation (unit, meaning)."""
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class HealSettings:
    """Settings of one service's healing loop."""

    mode: Mode = _setting(Mode.APPROVE, "how much happens without a person: observe, approve, auto")
    without_labels: str = _setting(
        "provisional",
        "hold: never promote without labels; provisional: on label-free evidence, until labels confirm or revert it",
    )
    arl_instances: int = _setting(1_000_000, "mean instances between false alarms on independent traffic")
    max_clean_loss: float = _setting(
        0.03, "accuracy (0..1) lost on the reference, weighted by the share of live traffic that still looks like it"
    )
    max_unweighted_clean_loss: float | None = _setting(None, "cap on the same loss unweighted; None: no cap")
    harm_threshold: float = _setting(0.01, "estimated accuracy loss (0..1) below which a drift is benign")
    diagnosis_instances: int = _setting(256, "instances since the onset that a diagnosis needs")
    buffer_instances: int = _setting(2000, "a search uses at most this many instances")
    min_buffer_instances: int = _setting(256, "and no fewer than this")
    buffer_wait_s: float = _setting(30.0, "seconds to wait for the buffer to fill before searching on what there is")
    search_budget_s: float = _setting(300.0, "seconds after which no further epoch is trained")
    num_trials: int = _setting(6, "trials of a search, the ones without training included")
    trial_epochs: int = _setting(4, "epochs of a trial at most")
    trial_device: str = _setting("auto", "auto: spare GPUs, CPU where the cluster has none; cpu; cuda")
    gate_timeout_s: float = _setting(300.0, "seconds a gate measurement may take")
    canary_instances: int = _setting(64, "instances the canary must serve before the rest follows")
    canary_max_s: float = _setting(60.0, "seconds after which a canary without enough traffic is inconclusive")
    roll_timeout_s: float = _setting(60.0, "seconds in which every live replica must ack")
    bake_s: float = _setting(5.0, "seconds to watch after the last ack")
    cooldown_s: float = _setting(600.0, "seconds without a new episode after a verdict that changed nothing")
    approval_timeout_s: float = _setting(7 * 86400.0, "seconds an episode waits for a person")
    replica_lost_s: float = _setting(10.0, "seconds of silence after which a replica counts as gone")
    snapshot_s: float = _setting(60.0, "seconds between two snapshots of the drift monitor")
    heartbeat_s: float = _setting(0.5, "seconds between the reports of a replica")
    labels: str = _setting("all", "labels a search may use: none, a number, all")
    seed: int = _setting(0, "seed of every random choice")

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
    deployed_s: float = 0.0  # when the application was built; the newest deployment's configuration wins
