"""The same promises on real images; skipped where the CIFAR-10 drift data is not beside the checkout."""

import importlib.util
from functools import cache

import numpy as np
import pytest
from mixture import window

from orchestrator.drift.baseline import Sample, fit_baseline
from orchestrator.drift.diagnosis import diagnose
from orchestrator.drift.monitor import Monitor
from orchestrator.drift.sample import rows_of
from orchestrator.messages import Alarm, Kind
from orchestrator.settings import HealSettings


@cache
def model(folder):
    """The network, and the list its average pooling appends every embedding to."""
    from safetensors.torch import load_file

    spec = importlib.util.spec_from_file_location("cifar_resnet", folder / "cifar_resnet.py")
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    net = code.build().eval()
    net.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in load_file(folder / "resnet18.safetensors").items()}
    )
    embeddings = []
    net.net.avgpool.register_forward_hook(lambda _module, _inputs, output: embeddings.append(output.flatten(1)))
    return net, embeddings


@cache
def sample(folder, name, num, change=None):
    """The first `num` images of a file, changed, as the network sees them."""
    import pyarrow.parquet as pq
    import torch

    from tuning.sketch import image_sketch

    table = pq.read_table(folder / f"{name}.parquet").slice(0, num)
    images = table["input"].combine_chunks().to_numpy_ndarray()
    images = np.ascontiguousarray(images if change is None else CHANGES[change](images))
    net, embeddings = model(folder)
    embeddings.clear()
    with torch.inference_mode():
        logits = torch.cat([net(torch.from_numpy(images[i : i + 64].copy())) for i in range(0, num, 64)])
    x = images.astype(np.float64)
    low, high = x.min(axis=(1, 2, 3)), x.max(axis=(1, 2, 3))
    return Sample(
        torch.cat(embeddings).numpy(),
        logits.numpy(),
        x.mean(axis=(1, 2)),
        (x**2).mean(axis=(1, 2)),
        low,
        high,
        table["label"].to_numpy() if name == "reference" else None,
        image_sketch(torch.from_numpy(images.copy()), "HWC", *(torch.from_numpy(v) for v in (low, high))),
    )


CHANGES = {
    "swapped_channels": lambda x: x[..., ::-1],
    "inverted": lambda x: 255 - x,
    "upside_down": lambda x: x[:, ::-1],
    "grey": lambda x: x[..., 1:2].repeat(3, axis=3),
    "missing_channel": lambda x: x * np.array([1, 1, 0], dtype=np.uint8),
    "blind_cells": lambda x: np.where(np.arange(32)[None, :, None, None] < 16, x, 0).astype(np.uint8),
    "warm_light": lambda x: (x * np.array([1.25, 1.0, 0.7])).clip(0, 255).astype(np.uint8),
}


def diagnosed(folder, name, change, num=400):
    baseline = fit_baseline("b", "base", sample(folder, "reference", 1600), None, None, 3)
    w = window(baseline, sample(folder, f"{name}.traffic", num, change))
    return diagnose(baseline, w, Alarm("global", "base", 1e7, 1e6, 0.0, 1.0, 64), 2, HealSettings())


@pytest.mark.parametrize("name", ["clean", "gaussian_noise"])
@pytest.mark.parametrize("change", ["swapped_channels", "inverted", "upside_down", "grey"])
def test_a_broken_pipeline_is_named_also_on_top_of_a_drift(shared_data, name, change):
    found = diagnosed(shared_data, name, change)
    assert found.kind is Kind.DATA_QUALITY, found.reason
    assert found.evidence["check"] == {"inverted": "turned", "upside_down": "turned"}.get(change, change)


@pytest.mark.parametrize("change", ["missing_channel", "blind_cells"])
def test_missing_parts_are_named(shared_data, change):
    found = diagnosed(shared_data, "clean", change)
    assert (found.kind, found.evidence["check"]) == (Kind.DATA_QUALITY, change)


def test_a_coloured_light_is_no_swap(shared_data):
    assert diagnosed(shared_data, "clean", "warm_light").kind is Kind.COVARIATE_HARMFUL


@pytest.mark.parametrize("name", ["fog", "contrast", "glass_blur", "defocus_blur"])
def test_corruptions_of_the_world_are_harmful_and_not_broken(shared_data, name):
    assert diagnosed(shared_data, name, None).kind is Kind.COVARIATE_HARMFUL


@pytest.mark.parametrize("name", ["gaussian_noise", "contrast"])
def test_clean_images_raise_no_alarm_and_corrupted_ones_do_within_128(shared_data, name):
    baseline = fit_baseline("b", "base", sample(shared_data, "reference", 800), None, None, 3)
    monitor = Monitor(1_000_000)
    monitor.set_baseline(baseline)
    clean = sample(shared_data, "clean.traffic", 320)
    for i in range(0, 320, 32):
        monitor.absorb("r0", window(baseline, rows_of(clean, slice(i, i + 32)), float(i)))
    assert monitor.alarm() is None
    drifted = sample(shared_data, f"{name}.traffic", 256)
    for i in range(0, 256, 32):
        monitor.absorb("r0", window(baseline, rows_of(drifted, slice(i, i + 32)), 1000.0 + i))
    alarm = monitor.alarm()
    assert alarm is not None
    assert alarm.raised_s - 1000.0 < 128
    found = diagnose(baseline, monitor.since(alarm.onset_s, "base"), alarm, 2, HealSettings())
    assert found.kind is Kind.COVARIATE_HARMFUL
