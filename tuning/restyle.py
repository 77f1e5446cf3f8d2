"""Labelled reference rows given the look of the traffic: what a label-free trial can learn from with true labels.

Most drifts of the world change how inputs look, not what they show. Two steps carry the look over, each fitted on sums
over many rows, so that no traffic row is ever copied. Images first get the traffic's spectrum: in each ring of spatial
frequencies a filter, where the traffic's power follows the reference's (blur, contrast), and noise of the traffic's own
colours, where it does not (grain, fog). Then each channel or column gets the traffic's histogram by a monotone map.

What keeps neither spectrum nor histogram (pixels moved about, text over the image) is carried over in part or not at
all; a trial that learned from the wrong look must still beat the others on the traffic itself.

Called by `workbench`; knows no models. Source of the idea that amplitudes carry the look and phases the content:
Yang & Soatto 2020, FDA: Fourier domain adaptation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

NUM_RINGS = 12  # of spatial frequencies, holding equally many coefficients; the mean of an image is one more
NUM_QUANTILES = 257
MAX_MEAN_GAIN = 2.0  # of the spread of images' means: few rows make that ratio uncertain
MAX_FIT_VALUES = 1 << 24  # input values used to fit a look; all of 5,000 images of 32 x 32, fewer of larger ones
MIN_SIDE = 8  # smaller images are treated as tables: their rings would hold one coefficient each
_TINY = 1e-9


@dataclass(frozen=True)
class Spectrum:
    """What turns the reference's spectrum into the traffic's.

    Attributes:
        gain_R: filter per ring, float32; ring 0 is the mean of an image.
        noise_RCC: colouring L of the added noise per ring, L L^T its covariance over channels.
        from_C, to_C: channel means of reference and traffic.
    """

    gain_R: torch.Tensor
    noise_RCC: torch.Tensor
    from_C: torch.Tensor
    to_C: torch.Tensor


class Look:
    """The traffic's look, fitted once; `apply` gives it to reference rows. Make it with `fit_look`."""

    def __init__(self, layout: str, spectrum: Spectrum | None, quantiles_from_QC: np.ndarray, to_QC: np.ndarray):
        self._layout, self._spectrum = layout, spectrum
        self._from_QC, self._to_QC = quantiles_from_QC, to_QC

    def apply(self, inputs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Reference rows with the traffic's look.

        Args:
            inputs: (N, *shape) of the layout it was fitted on, any number type.
            rng: draws the noise.

        Returns:
            Same shape and type; integers are rounded and clipped to their type's range. NaN stays NaN.
        """
        rows_NSC = _channels_last(inputs, self._layout)
        if self._spectrum is not None:
            rows_NSC = _shape(rows_NSC, self._spectrum, rng)
        mapped = np.empty(rows_NSC.shape, np.float32)
        for c in range(rows_NSC.shape[-1]):
            mapped[..., c] = np.interp(rows_NSC[..., c], self._from_QC[:, c], self._to_QC[:, c])
        return _typed(_back(mapped, self._layout, inputs.shape), inputs.dtype)


def fit_look(reference: np.ndarray, traffic: np.ndarray, layout: str) -> Look:
    """Fits the look of `traffic` as seen from `reference`.

    Args:
        reference: (N, *shape), N >= 2.
        traffic: (M, *shape), M >= 2, of the rows that drifted.
        layout: HWC, CHW, or F (each column has a histogram of its own).
    """
    limit = max(2, MAX_FIT_VALUES // max(1, int(np.prod(reference.shape[1:]))))
    old, new = (_channels_last(part[:limit], layout) for part in (reference, traffic))
    spectrum = None
    to_QC = _quantiles(new)
    if old.ndim == 4 and min(old.shape[1:3]) >= MIN_SIDE:
        spectrum = _fit_spectrum(old, new)
        old = _shape(old, spectrum, np.random.default_rng(0))
    return Look(layout, spectrum, _strictly_rising(_quantiles(old)), to_QC)


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
    return np.clip(np.rint(rows), limits.min, limits.max).astype(dtype)


def _quantiles(rows: np.ndarray) -> np.ndarray:
    """float64 (Q, C) over all rows and positions, NaN left out; a column of NaN alone maps to itself as 0."""
    flat = rows.reshape(-1, rows.shape[-1])
    flat = flat[:: max(1, len(flat) // 500_000)]
    levels = np.linspace(0.0, 1.0, NUM_QUANTILES)
    kept = [column[np.isfinite(column)] for column in flat.T]
    return np.stack([np.quantile(k, levels) if len(k) else np.zeros(NUM_QUANTILES) for k in kept], axis=1)


def _strictly_rising(knots_QC: np.ndarray) -> np.ndarray:
    """Ties are parted by a hair: `interp` needs rising knots; a constant column maps to the traffic's median."""
    scale_C = np.maximum(np.abs(knots_QC).max(axis=0), 1.0)
    return np.asarray(knots_QC + np.linspace(-1e-6, 1e-6, NUM_QUANTILES)[:, None] * scale_C)


def _rings(height: int, width: int) -> torch.Tensor:
    """Ring of each coefficient of a real 2-D transform, int64 (H, W // 2 + 1); 0 is the mean."""
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    edges = np.quantile(radius[radius > 0], np.linspace(0.0, 1.0, NUM_RINGS + 1))[1:-1]
    return torch.from_numpy(np.where(radius > 0, 1 + np.searchsorted(edges, radius, side="right"), 0))


def _transform(rows_NHWC: np.ndarray, mean_C: torch.Tensor) -> torch.Tensor:
    x = torch.from_numpy(np.nan_to_num(rows_NHWC)) - mean_C
    return torch.fft.rfft2(x.permute(0, 3, 1, 2), norm="ortho")


def _power(spectra_NCHW: torch.Tensor, rings: torch.Tensor, ring: int) -> torch.Tensor:
    """Covariance over channels of each row's coefficients in a ring, float32 (N, C, C)."""
    inside = spectra_NCHW[:, :, rings == ring]
    return (inside @ inside.conj().transpose(1, 2)).real / inside.shape[2]


def _fit_spectrum(old: np.ndarray, new: np.ndarray) -> Spectrum:
    """Filter and noise per ring from mean and spread, over rows, of the ring's power.

    A filter scales both by its square, noise of a constant power adds to the mean alone. So the spread gives the gain,
    and what the mean has beyond it is noise.
    """
    rings = _rings(*old.shape[1:3])
    means = [torch.from_numpy(np.nan_to_num(part).mean((0, 1, 2))) for part in (old, new)]
    before, after = (_transform(part, mean) for part, mean in zip((old, new), means, strict=True))
    gains, noises = [], []
    for ring in range(NUM_RINGS + 1):
        old_NCC, new_NCC = _power(before, rings, ring), _power(after, rings, ring)
        old_N, new_N = (p.diagonal(dim1=1, dim2=2).sum(1) for p in (old_NCC, new_NCC))
        ratio = min(float(new_N.std() / (old_N.std() + _TINY)), float(new_N.mean() / (old_N.mean() + _TINY)))
        ratio = min(ratio, MAX_MEAN_GAIN**2) if ring == 0 else ratio
        values_C, vectors_CC = torch.linalg.eigh(new_NCC.mean(0) - ratio * old_NCC.mean(0))
        gains.append(ratio**0.5)
        noises.append(vectors_CC * values_C.clamp_min(0).sqrt())
    return Spectrum(torch.tensor(gains), torch.stack(noises), *means)


def _shape(rows_NHWC: np.ndarray, spectrum: Spectrum, rng: np.random.Generator, batch: int = 512) -> np.ndarray:
    """Rows filtered and with noise, float32 (N, H, W, C)."""
    rings = _rings(*rows_NHWC.shape[1:3])
    gain_HW, color_HWCC = spectrum.gain_R[rings], spectrum.noise_RCC[rings].to(torch.complex64)
    shaped = np.empty(rows_NHWC.shape, np.float32)
    for start in range(0, len(rows_NHWC), batch):
        part = rows_NHWC[start : start + batch]
        white = torch.from_numpy(rng.standard_normal((len(part), part.shape[3], *part.shape[1:3]), np.float32))
        noise = torch.einsum("hwcd,ndhw->nchw", color_HWCC, torch.fft.rfft2(white, norm="ortho"))
        spectra = _transform(part, spectrum.from_C) * gain_HW + noise
        image = torch.fft.irfft2(spectra, s=part.shape[1:3], norm="ortho")
        shaped[start : start + batch] = (image.permute(0, 2, 3, 1) + spectrum.to_C).numpy()
    return shaped
