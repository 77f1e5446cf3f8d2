"""The probe on the device agrees with the numpy oracle, one unit per instance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orchestrator.drift.baseline import Baseline, Sample, fit_baseline
from orchestrator.drift.statistics import InputChecks, summarise
from serve_app.byte_images import CENTRE, ByteImages
from serve_app.probe import Probe
from tuning.base_model import input_moments
from tuning.sketch import image_sketch

N_REF, D, K = 300, 24, 5


def images(rng: np.random.Generator, count: int, layout: str, dtype: str) -> np.ndarray:
    shape = {"HWC": (6, 6, 3), "CHW": (3, 6, 6), "F": (9,)}[layout]
    values = rng.normal(100, 30, (count, *shape))
    return (values.clip(0, 255) if dtype == "uint8" else values).astype(dtype)


def outputs(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    return rng.normal(1, 2, (count, D)).astype(np.float32), rng.normal(0, 3, (count, K)).astype(np.float32)


def baseline(layout: str, dtype: str) -> Baseline:
    rng = np.random.default_rng(0)
    inputs = images(rng, N_REF, layout, dtype)
    embedding, logits = outputs(rng, N_REF)
    m = input_moments(inputs, layout)
    sample = Sample(
        embedding_ND=embedding,
        logits_NK=logits,
        channel_means_NC=m.means_NC,
        channel_squares_NC=m.squares_NC,
        input_min_N=m.min_N,
        input_max_N=m.max_N,
        labels_N=rng.integers(0, K, N_REF),
    )
    return fit_baseline("b", "base", sample, None, None, num_channels=m.means_NC.shape[1])


def oracle(base: Baseline, probe: Probe, inputs: np.ndarray, embedding: np.ndarray, logits: np.ndarray) -> np.ndarray:
    values = inputs.astype(np.float64)
    flat = values.reshape(len(values), -1)
    m = input_moments(inputs, probe._input_layout)
    shown = flat if probe._input_layout == "F" else values
    axes = {"HWC": (1, 2), "CHW": (2, 3), "F": ()}[probe._input_layout]
    with np.errstate(invalid="ignore"):
        means, squares = shown.mean(axes), np.square(shown).mean(axes)
    assert means.shape == m.means_NC.shape
    hashes = np.unique(flat, axis=0, return_inverse=True)[1].reshape(-1)
    low = np.where(np.isnan(flat), np.inf, flat).min(1)
    high = np.where(np.isnan(flat), -np.inf, flat).max(1)
    checks = InputChecks(means, squares, low, high, (~np.isfinite(flat)).any(1), hashes)
    return summarise(base, probe.layout, embedding, logits, checks)


@pytest.mark.parametrize("layout", ["HWC", "CHW", "F"])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("count", [1, 32])
def test_probe_agrees_with_the_oracle_to_one_unit_per_instance(layout: str, dtype: str, count: int) -> None:
    base = baseline(layout, dtype)
    probe = Probe(base, layout, torch.device("cpu"))
    rng = np.random.default_rng(1)
    inputs = images(rng, count, layout, dtype)
    embedding, logits = outputs(rng, count)
    got = probe.observe(torch.from_numpy(inputs), torch.from_numpy(embedding), torch.from_numpy(logits)).numpy()
    want = oracle(base, probe, inputs, embedding, logits)
    assert got.dtype == np.int64
    for name, part in probe.layout.slices.items():
        assert np.abs(got[part] - want[part]).max(initial=0) <= count, name
    for name in ("classes", "checks"):
        np.testing.assert_array_equal(got[probe.layout.slices[name]], want[probe.layout.slices[name]])


def test_anomalous_inputs_are_counted_like_the_oracle_counts_them() -> None:
    base = baseline("HWC", "float32")
    probe = Probe(base, "HWC", torch.device("cpu"))
    rng = np.random.default_rng(2)
    inputs = images(rng, 8, "HWC", "float32")
    embedding, logits = outputs(rng, 8)
    inputs[0, 0, 0, 0] = np.nan
    inputs[1] = 7.0  # constant
    inputs[2, 0, 0, 0] = 1e6  # out of range
    inputs[4] = inputs[3]  # duplicates
    inputs[5] = inputs[3]
    logits[0, 1] = np.nan
    embedding[6, 0] = np.inf
    got = probe.observe(torch.from_numpy(inputs), torch.from_numpy(embedding), torch.from_numpy(logits)).numpy()
    checks = got[probe.layout.slices["checks"]].tolist()
    assert checks == [1, 2, 1, 1, 2]
    want = oracle(base, probe, inputs, embedding, logits)
    for name, part in probe.layout.slices.items():
        tolerance = 8 + 1e-6 * np.abs(want[part])  # the outlier's square is a large number in float32
        assert (np.abs(got[part] - want[part]) <= tolerance).all(), name


def test_sums_of_parts_are_the_sum_of_the_whole() -> None:
    base = baseline("HWC", "uint8")
    probe = Probe(base, "HWC", torch.device("cpu"))
    rng = np.random.default_rng(3)
    data = (torch.from_numpy(images(rng, 64, "HWC", "uint8")), *map(torch.from_numpy, outputs(rng, 64)))
    whole = probe.observe(*data)
    parts = sum(probe.observe(*(t[i : i + 16] for t in data)) for i in range(0, 64, 16))
    assert int((whole - parts).abs().max()) <= 1  # matrix products of other shapes may round the last bit otherwise


@pytest.mark.parametrize("layout", ["HWC", "CHW"])
@pytest.mark.parametrize("size", [(8, 8, 3), (33, 29, 3), (32, 32, 1), (12, 40, 4), (5, 7, 2)])
def test_images_of_bytes_are_seen_as_the_general_path_sees_them(layout: str, size: tuple[int, int, int]) -> None:
    height, width, channels = size
    rng = np.random.default_rng(5)
    inputs = rng.normal(90, 40, (9, height, width, channels)).clip(0, 255).astype(np.uint8)
    inputs[1] = 255  # constant
    inputs[2] = inputs[2, :, :, :1]  # grey
    inputs[3, : height // 4, : width // 4] = 7  # a dead corner
    inputs[5] = inputs[4]
    if layout == "CHW":
        inputs = np.moveaxis(inputs, 3, 1).copy()
    batch = torch.from_numpy(inputs)
    seen = ByteImages(batch.shape, layout, torch.device("cpu")).read(batch)
    moments = input_moments(inputs.astype(np.float64), layout)
    centred = (inputs - CENTRE) if layout == "HWC" else np.moveaxis(inputs - CENTRE, 1, 3)
    np.testing.assert_allclose(seen.means_NC.numpy(), centred.mean((1, 2)), rtol=1e-12)
    np.testing.assert_allclose(seen.squares_NC.numpy(), np.square(centred).mean((1, 2)), rtol=1e-12)
    low, high = torch.from_numpy(moments.min_N), torch.from_numpy(moments.max_N)
    want = image_sketch(batch, layout, low, high).numpy()
    np.testing.assert_allclose(seen.sketch_NS.numpy(), want, rtol=1e-4, atol=1e-3)
    assert seen.hash_N[4] == seen.hash_N[5]
    assert len(seen.hash_N.unique()) == 8


def test_equal_images_are_duplicates_within_their_window_only() -> None:
    base = baseline("HWC", "uint8")
    probe = Probe(base, "HWC", torch.device("cpu"))
    rng = np.random.default_rng(6)
    inputs = images(rng, 70, "HWC", "uint8")
    inputs[1], inputs[40], inputs[69] = inputs[0], inputs[0], inputs[68]
    embedding, logits = outputs(rng, 70)
    got = probe.observe(torch.from_numpy(inputs), torch.from_numpy(embedding), torch.from_numpy(logits))
    assert int(got[probe.layout.slices["checks"]][-1]) == 2  # the 40th lies in another window than the first
