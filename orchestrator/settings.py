"""Every setting of the healing loop, with unit, meaning and source. Bottom layer."""

from __future__ import annotations

import math
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


def _typed(name: str, kind: Any, value: Any) -> Any:
    """A setting's value in its own type, which `kind` spells out; SpecError where it is of another."""
    words = str(kind)
    if value is None and "None" in words:
        return None
    if words == "Mode":
        if value not in list(Mode):
            raise SpecError(f"{name} must be one of {', '.join(Mode)}; got {value!r}")
        return Mode(value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if words == "str" and (isinstance(value, str) or (number and value == int(value))):
        return str(value)  # `labels=100` is a number to YAML
    if words == "int" and number and math.isfinite(value) and value == int(value):
        return int(value)
    if words.startswith("float") and number and math.isfinite(value):
        return float(value)
    expected = {"str": "a text", "int": "a whole number"}.get(words, "a finite number")
    raise SpecError(f"{name} must be {expected}; got {value!r}")


def parse_steps(text: str) -> tuple[int | float, ...]:
    """Canary steps: whole numbers of replicas, or shares 0..1 of the live ones where the text has a per cent sign.

    Raises:
        SpecError: a step is neither; the message names it.
    """
    steps: list[int | float] = []
    for word in (part.strip() for part in text.split(",")):
        number, share = word.removesuffix("%").strip(), word.endswith("%")
        if not (number.isascii() and number.isdecimal()) or int(number) < 1 or (share and int(number) > 100):
            raise SpecError(f"canary_steps must be numbers >= 1 or shares like 25%, with commas between; got {text!r}")
        steps.append(int(number) / 100.0 if share else int(number))
    return tuple(steps)


_POSITIVE = ("arl_instances", "diagnosis_instances", "buffer_instances", "min_buffer_instances", "num_trials")
_SECONDS = ("buffer_wait_s", "search_budget_s", "gate_timeout_s", "canary_step_s", "canary_max_s", "roll_timeout_s")
_PATIENCE = ("bake_s", "cooldown_s", "approval_timeout_s", "replica_lost_s", "snapshot_s")
_RANGES: dict[str, tuple[float, float]] = {  # of numbers, both ends included
    **dict.fromkeys((*_POSITIVE, "trial_epochs"), (1, math.inf)),
    **dict.fromkeys((*_SECONDS, *_PATIENCE), (0, math.inf)),
    **dict.fromkeys(("max_clean_loss", "max_unweighted_clean_loss", "harm_threshold"), (0, 1)),
    **dict.fromkeys(("compare_share", "confirm_share"), (0, 1)),
    **dict.fromkeys(("canary_instances", "seed"), (0, math.inf)),
}


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
        0.03,
        "score (accuracy, or the spec's metric; at most 1) lost on the reference, weighted by the share of live "
        "traffic that still looks like it; in all traffic and in each segment",
    )
    max_unweighted_clean_loss: float | None = _setting(None, "cap on the same loss unweighted; None: no cap")
    harm_threshold: float = _setting(0.01, "estimated accuracy loss (0..1) below which a drift is benign")
    diagnosis_instances: int = _setting(256, "instances since the onset that a diagnosis needs")
    buffer_instances: int = _setting(2000, "a search uses at most this many instances")
    min_buffer_instances: int = _setting(256, "and no fewer than this")
    buffer_wait_s: float = _setting(30.0, "seconds to wait for the buffer to fill before searching on what there is")
    search_budget_s: float = _setting(300.0, "seconds after which no further epoch is trained")
    num_trials: int = _setting(6, "trials of a search, the ones without training included")
    trial_epochs: int = _setting(8, "epochs of a trial at most")
    trial_device: str = _setting("auto", "auto: spare GPUs, CPU where the cluster has none; cpu; cuda")
    gate_timeout_s: float = _setting(300.0, "seconds a gate measurement may take")
    canary_steps: str = _setting(
        "1, 25%", "replicas that serve a candidate before all do, step by step: numbers or shares of the live ones"
    )
    canary_instances: int = _setting(64, "instances the canaries must serve in each step")
    canary_step_s: float = _setting(0.0, "seconds that each step takes at least")
    canary_max_s: float = _setting(60.0, "seconds after which a step without enough traffic is inconclusive")
    canary_alpha: float = _setting(
        0.01,
        "chance that labels call a first candidate better which is not; later ones share a budget: see docs/canary.md",
    )
    compare_share: float = _setting(
        0.25, "share of a canary's requests that the stable version answers too, to find where labels would tell"
    )
    confirm_share: float = _setting(
        0.02, "the same share after a promotion, on every replica, until labels confirmed or reverted it"
    )
    roll_timeout_s: float = _setting(60.0, "seconds in which every live replica must ack")
    bake_s: float = _setting(5.0, "seconds to watch after the last ack")
    cooldown_s: float = _setting(600.0, "seconds without a new episode after a verdict that changed nothing")
    approval_timeout_s: float = _setting(7 * 86400.0, "seconds an episode waits for a person")
    replica_lost_s: float = _setting(10.0, "seconds of silence after which a replica counts as gone")
    snapshot_s: float = _setting(60.0, "seconds between two snapshots of the drift monitor")
    notify: str = _setting(
        "",
        "URLs, with commas between, that hear of refusals, approvals asked for, heals and reverts: see docs/notify.md",
    )
    heartbeat_s: float = _setting(0.5, "seconds between the reports of a replica")
    labels: str = _setting("all", "labels a search may use: none, a number, all")
    seed: int = _setting(0, "seed of every random choice")

    def __post_init__(self) -> None:
        """Check types and ranges; the message names setting, rule and value."""
        for item in fields(self):
            object.__setattr__(self, item.name, _typed(item.name, item.type, getattr(self, item.name)))
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                rule = f"in [{low:g}, {high:g}]" if high < math.inf else f">= {low:g}"
                raise SpecError(f"{name} must be {rule}; got {value}")
        if self.heartbeat_s <= 0:
            raise SpecError(f"heartbeat_s must be > 0; got {self.heartbeat_s}")
        for name, allowed in (("without_labels", ("hold", "provisional")), ("trial_device", ("auto", "cpu", "cuda"))):
            if getattr(self, name) not in allowed:
                raise SpecError(f"{name} must be {' or '.join(allowed)}; got {getattr(self, name)!r}")
        if self.labels not in ("none", "all") and not self.labels.isdecimal():
            raise SpecError(f"labels must be none, all or a number; got {self.labels!r}")
        if not 0 < self.canary_alpha < 1:
            raise SpecError(f"canary_alpha must be in (0, 1); got {self.canary_alpha}")
        parse_steps(self.canary_steps)
        if self.min_buffer_instances > self.buffer_instances:
            raise SpecError(
                f"min_buffer_instances must be <= buffer_instances ({self.buffer_instances}); "
                f"got {self.min_buffer_instances}"
            )

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
