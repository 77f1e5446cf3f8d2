"""Watches a fleet: merges the replicas' windows per scope, raises one alarm, remembers the recent past.

Scopes: all traffic, each replica, each segment: one drifted replica of ten hides in the global mean. They share one
budget of false alarms. A threshold bounds false alarms *per instance tested*, and the replicas (and likewise the
segments) divide the fleet's instances among them, so a share holds for however many there are. Called by the
controller; knows no clock: time comes with the windows.
"""

from __future__ import annotations

import io
import json
import math
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from orchestrator.drift.baseline import NPZ_ERRORS, Array, Baseline
from orchestrator.drift.detector import Detector
from orchestrator.drift.evidence import Evidence, checks_p, difference_p, evidence_of, inputs_p, outputs_p
from orchestrator.drift.statistics import merge, read
from orchestrator.errors import IntegrityError
from orchestrator.messages import Alarm, Window

GLOBAL = "global"
BUDGET_SHARES = {"global": 0.5, "replica": 0.25, "segment": 0.25}  # of the allowed rate of false alarms
MAX_DETECTORS = 2048  # scopes kept at once, about 70 KB each; the longest unheard of goes first
SNAPSHOT_SCOPES = 64  # that a snapshot keeps: about 70 KB each
RING_WINDOWS = 2048  # recent windows kept per digest, about 5 KB each
MAX_RINGS = 6  # digests whose windows are kept
MIN_PART_INSTANCES = 64  # of a replica or segment, and of the others, to be judged
MIN_FORMER_INSTANCES = 256  # before the onset, for a source's former share of the traffic
BLAMED_P = 1.0e-4  # p-value that makes a part the culprit
CLEARED_P = 0.005  # the smallest p-value of the others above this: they are well
RETURN_RATIO = 0.5  # squared distance to the old world below this part of that to normal: it is back


