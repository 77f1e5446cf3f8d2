"""Reference rows take on the traffic's look: spectrum and histogram; labels stay true because content stays."""

import numpy as np
import pytest

from tuning.restyle import WHITE, fit_look, near_variants


def images(num, seed, contrast=1.0):
    """Smooth random images, uint8 (num, 16, 16, 3): a fixed falling spectrum, channels that go together."""
    rng = np.random.default_rng(seed)
    fall = 1 / (0.05 + np.hypot(np.fft.fftfreq(16)[:, None], np.fft.rfftfreq(16)[None]))
    grey = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((num, 16, 16))) * fall, s=(16, 16))
    strength = contrast * rng.uniform(8, 24, num)[:, None, None]
    grey = strength * grey / grey.std((1, 2), keepdims=True)
    return np.clip(128 + grey[..., None] + 4 * rng.standard_normal((num, 1, 1, 3)), 0, 255).astype(np.uint8)


def fine_power(rows):
    """Mean power of the finest differences along x."""
    return float(np.square(np.diff(rows.astype(float), axis=2)).mean())


def noisy(rows, seed=9):
    noise = np.random.default_rng(seed).normal(0, 20, rows.shape)
    return np.clip(rows + noise, 0, 255).astype(np.uint8)


def blurred(rows):
    rows = rows.astype(float)
    return np.clip(sum(np.roll(rows, (y, x), (1, 2)) for y in (-1, 0, 1) for x in (-1, 0, 1)) / 9, 0, 255).astype(
        np.uint8
    )


REFERENCE, OTHER = images(400, 1), images(400, 2)


PLAIN = (0, 0.0)


@pytest.mark.parametrize(
    ("change", "variant"),
    [
        (noisy, (0, 1.0)),
        (noisy, (0, WHITE)),
        (blurred, PLAIN),
        (lambda rows: (rows * 0.3 + 20).astype(np.uint8), PLAIN),
        (lambda rows: rows // 2 + 120, PLAIN),
    ],
    ids=["noise", "white noise", "blur", "contrast", "brightness"],
)
def test_restyled_rows_have_the_traffics_sharpness_and_histogram(change, variant):
    traffic, truth = change(OTHER), change(REFERENCE)
    restyled = fit_look(REFERENCE, traffic, "HWC", variant).apply(REFERENCE, np.random.default_rng(3))
    assert restyled.dtype == np.uint8
    assert restyled.shape == REFERENCE.shape
    assert fine_power(restyled) == pytest.approx(fine_power(truth), rel=0.25)
    quantiles = [np.quantile(x, [0.05, 0.25, 0.5, 0.75, 0.95]) for x in (restyled, truth)]
    np.testing.assert_allclose(*quantiles, atol=6)


def test_what_an_image_shows_stays():
    rows = REFERENCE
    restyled = fit_look(rows, blurred(OTHER), "HWC", PLAIN).apply(rows, np.random.default_rng(3))
    truth = blurred(rows).astype(float)
    same = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(restyled[:50].astype(float), truth, strict=False)]
    assert np.median(same) > 0.95


def test_an_unchanged_world_changes_next_to_nothing():
    restyled = fit_look(REFERENCE, OTHER, "HWC", PLAIN).apply(REFERENCE, np.random.default_rng(3))
    assert np.abs(restyled.astype(float) - REFERENCE).mean() < 4


def test_channels_first_images_are_treated_alike():
    first, last = np.moveaxis(REFERENCE, 3, 1), REFERENCE
    traffic = noisy(OTHER)
    one = fit_look(first, np.moveaxis(traffic, 3, 1), "CHW", PLAIN).apply(first, np.random.default_rng(3))
    other = fit_look(last, traffic, "HWC", PLAIN).apply(last, np.random.default_rng(3))
    np.testing.assert_array_equal(np.moveaxis(one, 1, 3), other)


def test_a_constant_channel_and_one_that_was_constant_are_no_obstacle():
    flat = np.full_like(REFERENCE, 7)
    assert (
        np.abs(fit_look(flat, OTHER, "HWC", PLAIN).apply(flat, np.random.default_rng(3)).astype(float).mean() - 128)
        < 30
    )
    np.testing.assert_array_equal(
        fit_look(REFERENCE, flat, "HWC", PLAIN).apply(REFERENCE, np.random.default_rng(3)), flat
    )


def test_a_look_that_moves_pixels_about_takes_the_sharpness_of_what_it_moved():
    moved = fit_look(REFERENCE, blurred(OTHER), "HWC", (2, 0.0)).apply(REFERENCE, np.random.default_rng(3))
    assert fine_power(moved) == pytest.approx(fine_power(blurred(REFERENCE)), rel=0.25)
    same = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(moved[:50], blurred(REFERENCE), strict=False)]
    assert 0.3 < np.median(same) < 0.95


def test_a_column_gets_a_new_offset_and_gain_and_nan_stays_nan():
    rng = np.random.default_rng(0)
    rows, other = rng.exponential(2.0, (2, 4000, 3)).astype(np.float32)
    rows[5, 1] = np.nan
    look = fit_look(rows, other * [1, -0.5, 3] + [0, 4, -7], "F", PLAIN)
    restyled = look.apply(rows, rng)
    assert np.isnan(restyled[5, 1])
    np.testing.assert_allclose(np.nanmean(restyled, 0), [2, 3, -1], atol=0.25)
    np.testing.assert_allclose(np.nanstd(restyled, 0), [2, 1, 6], rtol=0.1)
    assert np.corrcoef(restyled[:, 2], rows[:, 2])[0, 1] == pytest.approx(1.0)


def test_a_constant_column_moves_with_the_traffics_mean():
    rows, traffic = np.ones((50, 2), np.float32), np.tile(np.float32([1, 6]), (40, 1))
    np.testing.assert_allclose(fit_look(rows, traffic, "F", PLAIN).apply(rows[:40], np.random.default_rng(0)), traffic)


def test_white_noise_is_found_as_strong_as_it_is_and_no_image_is_made_brighter_by_it():
    look = fit_look(REFERENCE, noisy(OTHER), "HWC", (0, WHITE))
    added = look.apply(REFERENCE, np.random.default_rng(3)).astype(float) - REFERENCE
    assert added.std() == pytest.approx(20, rel=0.1)
    assert added.mean((1, 2)).std() < 20 / 16 * 2


def test_the_share_of_noise_is_varied_within_its_bounds():
    assert near_variants((0, 0.0), 0.25) == [(0, 0.25)]
    assert near_variants((1, 0.5), 0.25) == [(1, 0.25), (1, 0.75)]
    assert near_variants((0, WHITE), 0.25) == []
