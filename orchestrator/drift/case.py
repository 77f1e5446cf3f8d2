"""What the rules of a diagnosis look at, and what one of them concludes. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.drift.baseline import Baseline
from orchestrator.drift.estimate import priors_from_shares
from orchestrator.drift.evidence import Evidence, inputs_p, outputs_p
from orchestrator.drift.statistics import SKETCH, Summary
from orchestrator.messages import Alarm, Kind
from orchestrator.settings import HealSettings

Array = NDArray[Any]

SHAPE_TOLERANCE = 1.0e-3  # part of the variance over instances by which mean colours and layouts differ anyway
BRIGHTNESS = slice(SKETCH.index("brightness_0"), SKETCH.index("flat_0"))
FLAT = slice(SKETCH.index("flat_0"), len(SKETCH))


@dataclass(frozen=True)
class Finding:
    """A rule's conclusion."""

    kind: Kind
    reason: str
    evidence: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """An alarm with the traffic since its onset.

    `growth` is how many times its former share of the traffic the alarm's source has now; nan where unknown.
    `labels_say_harm`: true labels show more errors than the reference's.
    """

    baseline: Baseline
    summary: Summary
    evidence: Evidence
    alarm: Alarm
    fleet_size: int
    settings: HealSettings
    growth: float = float("nan")
    labels_say_harm: bool = False

    @cached_property
    def shift_p(self) -> float:
        """P-value of outputs and inputs against what is normal for the predicted classes."""
        return min(outputs_p(self.baseline, self.evidence), inputs_p(self.baseline, self.evidence))

    @cached_property
    def inflation(self) -> float:
        """Variance of a mean over the window against that of independent traffic and an exact reference."""
        num = self.summary.count
        return 1.0 + num * (1.0 / self.baseline.normal_count + SHAPE_TOLERANCE)

    @cached_property
    def mixed_X(self) -> Array:
        """What `inputs_X` would be if only the class shares had changed: other classes have other colours."""
        now_K = priors_from_shares(self.baseline.confusion_KK, self.summary.class_shares_K)
        return np.asarray(now_K @ self.baseline.class_inputs_KX)

    @cached_property
    def mixed_grid_G(self) -> Array:
        """The mean layout that goes with `mixed_X`, input units."""
        mixed_S = self.mixed_X[2 * self.baseline.num_channels :]
        return np.asarray(self.baseline.sketch_mean_S + self.baseline.sketch_scale_S * mixed_S)[BRIGHTNESS]

    @cached_property
    def inputs_X(self) -> Array:
        """Standardised means of channel means, squares and sketch, as in `Baseline.normal_inputs_2X`."""
        summary = self.summary
        return np.concatenate([summary.channel_means_C, summary.channel_squares_C, summary.sketch_S])

    @cached_property
    def channels(self) -> tuple[Array, Array, Array, Array]:
        """Channel means and standard deviations over positions and instances, input units: window's, then normal's."""
        mu_C, scale_C = self.baseline.channel_mean_C, self.baseline.channel_scale_C

        def moments(z_C: Array, v_C: Array) -> tuple[Array, Array]:
            return mu_C + scale_C * z_C, scale_C * np.sqrt(np.maximum(v_C - z_C**2, 0.0))

        normal = moments(self.baseline.normal_channels_3C[0], self.baseline.normal_channels_3C[1])
        return *moments(self.summary.channel_means_C, self.summary.channel_squares_C), *normal

    @property
    def has_sketch(self) -> bool:
        """Whether the inputs are images."""
        return len(self.baseline.sketch_mean_S) > 0

    @cached_property
    def sketch(self) -> tuple[Array, Array, Array]:
        """Sketch in input units: the window's mean, normal's mean, normal's standard deviation over instances."""
        baseline = self.baseline
        skip = 2 * baseline.num_channels
        mean_S, scale_S = baseline.sketch_mean_S, baseline.sketch_scale_S
        normal_2S = baseline.normal_inputs_2X[:, skip:]
        return mean_S + scale_S * self.summary.sketch_S, mean_S + scale_S * normal_2S[0], scale_S * normal_2S[1]

    def sketched(self, name: str) -> tuple[float, float]:
        """One value of the sketch: now and in normal traffic, input units."""
        at = SKETCH.index(name)
        return float(self.sketch[0][at]), float(self.sketch[1][at])