class Monitor:
    """Drift monitor of one service.

    Args:
        arl_instances: mean instances between false alarms at the least, over all scopes, independent traffic.
    """

    def __init__(self, arl_instances: int) -> None:
        if arl_instances < 1:
            raise ValueError(f"arl_instances must be >= 1; got {arl_instances}")
        self.arl_instances = arl_instances
        self.ignored = 0  # windows under a digest without a baseline, or of another layout
        self._watched: str | None = None
        self._alarm: Alarm | None = None
        self._baselines: dict[str, Baseline] = {}
        self._detectors: OrderedDict[tuple[str, str], Detector] = OrderedDict()
        self._rings: OrderedDict[str, deque[tuple[str, Window]]] = OrderedDict()
        self._restored: dict[tuple[str, str], dict[str, Any]] = {}

    # ------------------------------------------------------------ baselines

    def set_baseline(self, baseline: Baseline) -> None:
        """Test traffic under the baseline's digest against it; the same baseline again changes nothing."""
        known = self._baselines.get(baseline.digest)
        if known is baseline:
            return
        if known is not None and not np.array_equal(known.normal_mean_M, baseline.normal_mean_M):
            self._forget(baseline.digest)
        self._baselines[baseline.digest] = baseline

    @property
    def watched(self) -> str | None:
        """The digest whose traffic is tested; None: all."""
        return self._watched

    def has_baseline(self, digest: str) -> bool:
        """Whether windows under this digest can be tested."""
        return digest in self._baselines

    def baseline(self, digest: str) -> Baseline | None:
        """The digest's baseline, or None."""
        return self._baselines.get(digest)

    # ------------------------------------------------------------ windows in, alarm out

    def absorb(self, replica_tag: str, window: Window) -> None:
        """Take a replica's window in; windows that no baseline fits are counted in `ignored` and dropped."""
        baseline = self._baselines.get(window.digest)
        if baseline is None or baseline.base != window.base or len(window.sums) != baseline.layout.size:
            self.ignored += 1
            return
        self._remember(replica_tag, window)
        if self._watched is not None and window.digest != self._watched:
            return
        scopes = [GLOBAL, f"replica:{replica_tag}"] + ([f"segment:{window.segment}"] if window.segment else [])
        found = evidence_of(baseline, window)
        detectors = {scope: self._detector(window.digest, scope) for scope in scopes}
        times = window.first_s, window.last_s
        crossed = [scope for scope, detector in detectors.items() if detector.absorb(found, *times)]
        if crossed and self._alarm is None:
            self._alarm = self._raise_alarm(crossed[0], window)

    def alarm(self) -> Alarm | None:
        """The alarm that stands, or None; it stands until `reset`."""
        return self._alarm

    def attribute(self, alarm: Alarm) -> Alarm:
        """The alarm with the scope that the windows since its onset speak for by now.

        Soon after an onset few parts have traffic enough to be judged, and the alarm says `global`; ask again before
        the diagnosis. An alarm of a restarted monitor, which remembers no windows, stays as it is.
        """
        if alarm.digest not in self._rings:
            return alarm
        return replace(alarm, scope=self._attribute(alarm.digest, alarm.onset_s))

    def growth(self, alarm: Alarm) -> float:
        """How many times its former share of the traffic the alarm's segment sends since the onset.

        nan for other scopes, and while there is too little traffic before the onset to know the former share.
        """
        if not alarm.scope.startswith("segment:"):
            return float("nan")
        counts = {(late, own): 0 for late in (False, True) for own in (False, True)}
        for _, window in self._rings.get(alarm.digest, ()):
            counts[window.first_s >= alarm.onset_s, f"segment:{window.segment}" == alarm.scope] += window.count
        before, now = counts[False, True] + counts[False, False], counts[True, True] + counts[True, False]
        if before < MIN_FORMER_INSTANCES or now == 0:
            return float("nan")
        # One instance more than was seen: a source that was hardly there before has no exact share.
        return (counts[True, True] / now) / ((counts[False, True] + 1.0) / (before + 1.0))

    def reset(self, digest: str) -> None:
        """Clear the alarm, start every test anew, and from now on test only traffic under `digest`.

        Before the first reset traffic under every digest with a baseline is tested. Remembered windows stay.
        """
        self._alarm = None
        self._watched = digest
        self._detectors.clear()
        self._restored.clear()

    def since(self, onset_s: float, digest: str, scope: str = GLOBAL) -> Window | None:
        """Everything remembered under a digest whose windows began at `onset_s` or later, merged; None for nothing.

        Args:
            onset_s: seconds since the epoch.
            digest: adapter digest or `base`.
            scope: `global`, or one replica's or segment's windows only, named as in an alarm.
        """
        kept = [
            window
            for tag, window in self._rings.get(digest, ())
            if window.first_s >= onset_s and scope in (GLOBAL, f"replica:{tag}", f"segment:{window.segment}")
        ]
        return merge(kept) if kept else None

    def threshold(self, scope: str) -> float:
        """Instances of its own between false alarms that a scope's share of the budget asks for."""
        return self.arl_instances / BUDGET_SHARES[scope.partition(":")[0]]

    def statistic(self) -> dict[str, Any]:
        """What the page shows: per scope the statistic, its threshold, and `level`: log-scaled, an alarm at 1."""
        scopes = {}
        for (digest, scope), detector in self._detectors.items():
            value, threshold = detector.statistic, detector.threshold
            scopes[scope if digest == self._watched or self._watched is None else f"{digest[:12]} {scope}"] = {
                "digest": digest,
                "statistic": value,
                "threshold": threshold,
                "level": math.log1p(value) / math.log1p(threshold),
                "instances": detector.instances,
            }
        alarm = asdict(self._alarm) if self._alarm else None
        return {"watched": self._watched, "ignored": self.ignored, "alarm": alarm, "scopes": scopes}

    # ------------------------------------------------------------ across restarts

    def snapshot(self) -> bytes:
        """Alarm and tests, of the SNAPSHOT_SCOPES heard of last; remembered windows are not kept: `since` starts empty.

        An npz without pickle: JSON and single-precision vectors.
        """
        kept = list(self._detectors.items())[-SNAPSHOT_SCOPES:]
        states = [(digest, scope, detector.snapshot()) for (digest, scope), detector in kept]
        meta = {
            "watched": self._watched,
            "ignored": self.ignored,
            "alarm": asdict(self._alarm) if self._alarm else None,
            "detectors": [
                {"digest": digest, "scope": scope} | {k: v for k, v in state.items() if k != "vectors"}
                for digest, scope, state in states
            ],
        }
        arrays = {f"vectors_{i}": state["vectors"] for i, (_, _, state) in enumerate(states)}
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)
        return buffer.getvalue()

    def restore(self, data: bytes) -> None:
        """Continue from a snapshot; each test resumes when its baseline and its first window are there.

        A test of other scales (the service's `arl_instances` was changed) starts anew.

        Raises:
            IntegrityError: the bytes are no snapshot.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as stored:
                meta = json.loads(stored["meta"].tobytes())
                states = [{**state, "vectors": stored[f"vectors_{i}"]} for i, state in enumerate(meta["detectors"])]
            restored = {(state["digest"], state["scope"]): state for state in states}
            alarm = Alarm(**meta["alarm"]) if meta["alarm"] else None
            watched, ignored = meta["watched"], int(meta["ignored"])
        except NPZ_ERRORS as error:
            raise IntegrityError(f"a monitor's snapshot must be an npz of its own making; got {error!r}") from error
        self._detectors.clear()
        self._watched, self.ignored, self._alarm, self._restored = watched, ignored, alarm, restored

    # ------------------------------------------------------------ inside

    def _forget(self, digest: str) -> None:
        for key in [key for key in self._detectors if key[0] == digest]:
            del self._detectors[key]
        self._restored = {key: state for key, state in self._restored.items() if key[0] != digest}
        self._rings.pop(digest, None)

    def _remember(self, replica_tag: str, window: Window) -> None:
        ring = self._rings.setdefault(window.digest, deque(maxlen=RING_WINDOWS))
        self._rings.move_to_end(window.digest)
        ring.append((replica_tag, window))
        while len(self._rings) > MAX_RINGS:
            self._rings.popitem(last=False)

    def _detector(self, digest: str, scope: str) -> Detector:
        key = (digest, scope)
        if key not in self._detectors:
            self._detectors[key] = Detector(
                self._baselines[digest], self.threshold(scope), with_classes=scope == GLOBAL
            )
            if key in self._restored:
                self._detectors[key].restore(self._restored.pop(key))
            while len(self._detectors) > MAX_DETECTORS:
                self._detectors.popitem(last=False)
        self._detectors.move_to_end(key)
        return self._detectors[key]

    def _raise_alarm(self, crossed: str, window: Window) -> Alarm:
        detector = self._detectors[(window.digest, crossed)]
        scope = self._attribute(window.digest, detector.onset_s)
        return Alarm(
            scope=scope,
            digest=window.digest,
            statistic=detector.statistic,
            threshold=detector.threshold,
            onset_s=detector.onset_s,
            raised_s=window.last_s,
            instances=detector.instances,
            returned=self._has_returned(window.digest, detector.onset_s, scope),
        )

    def _attribute(self, digest: str, onset_s: float) -> str:
        """The one replica or segment that strayed while all the others are well, or else `global`.

        Judged on all that each of them saw since the onset.
        """
        recent = [(tag, w) for tag, w in self._rings[digest] if w.first_s >= onset_s]
        keys: tuple[Callable[[str, Window], str], ...] = (
            lambda tag, _: f"replica:{tag}",
            lambda _, w: f"segment:{w.segment}" if w.segment else "",
        )
        baseline = self._baselines[digest]
        for key in keys:
            parts: dict[str, list[Window]] = {}
            for tag, window in recent:
                parts.setdefault(key(tag, window), []).append(window)
            seen = {name: evidence_of(baseline, merge(windows)).vector for name, windows in parts.items()}
            total_V = np.sum(list(seen.values()), axis=0)
            blamed = [name for name, own_V in seen.items() if name and _is_alone(baseline, own_V, total_V - own_V)]
            if len(blamed) == 1:
                return blamed[0]
        return GLOBAL

    def _has_returned(self, digest: str, onset_s: float, scope: str) -> bool:
        """Whether the windows since the onset fit the old world clearly better than the digest's own."""
        baseline, window = self._baselines[digest], self.since(onset_s, digest, scope)
        if window is None or np.array_equal(baseline.normal_mean_M, baseline.reference_mean_M):
            return False
        mean_M = read(baseline.layout, window).feature_mean_M
        to_reference = float(((mean_M - baseline.reference_mean_M) ** 2).sum())
        to_normal = float(((mean_M - baseline.normal_mean_M) ** 2).sum())
        return to_reference < RETURN_RATIO * to_normal


def _is_alone(baseline: Baseline, own_V: Array, rest_V: Array) -> bool:
    """Whether one part strayed from normal and from the others, which are well; of both, the evidence."""
    own, rest = Evidence(own_V, baseline), Evidence(rest_V, baseline)
    if min(own.count, rest.count) < MIN_PART_INSTANCES:
        return False
    if _normal_p(baseline, own) >= BLAMED_P or _normal_p(baseline, rest) <= CLEARED_P:
        return False
    return min(difference_p(baseline, own, rest), checks_p(baseline, own)) < BLAMED_P


def _normal_p(baseline: Baseline, found: Evidence) -> float:
    return min(outputs_p(baseline, found), inputs_p(baseline, found), checks_p(baseline, found))
