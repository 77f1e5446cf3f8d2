"""What the healing benchmark makes of many results: shares, paired intervals, tables."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.healing.buffers import Scene
from benchmarks.healing.peer_run import stream_parts
from benchmarks.healing.report import lines, markdown
from benchmarks.healing.results import Base, Result, frozen_share, marks, share_difference, tuned


def test_a_stream_is_cut_into_batches_without_a_small_rest():
    assert [len(range(1999)[part]) for part in stream_parts(1999, 200)] == [200] * 9 + [199]
    assert [len(range(450)[part]) for part in stream_parts(450, 200)] == [200, 250]
    assert [len(range(30)[part]) for part in stream_parts(30, 200)] == [30]


def result(method, right, drift="fog", setting="authors", score=None):
    drifted = right.count("1") / (len(right) - right.count("-"))
    return Result(
        scene=Scene(drift),
        method=method,
        setting=setting,
        base=Base(0.5, 0.9, 0.5, 0.9),
        drifted=drifted,
        clean=0.8,
        online=None,
        right=right,
        score=score,
        seconds=1.0,
    )


def test_the_paired_interval_is_tight_for_paired_gains_and_spans_zero_for_noise():
    rng = np.random.default_rng(0)
    rows = np.arange(1000)
    start = rng.random(1000) < 0.7
    better = start | (rng.random(1000) < 0.2)
    other = rng.random(1000) < start.mean()
    a, b, c = (result("m", marks(v, rows, 1000)) for v in (start, better, other))
    gap, low, high = share_difference([b], [a])
    assert gap == pytest.approx(frozen_share([b]) - frozen_share([a]))
    assert 0 < low < gap < high
    gap, low, high = share_difference([c], [a])
    assert low < 0 < high


def test_pairs_of_several_sets_resample_images_together():
    rng = np.random.default_rng(1)
    rows = np.arange(1000)
    one, two = rng.random(1000) < 0.7, rng.random(1000) < 0.6
    mine = [result("m", marks(one, rows, 1000), d) for d in ("fog", "contrast")]
    theirs = [result("ours", marks(two, rows, 1000), d) for d in ("fog", "contrast")]
    both, single = share_difference(mine, theirs), share_difference(mine[:1], theirs[:1])
    assert both == pytest.approx(single)  # the same images twice tell nothing new


def test_marks_leave_rows_that_were_not_scored_out():
    assert marks(np.array([True, False]), np.array([0, 2]), 4) == "1-0-"


def test_tuned_results_name_the_best_by_truth_and_by_our_score():
    low, middle, high = (
        result("tent", "1" * n + "0" * (10 - n), setting=s, score=v)
        for n, s, v in ((6, "x0.3", 0.9), (7, "authors", 0.5), (8, "x3", 0.7))
    )
    found = {r.setting: r.drifted for r in tuned([low, middle, high, result("bn", "1" * 10)]) if r.method == "tent"}
    assert found == {"authors": 0.7, "oracle": 0.8, "selected": 0.6}


def test_the_summary_has_a_table_per_regime_with_intervals_to_ours_and_one_over_all():
    ours = [result("ours", "1" * 80 + "0" * 20, drift) for drift in ("fog", "contrast")]
    peer = [result("tent", "1" * n + "0" * (100 - n), drift) for n, drift in ((70, "fog"), (40, "contrast"))]
    other = replace(peer[0], scene=Scene("fog", "sorted"), online=0.3)
    text = markdown([*ours, *peer, other], "command")
    assert "| ours | 0.750 |  | 0.750 fog | - | 0.800 | 1 |" in text
    assert "| tent | 0.125 | -0.625 [" in text
    assert "-0.250 contrast" in text
    assert "| tent | 0.500 |  | 0.500 fog | -0.500 |" in text  # no ours in that regime, worse than nothing online
    assert "| tent | 2 | 0.312 | 0.125 (iid, none) |" in text
    assert len(lines([*ours, *peer, other])) == 3
