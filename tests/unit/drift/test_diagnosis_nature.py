"""What no change of the world does to images comes out as unknown; what light, grain and veils do does not."""

from functools import cache

import numpy as np
import pytest
from mixture import window

from orchestrator.drift.baseline import Sample, fit_baseline
from orchestrator.drift.case import Case
from orchestrator.drift.diagnosis import diagnose
from orchestrator.drift.evidence import evidence_of
from orchestrator.drift.nature import find_unnatural, picture_of
from orchestrator.drift.statistics import read
from orchestrator.messages import Alarm, Kind
from orchestrator.settings import HealSettings

SIDE, NUM_CLASSES = 16, 3
ALARM = Alarm("global", "base", 1e6, 6e4, 0.0, 100.0, 256)
HIGH_X = np.linspace(-1.0, 1.0, SIDE)


@cache
def images(num, seed):
    """A bright sky over a dark ground, with smooth blots in it, under a light of its own: float (N, H, W, 3)."""
    rng = np.random.default_rng(seed)
    layout_HW = 25.0 * np.cos(1.5 * HIGH_X)[None, :] - 30.0 * HIGH_X[:, None]
    coarse = rng.normal(0.0, 30.0, (num, 4, 4)).repeat(SIDE // 4, axis=1).repeat(SIDE // 4, axis=2)
    blots = (np.roll(coarse, 1, axis=1) + np.roll(coarse, 1, axis=2) + coarse) / 3.0
    light = rng.normal(0.0, 15.0, (num, 1, 1, 1))
    x = (110.0 + layout_HW + blots)[..., None] + light + np.array([8.0, 0.0, -8.0])
    return np.rint((x + rng.normal(0.0, 3.0, x.shape)).clip(0, 255))


def sample(x):
    import torch

    from tuning.sketch import image_sketch

    num = len(x)
    rng = np.random.default_rng(num)
    low, high = x.min(axis=(1, 2, 3)), x.max(axis=(1, 2, 3))
    tensors = (torch.from_numpy(np.ascontiguousarray(v)) for v in (x, low, high))
    pixels, *extremes = tensors
    return Sample(
        embedding_ND=rng.standard_normal((num, 4)),
        logits_NK=rng.standard_normal((num, NUM_CLASSES)),
        channel_means_NC=x.mean(axis=(1, 2)),
        channel_squares_NC=(x**2).mean(axis=(1, 2)),
        input_min_N=low,
        input_max_N=high,
        labels_N=rng.integers(0, NUM_CLASSES, num),
        sketch_NS=image_sketch(pixels, "HWC", *extremes).numpy(),
    )


@cache
def baseline():
    return fit_baseline("b" * 8, "base", sample(images(800, 0)), None, None, 3)


def case_of(x):
    w = window(baseline(), sample(x))
    summary, evidence = read(baseline().layout, w), evidence_of(baseline(), w)
    return Case(baseline(), summary, evidence, ALARM, 2, HealSettings())


def blocks(x):
    """The sixteen cells in another order."""
    cells = x.reshape(len(x), 4, 4, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(len(x), 16, 4, 4, 3)
    moved = cells[:, np.random.default_rng(5).permutation(16)].reshape(len(x), 4, 4, 4, 4, 3)
    return moved.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape)


def against_the_light(x):
    """The last channel is dark where the image is bright."""
    own = x[..., 2].mean(axis=(1, 2))
    turned = x[..., 2] - 2.0 * (own - own.mean())[:, None, None]
    return np.concatenate([x[..., :2], turned[..., None]], axis=3).clip(0, 255)


FAULTS = {
    "layout": lambda x: np.roll(x, SIDE // 2, axis=1),
    "layout of blocks": blocks,
    "kept_layout": lambda x: (4.0 * x) % 256.0,
    "spread": lambda x: 255.0 * (x > 110.0),
    "parted_channels": against_the_light,
}
WORLD = {
    "nothing": lambda x: x,
    "darker": lambda x: 0.4 * x,
    "veil": lambda x: 0.4 * x + 130.0,
    "tint": lambda x: (x * np.array([1.2, 1.0, 0.7])).clip(0, 255),
    "grain": lambda x: (x + np.random.default_rng(7).normal(0.0, 40.0, x.shape)).clip(0, 255),
    "blur": lambda x: np.mean([np.roll(x, k, axis=2) for k in (-1, 0, 1)], axis=0),
    "more contrast": lambda x: (1.4 * (x - 110.0) + 110.0).clip(0, 255),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_no_rule_names_breaks_an_invariant_and_is_unknown(name):
    found = find_unnatural(case_of(FAULTS[name](images(600, 1))))
    assert found is not None
    assert found.kind is Kind.UNKNOWN
    assert found.evidence["check"] == name.split()[0]
    assert "<" in found.reason or ">" in found.reason


@pytest.mark.parametrize("name", WORLD)
def test_what_the_world_does_breaks_no_invariant(name):
    assert find_unnatural(case_of(WORLD[name](images(600, 1)))) is None


def test_grain_raises_the_contrast_and_leaves_the_signal():
    seen = picture_of(case_of(WORLD["grain"](images(600, 1))))
    assert seen.contrast > 1.3
    assert seen.signal == pytest.approx(1.0, abs=0.1)
    assert seen.layout == pytest.approx(1.0, abs=0.15)


def test_few_instances_break_nothing_by_chance():
    for seed in range(20):
        assert find_unnatural(case_of(images(64, 100 + seed))) is None


def test_an_exact_break_is_seen_although_the_onset_was_dated_too_early():
    whole, broken = images(300, 2), images(600, 3).copy()
    broken[..., 2] = 0.0
    since_onset = window(baseline(), sample(np.concatenate([whole[:60], broken])))
    fresh = window(baseline(), sample(broken))
    found = diagnose(baseline(), since_onset, ALARM, 2, HealSettings(), fresh=fresh)
    assert found.kind is Kind.DATA_QUALITY
    assert found.evidence["check"] == "missing_channel"
