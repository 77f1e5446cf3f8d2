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
from orchestrator.messages import Kind
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
def sample(folder, name, num):
    """The first `num` images of a file as the network sees them."""
    import pyarrow.parquet as pq
    import torch

    table = pq.read_table(folder / f"{name}.parquet").slice(0, num)
    images = table["input"].combine_chunks().to_numpy_ndarray()
    net, embeddings = model(folder)
    embeddings.clear()
    with torch.inference_mode():
        logits = torch.cat([net(torch.from_numpy(images[i : i + 64].copy())) for i in range(0, num, 64)])
    x = images.astype(np.float64)
    return Sample(
        torch.cat(embeddings).numpy(),
        logits.numpy(),
        x.mean(axis=(1, 2)),
        (x**2).mean(axis=(1, 2)),
        x.min(axis=(1, 2, 3)),
        x.max(axis=(1, 2, 3)),
        table["label"].to_numpy() if name == "reference" else None,
    )


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
