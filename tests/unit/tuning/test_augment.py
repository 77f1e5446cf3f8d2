"""Views are used only where the model answers them as well as before."""

import numpy as np
import pytest

from tuning.augment import Views, find_views, flipped, shifted

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)


def test_a_model_that_minds_flips_gets_none():
    def bright_left(rows):
        left_N, before_N = (part[:, :, :8].mean((1, 2, 3)) for part in (rows, IMAGES))
        return float((left_N >= before_N - 1e-9).mean())

    assert not find_views(IMAGES, "HWC", bright_left).flip
    assert find_views(IMAGES, "HWC", lambda _: 0.9) == Views(flip=True, shift=True)


def test_tables_and_empty_references_have_no_views():
    assert find_views(np.zeros((5, 10), np.float32), "F", lambda _: 1.0) == Views()
    assert find_views(IMAGES[:0], "HWC", lambda _: 1.0) == Views()
    rows = np.ones((5, 10), np.float32)
    assert Views().draw(rows, RNG) is rows


def test_drawn_views_are_flips_and_small_shifts_of_the_same_images():
    drawn = Views(flip=True, shift=True).draw(IMAGES, np.random.default_rng(1))
    assert drawn.shape == IMAGES.shape
    assert drawn.dtype == np.uint8
    inner = drawn[:, 8:24, 8:24]
    for before, after in zip(IMAGES, inner, strict=True):
        both = (before, before[:, ::-1])
        moved = (v[8 + y : 24 + y, 8 + x : 24 + x] for v in both for y in range(-2, 3) for x in range(-2, 3))
        assert any(np.array_equal(after, m) for m in moved)


@pytest.mark.parametrize("layout", ["HWC", "CHW"])
def test_layouts_are_treated_alike(layout):
    rows = IMAGES if layout == "HWC" else np.moveaxis(IMAGES, 3, 1)
    back = (lambda x: x) if layout == "HWC" else (lambda x: np.moveaxis(x, 1, 3))
    dy, dx = np.arange(40) % 5 - 2, np.arange(40) % 3 - 1
    np.testing.assert_array_equal(back(shifted(rows, dy, dx, layout)), shifted(IMAGES, dy, dx, "HWC"))
    np.testing.assert_array_equal(back(flipped(rows, layout)), IMAGES[:, :, ::-1])
    np.testing.assert_array_equal(shifted(IMAGES, np.full(40, 2), np.zeros(40, int), "HWC")[:, 2:], IMAGES[:, :-2])
