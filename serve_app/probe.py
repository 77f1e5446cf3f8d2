"""The drift statistics of one forward pass, on the device it ran on.

Called by `Healable` after a batch was answered. Gives the int64 vector that `orchestrator.drift.statistics.summarise`
gives (its oracle in numpy float64), up to one unit per instance. Nothing here waits for the device: no `.item()`, no
boolean indexing, no `bincount`; the sums stay there until a window is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from orchestrator.drift.baseline import Baseline
from orchestrator.drift.statistics import CHANNEL_CLIP, EMBEDDING_CLIP, NUM_BINS, SKETCH_CLIP
from orchestrator.settings import FEATURE_SCALE, FOURIER_SCALE, WINDOW_INSTANCES
from serve_app.byte_images import CENTRE, HASHED_VALUES, ByteImages
from tuning.sketch import image_sketch

_HASH_SEED = 977
_EXACT = 1 << 24  # integers up to this are exact in float32
_LOG_TINY = -69.07755278982137  # log(1e-30): what summarise takes for the log of nothing


@dataclass(frozen=True)
class _Inputs:
    """Of N inputs: channel means and squares about the reference means (N, C), raw sketch (N, S); all float64."""

    means_NC: torch.Tensor
    squares_NC: torch.Tensor
    sketch_NS: torch.Tensor
    low_N: torch.Tensor
    high_N: torch.Tensor
    hash_N: torch.Tensor
    nan_N: torch.Tensor | None  # None: integers cannot be


class Probe:
    """Reduces batches under one baseline.

    Args:
        baseline: of the digest that answers.
        layout: the spec's input layout: HWC, CHW or F.
        device: where the model runs.
    """

    def __init__(self, baseline: Baseline, layout: str, device: torch.device) -> None:
        self.layout = baseline.layout
        self._input_layout = layout
        self._device = device
        self._temperature = float(baseline.temperature)
        self._low, self._high = float(baseline.input_low), float(baseline.input_high)
        self._center_D = self._constant(baseline.center_D, torch.float32)
        self._projection_DP = self._constant(baseline.projection_DP, torch.float32)
        self._frequencies_PF = self._constant(baseline.frequencies_PF, torch.float32)
        self._confidence_edges_E = self._constant(baseline.confidence_edges_E, torch.float64)
        self._entropy_edges_E = self._constant(baseline.entropy_edges_E, torch.float64)
        self._mu_C = self._constant(baseline.channel_mean_C, torch.float64)
        self._scale_C = self._constant(baseline.channel_scale_C, torch.float64)
        self._sketch_mean_S = self._constant(baseline.sketch_mean_S, torch.float64)
        self._sketch_scale_S = self._constant(baseline.sketch_scale_S, torch.float64)
        pairs = self.layout.pairs
        self._left = torch.tensor([i for i, _ in pairs], dtype=torch.long, device=device)
        self._right = torch.tensor([j for _, j in pairs], dtype=torch.long, device=device)
        self._offset_C = self._mu_C - CENTRE
        self._squared_scale_C = self._scale_C.square()
        classes = self.layout.num_classes  # three histograms are counted as one
        self._starts_3 = torch.tensor([0, classes, classes + NUM_BINS], dtype=torch.long, device=device)
        self._num_counts = classes + 2 * NUM_BINS
        self._known: tuple[torch.Size, torch.Tensor, torch.Tensor | None] | None = None
        self._hash: tuple[int, torch.Tensor, torch.Tensor] | None = None
        self._bytes: tuple[torch.Size, ByteImages] | None = None

    def _constant(self, values: object, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.array(values, copy=True)).to(device=self._device, dtype=dtype)

    @torch.inference_mode()
    def observe(self, inputs: torch.Tensor, embedding_ND: torch.Tensor, logits_NK: torch.Tensor) -> torch.Tensor:
        """Sums over the N >= 1 instances of one batch.

        Args:
            inputs: (N, *shape), what forward received.
            embedding_ND: floats (N, D) of the same pass.
            logits_NK: floats (N, K).

        Returns:
            int64 (layout.size,) on the device.
        """
        valid_N = torch.maximum(_largest(embedding_ND), _largest(logits_NK)).isfinite()
        byte_images = inputs.dtype == torch.uint8 and inputs.ndim == 4 and self._input_layout != "F"
        seen = self._read_bytes(inputs) if byte_images else self._read_any(inputs)
        counts, reals_N2 = self._outputs(logits_NK, valid_N)
        reals_NX = torch.cat([reals_N2, *self._inputs(seen)], dim=1)
        real_sums = (reals_NX * FEATURE_SCALE).round_().sum(dim=0).long()
        return torch.cat([self._features(embedding_ND, valid_N), counts, real_sums, self._checks(seen, valid_N)])

    def _features(self, embedding_ND: torch.Tensor, valid_N: torch.Tensor) -> torch.Tensor:
        z_NP = ((embedding_ND.float() - self._center_D) @ self._projection_DP).clamp_(-EMBEDDING_CLIP, EMBEDDING_CLIP)
        phase_NF = z_NP @ self._frequencies_PF
        features_NM = torch.cat([phase_NF.cos(), phase_NF.sin_()], dim=1).mul_(FOURIER_SCALE).round_()
        features_NM = torch.where(valid_N[:, None], features_NM, 0.0)
        if len(features_NM) * FOURIER_SCALE <= _EXACT:
            return features_NM.sum(dim=0).long()
        return features_NM.sum(dim=0, dtype=torch.float64).long()

    def _outputs(self, logits_NK: torch.Tensor, valid_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts of classes, confidence bins, entropy bins; confidence and entropy of each instance, float64 (N, 2)."""
        logs_NK = (logits_NK.double() / self._temperature).log_softmax(dim=1)
        probs_NK = logs_NK.exp()
        confidence_N = probs_NK.amax(dim=1)
        entropy_N = -(probs_NK * logs_NK.clamp_min_(_LOG_TINY)).sum(dim=1)
        places_N3 = torch.stack(
            [
                logits_NK.argmax(dim=1),
                torch.bucketize(confidence_N, self._confidence_edges_E, right=True),
                torch.bucketize(entropy_N, self._entropy_edges_E, right=True),
            ],
            dim=1,
        )
        places_N3 += self._starts_3
        ones_N3 = valid_N.long()[:, None].expand(-1, 3)
        counts = torch.zeros(self._num_counts, dtype=torch.long, device=self._device)
        counts.scatter_add_(0, places_N3.flatten(), ones_N3.flatten())
        return counts, torch.where(valid_N[:, None], torch.stack([confidence_N, entropy_N], dim=1), 0.0)

    def _inputs(self, seen: _Inputs) -> list[torch.Tensor]:
        """Standardised channel means, squares, products and sketch, each (N, ...)."""
        z_NC = seen.means_NC / self._scale_C
        v_NC = seen.squares_NC / self._squared_scale_C
        if seen.nan_N is not None:
            usable_NC = z_NC.isfinite() & v_NC.isfinite()
            z_NC, v_NC = torch.where(usable_NC, z_NC, 0.0), torch.where(usable_NC, v_NC, 1.0)
        z_NC, v_NC = z_NC.clamp(-CHANNEL_CLIP, CHANNEL_CLIP), v_NC.clamp(0.0, CHANNEL_CLIP**2)
        parts = [z_NC, v_NC]
        if len(self._left):
            parts.append(z_NC[:, self._left] * z_NC[:, self._right])
        if self.layout.num_sketch:
            z_NS = ((seen.sketch_NS - self._sketch_mean_S) / self._sketch_scale_S).clamp_(-SKETCH_CLIP, SKETCH_CLIP)
            parts.append(z_NS if seen.nan_N is None else torch.where(z_NS.isfinite(), z_NS, 0.0))
        return parts

    def _read_bytes(self, inputs: torch.Tensor) -> _Inputs:
        if self._bytes is None or self._bytes[0] != inputs.shape[1:]:
            self._bytes = (inputs.shape[1:], ByteImages(inputs.shape, self._input_layout, self._device))
        seen = self._bytes[1].read(inputs)
        means_NC = seen.means_NC - self._offset_C
        squares_NC = seen.squares_NC - self._offset_C * (seen.means_NC + means_NC)
        return _Inputs(means_NC, squares_NC, seen.sketch_NS, seen.low_N, seen.high_N, seen.hash_N, None)

    def _read_any(self, inputs: torch.Tensor) -> _Inputs:
        """Squares are taken about the reference mean, which does not cancel in float32; sums are matrix products."""
        flat_NV = inputs.flatten(1)
        mu_V, select_VC = self._positions(inputs.shape)
        if select_VC is None:  # a table: cheap, and its columns may be large
            means_NC = flat_NV.double() - self._mu_C
            squares_NC = means_NC.square()
        else:
            d_NV = flat_NV - mu_V
            means_NC = self._by_channel(d_NV, select_VC, inputs.shape, flat_NV)
            squares_NC = self._by_channel(d_NV.square_(), select_VC, inputs.shape, flat_NV)
        low_N, high_N, nan_N = _extremes(flat_NV)
        sketch_NS = image_sketch(inputs, self._input_layout, low_N, high_N).double()
        return _Inputs(means_NC, squares_NC, sketch_NS, low_N, high_N, self._hashes(flat_NV, low_N, high_N), nan_N)

    def _by_channel(
        self, values_NV: torch.Tensor, select_VC: torch.Tensor, shape: torch.Size, inputs_NV: torch.Tensor
    ) -> torch.Tensor:
        """Mean over the positions of each channel, float64 (N, C)."""
        if not inputs_NV.is_floating_point():
            return (values_NV @ select_VC).double()
        if self._input_layout == "CHW" and len(shape) > 3:  # floats may be NaN, which a product spreads to all channels
            return values_NV.view(len(values_NV), shape[1], -1).mean(dim=2).double()
        return values_NV.view(len(values_NV), -1, shape[-1]).mean(dim=1).double()

    def _positions(self, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Reference mean of each flat position, and the matrix that averages positions by channel (None for tables).

        Which channel a position belongs to follows the rule of `tuning.base_model.input_moments`.
        """
        if self._known is None or self._known[0] != shape[1:]:
            one = torch.arange(shape[1:].numel()).reshape(shape[1:])
            if self._input_layout == "F" or len(shape) < 3:
                self._known = (shape[1:], self._mu_C, None)
                return self._mu_C, None
            first = self._input_layout == "CHW" and len(shape) > 3
            num = shape[1] if first else shape[-1]
            channel_V = (one // (one.numel() // num) if first else one % num).flatten()
            select_VC = torch.nn.functional.one_hot(channel_V, num).float() * (num / one.numel())
            self._known = (shape[1:], self._mu_C.float()[channel_V.to(self._device)], select_VC.to(self._device))
        return self._known[1], self._known[2]

    def _hashes(self, flat_NV: torch.Tensor, low_N: torch.Tensor, high_N: torch.Tensor) -> torch.Tensor:
        if self._hash is None or self._hash[0] != flat_NV.shape[1]:
            self._hash = (flat_NV.shape[1], *_hash_positions(flat_NV.shape[1], self._device))
        _, positions, weights = self._hash
        # Products and sums row by row: equal inputs agree in every bit, which a matrix product does not promise.
        hash_N = (flat_NV[:, positions].double() * weights).sum(dim=1)
        return hash_N + low_N * 0.123456789 + high_N * 0.987654321

    def _checks(self, seen: _Inputs, valid_N: torch.Tensor) -> torch.Tensor:
        """Counters in the order of CHECKS."""
        nan_N = torch.zeros_like(valid_N) if seen.nan_N is None else seen.nan_N
        outside_N = (seen.low_N < self._low) | (seen.high_N > self._high)
        counts = torch.stack([nan_N, ~valid_N, seen.low_N == seen.high_N, outside_N]).sum(dim=1)
        return torch.cat([counts, self._duplicates(seen.hash_N)])

    def _duplicates(self, hash_N: torch.Tensor) -> torch.Tensor:
        """Inputs that equal another one of their WINDOW_INSTANCES, (1,): a count that rows together may not raise."""
        if len(hash_N) > WINDOW_INSTANCES:
            rest = -len(hash_N) % WINDOW_INSTANCES
            hash_N = torch.nn.functional.pad(hash_N, (0, rest), value=torch.nan)  # which equals nothing
        ordered_BN = hash_N.view(-1, min(len(hash_N), WINDOW_INSTANCES)).sort(dim=1).values
        return (ordered_BN[:, 1:] == ordered_BN[:, :-1]).sum().view(1)


def _largest(values_NX: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each row, NaN where the row holds one; `all` over booleans is several times slower."""
    return values_NX.abs().amax(dim=1)


def _extremes(flat_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Smallest and largest value of each row, NaN ignored, float64; and whether it holds a non-finite value."""
    if not flat_NV.is_floating_point():
        none_N = torch.zeros(len(flat_NV), dtype=torch.bool, device=flat_NV.device)
        return flat_NV.amin(dim=1).double(), flat_NV.amax(dim=1).double(), none_N
    missing_NV = flat_NV.isnan()
    low_N = torch.where(missing_NV, torch.inf, flat_NV).amin(dim=1).double()
    high_N = torch.where(missing_NV, -torch.inf, flat_NV).amax(dim=1).double()
    return low_N, high_N, missing_NV.any(dim=1) | low_N.isinf() | high_N.isinf()


def _hash_positions(width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Up to HASHED_VALUES positions spread over the input, and a random weight for each."""
    count = min(width, HASHED_VALUES)
    positions = torch.linspace(0, width - 1, count, dtype=torch.float64).round().long()
    weights = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(_HASH_SEED))
    return positions.to(device), weights.to(device)
