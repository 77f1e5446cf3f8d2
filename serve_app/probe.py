"""The drift statistics of one forward pass, on the device it ran on.

Called by `Healable` after a batch was answered. Gives the int64 vector that `orchestrator.drift.statistics.summarise`
gives (its oracle in numpy float64), up to one unit per instance. Nothing here waits for the device: no `.item()`, no
boolean indexing, no `bincount`; the sums stay there until a window is taken.
"""

from __future__ import annotations

import numpy as np
import torch

from orchestrator.drift.baseline import Baseline
from orchestrator.drift.statistics import CHANNEL_CLIP, EMBEDDING_CLIP, NUM_BINS, Layout
from orchestrator.settings import FEATURE_SCALE

_HASH_SEED = 977


class Probe:
    """Reduces batches under one baseline.

    Args:
        baseline: of the digest that answers.
        layout: the spec's input layout: HWC, CHW or F.
        device: where the model runs.
    """

    def __init__(self, baseline: Baseline, layout: str, device: torch.device) -> None:
        self.layout = Layout(int(baseline.num_classes), int(baseline.num_channels))
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
        pairs = self.layout.pairs
        self._left = torch.tensor([i for i, _ in pairs], dtype=torch.long, device=device)
        self._right = torch.tensor([j for _, j in pairs], dtype=torch.long, device=device)
        self._weights: torch.Tensor | None = None

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
        parts = {"features": self._features(embedding_ND, valid_N)}
        parts |= self._outputs(logits_NK, valid_N)
        values = inputs if inputs.is_floating_point() else inputs.float()
        parts |= self._channels(values)
        parts["checks"] = self._checks(values, valid_N)
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

    def _per_channel(self, values: torch.Tensor) -> torch.Tensor:
        """(N, positions, C), by the same rule as `tuning.base_model.input_moments`."""
        if self._input_layout == "F" or values.ndim < 3:
            return values.reshape(len(values), 1, -1)
        if self._input_layout == "CHW" and values.ndim > 3:
            return values.flatten(2).transpose(1, 2)
        return values.reshape(len(values), -1, values.shape[-1])

    def _channels(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Standardised before they are averaged: squares about the mean do not cancel in float32."""
        x_NPC = self._per_channel(values)
        if x_NPC.shape[1] == 1:
            x_NPC = x_NPC.double()  # a table: cheap, and its columns may be large
        d_NPC = (x_NPC - self._mu_C.to(x_NPC.dtype)) / self._scale_C.to(x_NPC.dtype)
        z_NC, v_NC = d_NPC.mean(dim=1).double(), d_NPC.square().mean(dim=1).double()
        usable_NC = z_NC.isfinite() & v_NC.isfinite()
        z_NC = torch.where(usable_NC, z_NC.clamp(-CHANNEL_CLIP, CHANNEL_CLIP), 0.0)
        v_NC = torch.where(usable_NC, v_NC.clamp(0.0, CHANNEL_CLIP**2), 1.0)
        return {
            "channel_means": _quantised_sum(z_NC),
            "channel_squares": _quantised_sum(v_NC),
            "channel_products": _quantised_sum(z_NC[:, self._left] * z_NC[:, self._right]),
        }

    def _checks(self, values: torch.Tensor, valid_N: torch.Tensor) -> torch.Tensor:
        flat_NV = values.flatten(1)
        missing_NV = flat_NV.isnan()
        low_N = torch.where(missing_NV, torch.inf, flat_NV).amin(dim=1)
        high_N = torch.where(missing_NV, -torch.inf, flat_NV).amax(dim=1)
        hash_N = (flat_NV * self._hash_weights(flat_NV.shape[1])).sum(dim=1).sort().values
        return torch.stack(
            [
                (~flat_NV.isfinite()).any(dim=1).sum(),
                (~valid_N).sum(),
                (low_N == high_N).sum(),
                ((low_N < self._low) | (high_N > self._high)).sum(),
                (hash_N[1:] == hash_N[:-1]).sum(),
            ]
        )

    def _hash_weights(self, width: int) -> torch.Tensor:
        """A random projection in float64: equal inputs agree in every bit, others practically never."""
        if self._weights is None or len(self._weights) != width:
            drawn = torch.randn(width, dtype=torch.float64, generator=torch.Generator().manual_seed(_HASH_SEED))
            self._weights = drawn.to(self._device)
        return self._weights


def _quantised_sum(values_NX: torch.Tensor) -> torch.Tensor:
    return (values_NX * FEATURE_SCALE).round().long().sum(dim=0)


def _counts(index_N: torch.Tensor, ones_N: torch.Tensor, size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.long, device=index_N.device).scatter_add_(0, index_N, ones_N)


def _histogram(values_N: torch.Tensor, edges_E: torch.Tensor, ones_N: torch.Tensor) -> torch.Tensor:
    return _counts(torch.bucketize(values_N, edges_E, right=True), ones_N, NUM_BINS)
