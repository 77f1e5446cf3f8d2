"""Windows close by count and age, never lose a sum, and stay bounded."""

from __future__ import annotations

import threading

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from serve_app.windows import OTHER, Windows


def sums(value: int = 1) -> np.ndarray:
    return np.full(4, value, dtype=np.int64)


def test_window_closes_at_32_instances() -> None:
    windows = Windows("b")
    for second in range(31):
        windows.add("d", "", 1, 10.0 + second / 100, sums())
    assert windows.take(10.5) == ()
    windows.add("d", "", 1, 10.9, sums())
    (window,) = windows.take(10.9)
    assert (window.base, window.digest, window.segment, window.count) == ("b", "d", "", 32)
    assert (window.first_s, window.last_s) == (10.0, 10.9)
    np.testing.assert_array_equal(window.sums, sums(32))


def test_closed_windows_of_one_key_are_taken_as_one_and_nothing_is_lost() -> None:
    windows = Windows("b")
    for second in range(8):
        windows.add("d", "", 32, 10.0 + second / 100, sums(2**40 + second))
    (window,) = windows.take(10.5)
    assert (window.count, window.first_s, window.last_s) == (256, 10.0, 10.07)
    np.testing.assert_array_equal(window.sums, sums(8 * 2**40 + 28))


def test_larger_batch_makes_a_larger_window() -> None:
    windows = Windows("b")
    windows.add("d", "", 100, 1.0, sums(100))
    assert [w.count for w in windows.take(1.0)] == [100]


def test_window_of_one_instance_closes_when_it_is_a_second_old() -> None:
    windows = Windows("b")
    windows.add("d", "", 1, 1.0, sums())
    assert windows.take(1.9) == ()
    assert [w.count for w in windows.take(2.0)] == [1]


def test_digests_and_segments_are_kept_apart() -> None:
    windows = Windows("b", window_instances=1)
    for digest, segment in (("d", ""), ("e", ""), ("d", "cam")):
        windows.add(digest, segment, 1, 1.0, sums())
    assert {(w.digest, w.segment) for w in windows.take(1.0)} == {("d", ""), ("e", ""), ("d", "cam")}


def test_segments_after_the_32nd_count_as_other() -> None:
    windows = Windows("b", window_instances=1)
    for number in range(40):
        windows.add("d", f"s{number}", 1, 1.0, sums())
    counts = {w.segment: w.count for w in windows.take(1.0)}
    assert len(counts) == 33
    assert counts[OTHER] == 8
    assert windows.segment("s0") == "s0"


@given(st.lists(st.tuples(st.sampled_from("de"), st.sampled_from("xyz"), st.integers(1, 50)), max_size=200))
def test_nothing_is_lost_however_long_nobody_takes(batches: list[tuple[str, str, int]]) -> None:
    windows = Windows("b", max_pending=8)
    for digest, segment, count in batches:
        windows.add(digest, segment, count, 1.0, sums(count))
    taken = windows.take(99.0)
    assert len(taken) <= 8 + 6
    assert windows.dropped == 0
    assert sum(w.count for w in taken) == sum(c for *_, c in batches)
    assert sum(int(w.sums[0]) for w in taken) == sum(c for *_, c in batches)


def test_too_many_keys_drop_the_oldest_and_count_their_instances() -> None:
    windows = Windows("b", max_pending=4, window_instances=1)
    for number in range(10):
        windows.add(f"d{number}", "", 2, 1.0, sums())
    taken = windows.take(1.0)
    assert len(taken) <= 4
    assert windows.dropped + sum(w.count for w in taken) == 20


def test_threads_lose_no_instance() -> None:
    windows = Windows("b")

    def add() -> None:
        for _ in range(500):
            windows.add("d", "", 1, 1.0, sums())

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    seen = 0
    while any(t.is_alive() for t in threads):
        seen += sum(w.count for w in windows.take(1.0))
    for thread in threads:
        thread.join()
    assert seen + sum(w.count for w in windows.take(99.0)) == 2000
