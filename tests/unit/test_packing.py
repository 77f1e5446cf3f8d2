"""Packed vectors come back as they were, whatever they hold, and windows are small on the wire."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from orchestrator.messages import Report, Window
from orchestrator.packing import pack, unpack
from orchestrator.settings import FEATURE_SCALE, FOURIER_FEATURES, FOURIER_SCALE

WIDTH = 621  # of a window's vector for ten classes of coloured images


@given(st.integers(0, 70).flatmap(lambda size: arrays(np.int64, size)))
def test_unpacking_gives_what_was_packed(values: np.ndarray) -> None:
    found = unpack(pack(values), len(values))
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, values)


def test_smallest_and_largest_integers_survive() -> None:
    values = np.array([np.iinfo(np.int64).min, np.iinfo(np.int64).max, 0, -1], dtype=np.int64)
    np.testing.assert_array_equal(unpack(pack(values), 4), values)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: raw + b"\0", lambda raw: b""])
def test_damaged_bytes_are_refused(damage) -> None:
    with pytest.raises(ValueError, match="do not hold 40 values"):
        unpack(damage(pack(np.arange(40))), 40)


def _window(segment: str, seed: int) -> Window:
    """As traffic gives it: features of 32 instances, then counts and sums of standardised values."""
    rng = np.random.default_rng(seed)
    features = np.rint(FOURIER_SCALE * np.cos(rng.normal(0, 2, (32, FOURIER_FEATURES)))).sum(0)
    rest = np.concatenate([rng.integers(0, 8, 42), np.rint(FEATURE_SCALE * rng.normal(0, 1, (32, WIDTH - 554))).sum(0)])
    sums = np.concatenate([features, rest]).astype(np.int64)
    return Window("b" * 64, "d" * 64, segment, 32, 1e9, 1e9 + 1, sums)


def _report(windows: tuple[Window, ...]) -> Report:
    return Report("deployment#replica-0", "i" * 32, 12345, "b" * 64, 1, "d" * 64, ("base", "d" * 64), windows)


def test_report_is_small_on_the_wire_and_exact() -> None:
    windows = tuple(_window(f"camera {place}", place) for place in range(32))
    sizes = [len(pickle.dumps(_report(windows[:count]), protocol=5)) for count in (0, 1, 2, 32)]
    assert sizes[1] <= 4096
    assert (sizes[3] - sizes[1]) / 31 <= 1024
    again = pickle.loads(pickle.dumps(_report(windows)))
    for want, got in zip(windows, again.windows, strict=True):
        assert (got.segment, got.count, got.first_s, got.last_s) == (
            want.segment,
            want.count,
            want.first_s,
            want.last_s,
        )
        assert got.sums.dtype == np.int64
        np.testing.assert_array_equal(got.sums, want.sums)
