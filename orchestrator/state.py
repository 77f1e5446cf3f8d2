"""What the healing loop remembers, what it observes and what it may ask for: plain frozen values.

Shared by `healing`, `rollout`, `gate` and the controller. `State` and `Episode` are all that survives a restart of the
orchestrator, so they turn into JSON and back without loss. Knows no Ray, no torch, no clock and no disk.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from orchestrator.canary import PairedTest
from orchestrator.messages import (
    BASE,
    Alarm,
    Command,
    Diagnosis,
    GateDecision,
    GateEvidence,
    Mode,
    Phase,
    SearchRequest,
    SearchStatus,
    TrialResult,
    Verdict,
)
from orchestrator.settings import SCHEMA_VERSION

ALL_REPLICAS = ("*",)  # a cohort of every replica, also those that are yet to come
NO_SEARCH = SearchStatus(state="absent")


@dataclass(frozen=True)
class Canary:
    """One replica that serves a candidate ahead of the others.

    `instances` as they stood when the step's last canary acked, `errors` as they stood at its own ack.
    """

    tag: str
    incarnation: str
    acked_s: float | None = None
    instances: int = 0
    errors: int = 0


@dataclass(frozen=True)
class Episode:
    """One alarm (or one `start` by hand) and all that follows from it.

    `phase_entered` says when each phase was first entered; `phase_s` when the present one began, moved on by pauses,
    which is what timeouts count from. Times are seconds since the epoch.
    """

    id: str
    opened_s: float
    alarm: Alarm | None = None
    manual: bool = False
    diagnosis: Diagnosis | None = None
    phase_entered: dict[str, float] = field(default_factory=dict)
    phase_s: float = 0.0
    since_s: float = 0.0  # the search's buffer holds traffic from here ...
    until_s: float = 0.0  # ... to here
    seed: int = 0
    attempt: int = 1  # of the search
    recall: bool = True  # whether an earlier adapter may be its outcome
    search: SearchStatus | None = None  # as it stood when it ended
    evidence: GateEvidence | None = None
    gate: GateDecision | None = None
    winner: str | None = None
    passed_over: str = ""  # why the gate refused the search's first choice, where a second was judged
    winner_trial: TrialResult | None = None
    canaries: tuple[Canary, ...] = ()
    canary_step: int = 0  # of `HealSettings.canary_steps`, from 0
    step_s: float = 0.0  # when the step's last canary acked; 0 before
    verdict: Verdict | None = None
    reason: str = ""
    provisional: bool = False
    closed_s: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return cast(dict[str, Any], to_plain(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Episode:
        """The inverse of `to_dict`."""
        return cast(Episode, from_plain(cls, values))


@dataclass(frozen=True)
class State:
    """Everything that the loop must not forget.

    `generation` names the decision that `stable` be served. While a candidate is being rolled out, its cohort is told
    `candidate_generation` > `generation`. Both only ever grow, and no number is used for two digests.
    """

    base: str  # digest of the base model
    mode: Mode = Mode.APPROVE
    schema_version: int = SCHEMA_VERSION
    paused: bool = False
    paused_s: float = 0.0  # since when
    generation: int = 0
    stable: str = BASE
    phase: Phase = Phase.WATCHING
    episode: Episode | None = None
    candidate: str | None = None
    candidate_generation: int = 0
    cohort: tuple[str, ...] = ()  # replica tags told to serve the candidate, or ALL_REPLICAS
    previous: str | None = None  # stable before the last promotion or rollback
    test: PairedTest | None = None  # of the candidate, or of what was promoted until labels decide
    tests_begun: int = 0
    tests_won: int = 0
    deployed_s: float = 0.0  # of the newest deployment whose mode was taken over
    promoted: tuple[str, ...] = ()  # digests that passed the gate and were rolled out: what a rollback may name
    cooldown_until_s: float = 0.0
    monitor_reset_s: float = 0.0  # alarms raised before this are answered already
    seen_commands: tuple[str, ...] = ()  # ids of the last 256 handled
    episodes_opened: int = 0
    last_verdict: dict[str, Any] | None = None  # episode, verdict, kind, reason, provisional, closed_s, digest

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: NaN and infinities as strings."""
        return cast(dict[str, Any], to_plain(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> State:
        """The inverse of `to_dict`; keys that are missing take their defaults.

        Raises:
            ValueError: written by a newer schema than this one.
        """
        if values["schema_version"] > SCHEMA_VERSION:
            raise ValueError(
                f"state schema_version must be <= {SCHEMA_VERSION}; got {values['schema_version']}: "
                "upgrade the orchestrator before it reads this storage"
            )
        return cast(State, from_plain(cls, values))


# ---------------------------------------------------------------- observed


@dataclass(frozen=True)
class ReplicaView:
    """What one replica last said of itself. Counters are since its incarnation began."""

    tag: str
    incarnation: str
    generation: int
    digest: str
    last_seen_s: float
    instances: int = 0
    errors: int = 0
    failure: str = ""  # why it could not apply its target
    base: str = ""


@dataclass(frozen=True)
class Decided:
    """A label that arrived for an instance two versions disagree on."""

    instance_id: str
    digest: str
    right: bool
    against: str
    against_right: bool


@dataclass(frozen=True)
class Observation:
    """The world as one pass sees it. Partial, late and repeated pieces are fine."""

    now_s: float
    replicas: tuple[ReplicaView, ...] = ()
    alarm: Alarm | None = None  # whatever digest it is of: `healing` has the monitor forget what is answered
    diagnosis: Diagnosis | None = None  # of the open episode
    buffered: int = 0  # instances since the onset that a search can use
    traffic_ended: bool = False  # rehearsal: no more will come
    search: SearchStatus = NO_SEARCH  # of `healing.search_id(state)`
    gate: GateEvidence | None = None
    monitor_ready: bool = True  # there is a drift baseline of the stable digest
    decided: tuple[Decided, ...] = ()  # each is observed in one pass only: the state counts it
    commands: tuple[Command, ...] = ()  # kept here until their ids are in `State.seen_commands`
    canary_anomaly: str = ""  # a guard metric out of bounds under the candidate, in words
    stable_published: tuple[int, str] | None = None  # what `stable.json` was last seen to hold
    storage: str = ""  # URI, for search requests
    observing_since_s: float = 0.0  # when this orchestrator began to listen: silence before that means nothing


# ---------------------------------------------------------------- asked for


@dataclass(frozen=True)
class LaunchSearch:
    """Start this search unless it runs or has ended."""

    request: SearchRequest


@dataclass(frozen=True)
class CancelSearch:
    """End that search."""

    episode: str  # search id


@dataclass(frozen=True)
class MeasureCandidate:
    """Measure a candidate beside the base for the gate."""

    request: SearchRequest
    digest: str


@dataclass(frozen=True)
class PublishStable:
    """Write what replicas start from while the orchestrator is away."""

    generation: int
    digest: str


@dataclass(frozen=True)
class ResetMonitor:
    """Forget the alarm and start the sequential test of this digest afresh."""

    digest: str


@dataclass(frozen=True)
class Record:
    """Write one journal entry; the controller does so before it acts."""

    event: str
    body: dict[str, Any]


Action = LaunchSearch | CancelSearch | MeasureCandidate | PublishStable | ResetMonitor | Record


# ---------------------------------------------------------------- JSON


def to_plain(value: Any) -> Any:
    """Dataclasses, enums, tuples and numpy scalars as JSON values; NaN and infinities as strings."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(to_plain(k)): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays inside a diagnosis' evidence
        return to_plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def from_plain(kind: Any, value: Any) -> Any:
    """The inverse of `to_plain` for a value of a known type."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else from_plain(next(a for a in get_args(kind) if a is not type(None)), value)
    if origin is tuple:
        return _tuple_from(get_args(kind), value)
    if origin is dict:
        return {k: from_plain(get_args(kind)[1], v) for k, v in value.items()}
    if isinstance(kind, type) and is_dataclass(kind):
        hints = _hints(kind)
        return kind(**{k: from_plain(hints[k], v) for k, v in value.items() if k in hints})
    if kind is float or (isinstance(kind, type) and issubclass(kind, Enum)):
        return cast(Callable[[Any], Any], kind)(value)
    return value


def _tuple_from(kinds: tuple[Any, ...], value: list[Any]) -> tuple[Any, ...]:
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(from_plain(kinds[0], v) for v in value)
    return tuple(from_plain(k, v) for k, v in zip(kinds, value, strict=True))


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
