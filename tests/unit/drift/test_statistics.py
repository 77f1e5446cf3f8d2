"""The sums of a window: exact, additive, and honest about what is not finite."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mixture import World, window

from orchestrator.drift.sample import rows_of
from orchestrator.drift.statistics import CHECKS, Layout, merge, read, summarise
from orchestrator.messages import Window
from orchestrator.settings import FOURIER_SCALE

WORLD = World()
BASELINE = WORLD.baseline(400)
LAYOUT = BASELINE.layout


@given(num_classes=st.integers(1, 50), num_channels=st.integers(1, 40))
def test_parts_of_a_layout_tile_the_vector(num_classes, num_channels):
    layout = Layout(num_classes, num_channels)
    ends = [(s.start, s.stop) for s in layout.slices.values()]
    assert ends[0][0] == 0
    assert all(left[1] == right[0] for left, right in itertools.pairwise(ends))
    assert ends[-1][1] == layout.size


@given(cuts=st.lists(st.integers(0, 60), max_size=5))
def test_any_grouping_into_batches_gives_the_same_sums(cuts):
    sample = World(5).sample(60)
    whole = window(BASELINE, sample).sums
    edges = [0, *sorted(cuts), 60]
    parts = [rows_of(sample, slice(a, b)) for a, b in itertools.pairwise(edges)]
    assert np.array_equal(whole, sum(window(BASELINE, part).sums for part in parts))


vectors = st.lists(st.integers(-(2**40), 2**40), min_size=3, max_size=3).map(lambda v: np.array(v, dtype=np.int64))
windows = st.builds(
    lambda v, n, t, s: Window("b", "base", s, n, t, t + 1, v),
    vectors,
    st.integers(1, 99),
    st.floats(0, 1e9),
    st.sampled_from(["", "a", "b"]),
)


def same(left, right):
    return np.array_equal(left.sums, right.sums) and replace(left, sums=None) == replace(right, sums=None)


@given(windows, windows, windows)
def test_merge_is_associative_and_commutative(a, b, c):
    assert same(merge([merge([a, b]), c]), merge([a, merge([b, c])]))
    assert same(merge([a, b, c]), merge([c, a, b]))


def test_merge_refuses_nothing_and_windows_of_different_digests():
    w = window(BASELINE, WORLD.sample(3))
    with pytest.raises(ValueError, match="at least one"):
        merge([])
    with pytest.raises(ValueError, match="share base and digest"):
        merge([w, replace(w, digest="other")])


def test_an_empty_batch_sums_to_zero():
    sample = rows_of(WORLD.sample(4), slice(0, 0))
    sums = summarise(BASELINE, LAYOUT, sample.embedding_ND, sample.logits_NK, sample.checks())
    assert sums.shape == (LAYOUT.size,)
    assert not sums.any()


def test_a_non_finite_output_counts_as_invalid_and_adds_nothing_else():
    sample = WORLD.sample(5)
    embedding_ND = sample.embedding_ND.copy()
    embedding_ND[2] = np.nan
    summary = read(LAYOUT, window(BASELINE, replace(sample, embedding_ND=embedding_ND)))
    clean = read(LAYOUT, window(BASELINE, rows_of(sample, [0, 1, 3, 4])))
    assert (summary.count, summary.num_valid, summary.check_counts["invalid"]) == (5, 4, 1)
    assert np.allclose(summary.feature_mean_M, clean.feature_mean_M)
    assert summary.mean_confidence == pytest.approx(clean.mean_confidence)


def test_input_checks_count_nan_constant_out_of_range_and_duplicates():
    sample = WORLD.sample(6)
    low, high = sample.input_min_N.copy(), sample.input_max_N.copy()
    low[0] = high[0]
    high[1] = 1e6
    nan, hashes = np.array([0, 0, 3, 0, 0, 0]), np.array([1, 2, 3, 3, 3, 4])
    w = window(BASELINE, sample, input_min_N=low, input_max_N=high, nan_N=nan, hashes_N=hashes)
    assert read(LAYOUT, w).check_counts == dict(zip(CHECKS, (1, 0, 1, 1, 2), strict=True))


def test_a_channel_that_is_nan_is_no_evidence():
    sample = WORLD.sample(4)
    means_NC = np.full_like(sample.channel_means_NC, np.nan)
    summary = read(LAYOUT, window(BASELINE, replace(sample, channel_means_NC=means_NC)))
    assert np.all(summary.channel_means_C == 0)
    assert np.all(summary.channel_squares_C == 1)
    assert summary.check_counts["nan"] == 4


def test_means_and_shares_are_read_back_from_the_sums():
    sample = WORLD.sample(500)
    summary = read(LAYOUT, window(BASELINE, sample))
    for shares in (summary.class_shares_K, summary.confidence_shares_B, summary.entropy_shares_B):
        assert shares.sum() == pytest.approx(1.0)
    assert np.abs(summary.feature_mean_M).max() <= 1.0
    assert abs(summary.channel_means_C).max() < 0.2
    assert summary.channel_squares_C == pytest.approx(np.ones(3), abs=0.1)


def test_quantisation_costs_at_most_half_a_unit_per_instance():
    from orchestrator.drift.statistics import fourier_features

    sample = WORLD.sample(50)
    exact_M = fourier_features(BASELINE, sample.embedding_ND).sum(axis=0)
    sums_M = window(BASELINE, sample).sums[LAYOUT.slices["features"]]
    assert np.abs(sums_M - exact_M * FOURIER_SCALE).max() <= 0.5 * 50


def test_a_vector_of_another_length_is_refused_with_both_lengths():
    with pytest.raises(ValueError, match=f"must have {LAYOUT.size} entries; got 3"):
        read(LAYOUT, Window("b", "base", "", 1, 0.0, 0.0, np.zeros(3, dtype=np.int64)))
