"""Labelled reference rows given the look of the traffic: what a label-free trial can learn from with true labels.

Most drifts of the world change how inputs look, not what they show. An image gets the traffic's look in three steps,
each fitted on sums over many rows, so that no traffic row is ever copied: pixels change places with near ones (frosted
glass), the spectrum is filtered and noise of the traffic's own colours added (blur, contrast, grain, fog), and each
channel gets the traffic's histogram by a monotone map. Which steps a drift needs is not known: `variants` are
fitted, and `workbench` keeps the one whose rows the base model takes most for traffic. A table's columns get a new
offset and gain each: a freer map would explain any drift of a table, also those that no adapter can heal.

Knows no models. That amplitudes carry the look and phases the content: Yang & Soatto 2020, FDA.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

WHITE = -1.0
# Looks to fit: reach of the change of places in pixels, and what is taken for noise: that share of what mean and spread
# of a ring's power call noise, or, WHITE, as much in every ring as the last one holds, where images hold least.
Variant = tuple[int, float]
VARIANTS: tuple[Variant, ...] = ((0, 0.0), (0, WHITE), (0, 0.5), (0, 1.0), (1, 0.0), (2, 0.0))
NUM_RINGS = 12  # of spatial frequencies, holding equally many coefficients; the mean of an image is one more
NUM_QUANTILES = 257
MAX_MEAN_GAIN = 2.0  # of the spread of images' means: few rows make that ratio uncertain
MAX_FIT_VALUES = 3 << 20  # input values that a look is fitted on: 1,024 images of 32 x 32, 64 of 128 x 128
MIN_SIDE = 8  # smaller images only get the histogram: their rings would hold one coefficient each
_TINY = 1e-9


@dataclass(frozen=True)
class Spectrum:
    """What turns the reference's spectrum into the traffic's.

    Attributes:
        gain_CHW: filter per channel and coefficient, float32 (C, H, W // 2 + 1).
        noise_RCC: colouring L of the added noise per ring, L L^T its covariance over channels.
        from_C, to_C: channel means of reference and traffic.
    """

    gain_CHW: torch.Tensor
    noise_RCC: torch.Tensor
    from_C: torch.Tensor
    to_C: torch.Tensor


@dataclass(frozen=True)
class Look:
    """The traffic's look as seen from the reference. Make it with `fit_look`.

    Attributes:
        layout: HWC, CHW or F.
        reach: pixels by which a pixel may change its place.
        spectrum: None where there is none to shape.
        from_QC, to_QC: knots of the monotone map per channel; two knots are an offset and a gain.
    """

    layout: str
    reach: int
    spectrum: Spectrum | None
    from_QC: np.ndarray
    to_QC: np.ndarray

    def apply(self, inputs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Reference rows with the traffic's look.

        Args:
            inputs: (N, *shape) of the layout it was fitted on, any number type.
            rng: draws places and noise.

        Returns:
            Same shape and type; integers are rounded and clipped to their type's range. NaN stays NaN.
        """
        rows = _channels_last(inputs, self.layout)
        if self.layout == "F":
            gain_C = (self.to_QC[1] - self.to_QC[0]) / (self.from_QC[1] - self.from_QC[0])
            mapped = self.to_QC[0] + (rows - self.from_QC[0]) * gain_C
        else:
            rows = _shape(_displaced(rows, self.reach, rng), self.spectrum, rng)
            mapped = np.empty_like(rows)
            for c in range(rows.shape[-1]):
                mapped[..., c] = np.interp(rows[..., c], self.from_QC[:, c], self.to_QC[:, c])
        return _typed(_back(mapped, self.layout, inputs.shape), inputs.dtype)


def fit_look(reference: np.ndarray, traffic: np.ndarray, layout: str, variant: Variant) -> Look:
    """The look that a variant finds in `traffic` as seen from `reference`; tables have one whatever the variant.

    Args:
        reference: (N, *shape), N >= 2.
        traffic: (M, *shape), M >= 2, of the rows that drifted.
        layout: HWC, CHW, or F.
        variant: one of `variants`, or with another share of noise.
    """
    limit = max(2, MAX_FIT_VALUES // max(1, int(np.prod(reference.shape[1:]))))
    old, new = (_channels_last(part[:limit], layout) for part in (reference, traffic))
    if layout == "F":
        return Look("F", 0, None, _moments(old), _moments(new))
    reach, noise_share = variant
    moved = _displaced(old, reach, np.random.default_rng(0))
    spectrum = _fit_spectrum(moved, new, noise_share) if _has_spectrum(old.shape) else None
    shaped = _shape(moved, spectrum, np.random.default_rng(0))
    return Look(layout, reach, spectrum, _strictly_rising(_quantiles(shaped)), _quantiles(new))


def variants(inputs: np.ndarray, layout: str) -> tuple[Variant, ...]:
    """Variants worth fitting to inputs (N, *shape); one where there is nothing to choose."""
    return VARIANTS if layout != "F" and _has_spectrum(_channels_last(inputs[:1], layout).shape) else VARIANTS[:1]


def near_variants(variant: Variant, step: float) -> list[Variant]:
    """The same with a little less and a little more noise, where there is a share to vary."""
    reach, share = variant
    return [] if share == WHITE else [(reach, s) for s in (share - step, share + step) if 0.0 <= s <= 1.0]


def _has_spectrum(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and min(shape[1:3]) >= MIN_SIDE


def _channels_last(inputs: np.ndarray, layout: str) -> np.ndarray:
    """float32 (N, H, W, C), or (N, C) for tables."""
    if layout == "F" or inputs.ndim < 3:
        return inputs.reshape(len(inputs), -1).astype(np.float32)
    return (np.moveaxis(inputs, 1, -1) if layout == "CHW" else inputs).astype(np.float32)


def _back(rows: np.ndarray, layout: str, shape: tuple[int, ...]) -> np.ndarray:
    return (np.moveaxis(rows, -1, 1) if layout == "CHW" and len(shape) > 3 else rows).reshape(shape)


def _typed(rows: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if not np.issubdtype(dtype, np.integer):
        return rows.astype(dtype)
    limits = np.iinfo(dtype)
    return np.asarray(np.clip(np.rint(rows), limits.min, limits.max).astype(dtype))


def _moments(rows_NC: np.ndarray) -> np.ndarray:
    """Mean, and mean plus standard deviation (1 for a constant column), NaN left out: float64 (2, C)."""
    known = np.isfinite(rows_NC)
    mean_C = np.mean(rows_NC, axis=0, where=known, dtype=np.float64) if known.any() else np.zeros(rows_NC.shape[1])
    mean_C = np.nan_to_num(mean_C)
    variance_C = np.where(known, (np.where(known, rows_NC, 0.0) - mean_C) ** 2, 0.0).sum(0) / np.maximum(
        known.sum(0), 1
    )
    return np.stack([mean_C, mean_C + np.where(variance_C > 0, np.sqrt(variance_C), 1.0)])


def _quantiles(rows: np.ndarray) -> np.ndarray:
    """float64 (Q, C) over all rows and positions, NaN left out; 0 for a channel of NaN alone."""
    flat = rows.reshape(-1, rows.shape[-1])
    flat = flat[:: max(1, len(flat) // 200_000)]
    levels = np.linspace(0.0, 1.0, NUM_QUANTILES)
    kept = [column[np.isfinite(column)] for column in flat.T]
    return np.stack([np.quantile(k, levels) if len(k) else np.zeros(NUM_QUANTILES) for k in kept], axis=1)


def _strictly_rising(knots_QC: np.ndarray) -> np.ndarray:
    """Ties are parted by a hair: `interp` needs rising knots; a constant channel maps to the traffic's median."""
    scale_C = np.maximum(np.abs(knots_QC).max(axis=0), 1.0)
    return np.asarray(knots_QC + np.linspace(-1e-6, 1e-6, len(knots_QC))[:, None] * scale_C)


def _displaced(rows_NHWC: np.ndarray, reach: int, rng: np.random.Generator) -> np.ndarray:
    """Every pixel takes the value of one at most `reach` away in each direction."""
    if reach == 0:
        return rows_NHWC
    num, height, width = rows_NHWC.shape[:3]
    move_2NHW = rng.integers(-reach, reach + 1, (2, num, height, width))
    y_NHW = np.clip(np.arange(height)[:, None] + move_2NHW[0], 0, height - 1)
    x_NHW = np.clip(np.arange(width) + move_2NHW[1], 0, width - 1)
    return np.asarray(rows_NHWC[np.arange(num)[:, None, None], y_NHW, x_NHW])


def _rings(height: int, width: int) -> torch.Tensor:
    """Ring of each coefficient of a real 2-D transform, int64 (H, W // 2 + 1); 0 is the mean."""
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    edges = np.quantile(radius[radius > 0], np.linspace(0.0, 1.0, NUM_RINGS + 1))[1:-1]
    return torch.from_numpy(np.where(radius > 0, 1 + np.searchsorted(edges, radius, side="right"), 0))


def _transform(rows_NHWC: np.ndarray, mean_C: torch.Tensor) -> torch.Tensor:
    x = torch.from_numpy(np.nan_to_num(rows_NHWC)) - mean_C
    spectra: torch.Tensor = torch.fft.rfft2(x.permute(0, 3, 1, 2), norm="ortho")
    return spectra


def _ring_power(spectra_NCHW: torch.Tensor, rings: torch.Tensor, ring: int) -> torch.Tensor:
    """Covariance over channels of each row's coefficients in a ring, float32 (N, C, C)."""
    inside = spectra_NCHW[:, :, rings == ring]
    covariance: torch.Tensor = (inside @ inside.conj().transpose(1, 2)).real / inside.shape[2]
    return covariance


def _fit_spectrum(old: np.ndarray, new: np.ndarray, noise_share: float) -> Spectrum:
    """Noise per ring from mean and spread, over rows, of its power; the filter is what the noise leaves.

    A filter scales mean and spread by its square, noise of a constant power adds to the mean alone. In the rings that
    hold most of an image the spread is too uncertain to tell grain by: that is what WHITE is for.
    """
    rings = _rings(*old.shape[1:3])
    means = [torch.from_numpy(np.nan_to_num(part).mean((0, 1, 2))) for part in (old, new)]
    before, after = (_transform(part, mean) for part, mean in zip((old, new), means, strict=True))
    if noise_share == WHITE:
        last = [_ring_power(spectra, rings, NUM_RINGS).mean(0) for spectra in (before, after)]
        colors = [_root(last[1] - last[0])] * (NUM_RINGS + 1)
    else:
        colors = []
        for ring in range(NUM_RINGS + 1):
            old_NCC, new_NCC = (_ring_power(spectra, rings, ring) for spectra in (before, after))
            old_N, new_N = (p.diagonal(dim1=1, dim2=2).sum(1) for p in (old_NCC, new_NCC))
            ratio = min(float(new_N.std() / (old_N.std() + _TINY)), float(new_N.mean() / (old_N.mean() + _TINY)))
            ratio = min(ratio, MAX_MEAN_GAIN**2) if ring == 0 else ratio
            colors.append(noise_share**0.5 * _root(new_NCC.mean(0) - ratio * old_NCC.mean(0)))
    color_RCC = torch.stack(colors)
    noise_CHW = color_RCC.square().sum(2)[rings].permute(2, 0, 1)
    old_CHW, new_CHW = (spectra.abs().square().mean(0) for spectra in (before, after))
    gain_CHW = ((new_CHW - noise_CHW).clamp_min(0) / (old_CHW + _TINY)).sqrt()
    gain_CHW[:, 0, 0].clamp_(max=MAX_MEAN_GAIN)
    return Spectrum(gain_CHW, color_RCC, *means)


def _root(covariance_CC: torch.Tensor) -> torch.Tensor:
    """L (C, C) with L L^T the covariance, what is negative of it left out."""
    values_C, vectors_CC = torch.linalg.eigh(covariance_CC)
    root_CC: torch.Tensor = vectors_CC * values_C.clamp_min(0).sqrt()
    return root_CC


def _shape(rows_NHWC: np.ndarray, spectrum: Spectrum | None, rng: np.random.Generator, batch: int = 512) -> np.ndarray:
    """Rows filtered and with noise, float32 (N, H, W, C)."""
    if spectrum is None:
        return rows_NHWC
    size = rows_NHWC.shape[1:3]
    rings, noisy = _rings(*size), bool(spectrum.noise_RCC.any())
    shaped = np.empty(rows_NHWC.shape, np.float32)
    for start in range(0, len(rows_NHWC), batch):
        part = rows_NHWC[start : start + batch]
        spectra = _transform(part, spectrum.from_C) * spectrum.gain_CHW
        if noisy:
            white = torch.from_numpy(rng.standard_normal((len(part), part.shape[3], *size), np.float32))
            color_HWCC = spectrum.noise_RCC[rings].to(torch.complex64)
            spectra += torch.einsum("hwcd,ndhw->nchw", color_HWCC, torch.fft.rfft2(white, norm="ortho"))
        image = torch.fft.irfft2(spectra, s=size, norm="ortho")
        shaped[start : start + batch] = (image.permute(0, 2, 3, 1) + spectrum.to_C).numpy()
    return shaped
