"""The drift statistics of one forward pass, on the device it ran on.

Called by `Healable` after a batch was answered. Gives the int64 vector that `orchestrator.drift.statistics.summarise`
gives (its oracle in numpy float64), up to one unit per instance. Nothing here waits for the device: no `.item()`, no
boolean indexing, no `bincount`; the sums stay there until a window is taken.
"""

from __future__ import annotations

import numpy as np
import torch

from orchestrator.drift.baseline import Baseline
from orchestrator.drift.statistics import CHANNEL_CLIP, EMBEDDING_CLIP, NUM_BINS, SKETCH_CLIP
from orchestrator.settings import FEATURE_SCALE
from tuning.sketch import image_sketch

HASHED_VALUES = 512  # of an input, beside its extremes, that two inputs must share to count as duplicates
_HASH_SEED = 977


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
        self._known: tuple[torch.Size, torch.Tensor, torch.Tensor | None] | None = None
        self._hash: tuple[int, torch.Tensor, torch.Tensor] | None = None

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
        valid_N = embedding_ND.isfinite().all(dim=1) & logits_NK.isfinite().all(dim=1)
        flat_NV = inputs.flatten(1)
        parts = {"features": self._features(embedding_ND, valid_N)}
        parts |= self._outputs(logits_NK, valid_N)
        parts |= self._channels(flat_NV, inputs.shape)
        low_N, high_N, nan_N = _extremes(flat_NV)
        parts["sketch"] = self._sketch(inputs, low_N, high_N)
        parts["checks"] = self._checks(flat_NV, valid_N, low_N, high_N, nan_N)
        return torch.cat([parts[name] for name in self.layout.slices])

    def _features(self, embedding_ND: torch.Tensor, valid_N: torch.Tensor) -> torch.Tensor:
        z_NP = ((embedding_ND.float() - self._center_D) @ self._projection_DP).clamp(-EMBEDDING_CLIP, EMBEDDING_CLIP)
        phase_NF = z_NP @ self._frequencies_PF
        features_NM = torch.cat([phase_NF.cos(), phase_NF.sin()], dim=1)
        return _quantised_sum(torch.where(valid_N[:, None], features_NM, 0.0))

    def _outputs(self, logits_NK: torch.Tensor, valid_N: torch.Tensor) -> dict[str, torch.Tensor]:
        probs_NK = (logits_NK.double() / self._temperature).softmax(dim=1)
        confidence_N = probs_NK.amax(dim=1)
        entropy_N = -(probs_NK * probs_NK.clamp_min(1e-30).log()).sum(dim=1)
        ones_N = valid_N.long()
        return {
            "classes": _counts(logits_NK.argmax(dim=1), ones_N, self.layout.num_classes),
            "confidence": _histogram(confidence_N, self._confidence_edges_E, ones_N),
            "entropy": _histogram(entropy_N, self._entropy_edges_E, ones_N),
            "confidence_sum": _quantised_sum(torch.where(valid_N, confidence_N, 0.0)[:, None]),
        }

    def _channels(self, flat_NV: torch.Tensor, shape: torch.Size) -> dict[str, torch.Tensor]:
        """Squares are taken about the reference mean, which does not cancel in float32; sums are matrix products."""
        mu_V, select_VC = self._positions(shape)
        if select_VC is None:  # a table: cheap, and its columns may be large
            z_NC = (flat_NV.double() - self._mu_C) / self._scale_C
            v_NC = z_NC.square()
        else:
            d_NV = flat_NV - mu_V
            z_NC = self._by_channel(d_NV, select_VC, shape, flat_NV) / self._scale_C
            v_NC = self._by_channel(d_NV.square_(), select_VC, shape, flat_NV) / self._scale_C.square()
        usable_NC = z_NC.isfinite() & v_NC.isfinite()
        z_NC = torch.where(usable_NC, z_NC.clamp(-CHANNEL_CLIP, CHANNEL_CLIP), 0.0)
        v_NC = torch.where(usable_NC, v_NC.clamp(0.0, CHANNEL_CLIP**2), 1.0)
        return {
            "channel_means": _quantised_sum(z_NC),
            "channel_squares": _quantised_sum(v_NC),
            "channel_products": _quantised_sum(z_NC[:, self._left] * z_NC[:, self._right]),
        }

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

    def _sketch(self, inputs: torch.Tensor, low_N: torch.Tensor, high_N: torch.Tensor) -> torch.Tensor:
        if not self.layout.num_sketch:
            return torch.zeros(0, dtype=torch.int64, device=self._device)
        sketch_NS = image_sketch(inputs, self._input_layout, low_N, high_N)
        z_NS = ((sketch_NS.double() - self._sketch_mean_S) / self._sketch_scale_S).clamp(-SKETCH_CLIP, SKETCH_CLIP)
        return _quantised_sum(torch.where(z_NS.isfinite(), z_NS, 0.0))

    def _checks(
        self,
        flat_NV: torch.Tensor,
        valid_N: torch.Tensor,
        low_N: torch.Tensor,
        high_N: torch.Tensor,
        nan_N: torch.Tensor,
    ) -> torch.Tensor:
        if self._hash is None or self._hash[0] != flat_NV.shape[1]:
            self._hash = (flat_NV.shape[1], *_hash_positions(flat_NV.shape[1], self._device))
        _, positions, weights = self._hash
        # Products and sums row by row: equal inputs agree in every bit, which a matrix product does not promise.
        hash_N = (flat_NV[:, positions].double() * weights).sum(dim=1) + low_N * 0.123456789 + high_N * 0.987654321
        ordered_N = hash_N.sort().values
        return torch.stack(
            [
                nan_N.sum(),
                (~valid_N).sum(),
                (low_N == high_N).sum(),
                ((low_N < self._low) | (high_N > self._high)).sum(),
                (ordered_N[1:] == ordered_N[:-1]).sum(),
            ]
        )


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


def _quantised_sum(values_NX: torch.Tensor) -> torch.Tensor:
    return (values_NX * FEATURE_SCALE).round().long().sum(dim=0)


def _counts(index_N: torch.Tensor, ones_N: torch.Tensor, size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.long, device=index_N.device).scatter_add_(0, index_N, ones_N)


def _histogram(values_N: torch.Tensor, edges_E: torch.Tensor, ones_N: torch.Tensor) -> torch.Tensor:
    return _counts(torch.bucketize(values_N, edges_E, right=True), ones_N, NUM_BINS)
