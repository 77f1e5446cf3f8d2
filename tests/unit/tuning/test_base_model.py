"""The published folder builds the same model everywhere, and the embedding is read without disturbing anyone."""

import copy
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from orchestrator.errors import SpecError
from tuning.base_model import build_module, feature_tap, input_moments, resolve_device

FACTORY = """
from torch import nn
class Net(nn.Module):
    WIDTH = {width}
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, self.WIDTH, 3)
        self.bn = nn.BatchNorm2d(self.WIDTH)
        self.fc = nn.Linear(self.WIDTH, 3)
    def forward(self, x):
        return self.fc(self.bn(self.conv(x[:, None].float())).mean((2, 3)))
def build():
    return Net()
"""


@dataclass
class Spec:
    factory: str = "net_of_test:build"
    kwargs: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    features: str | None = None
    num_classes: int = 3


@pytest.fixture
def folder(tmp_path):
    def make(width, name="a"):
        (tmp_path / name / "code").mkdir(parents=True)
        (tmp_path / name / "code" / "net_of_test.py").write_text(FACTORY.format(width=width))
        return tmp_path / name

    return make


def test_weights_stored_in_half_precision_load_into_a_float32_module_in_eval_mode(folder):
    path = folder(4)
    source = build_module(path, Spec())
    half = {k: v.half() if v.is_floating_point() else v for k, v in source.state_dict().items()}
    save_file(half, path / "weights.safetensors")
    module = build_module(path, Spec())
    assert not module.training
    assert module.fc.weight.dtype == torch.float32
    assert torch.equal(module.fc.weight, half["fc.weight"].float())


def test_two_models_whose_code_has_the_same_name_do_not_mix(folder):
    assert build_module(folder(4, "a"), Spec()).conv.out_channels == 4
    assert build_module(folder(6, "b"), Spec()).conv.out_channels == 6


def test_a_factory_of_an_installed_package_works(tmp_path):
    module = build_module(tmp_path, Spec("torchvision.models:resnet18", {"num_classes": 3}))
    assert module.fc.out_features == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("fc.bias"), "missing: fc.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected: extra"),
        (lambda s: s.update({"fc.bias": torch.zeros(5)}), r"wrong shape: fc.bias \(5,\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_tensor_name(folder, change, message):
    path = folder(4)
    state = build_module(path, Spec()).state_dict()
    change(state)
    save_file(state, path / "weights.safetensors")
    with pytest.raises(SpecError, match=message):
        build_module(path, Spec())


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("net_of_test", "package.module:callable"),
        ("absent_of_test:f", "cannot be imported"),
        ("math:absent", "no 'absent'"),
    ],
)
def test_a_factory_that_cannot_be_used_is_named(tmp_path, factory, message):
    with pytest.raises(SpecError, match=message):
        build_module(tmp_path, Spec(factory))


def test_the_embedding_is_the_classifiers_input_unless_the_spec_names_a_module(folder):
    module = build_module(folder(4), Spec())
    x = torch.randn(5, 8, 8)
    tap = feature_tap(module, Spec(), x)
    logits, embedding = tap.call(module, x)
    assert tap.name == "fc"
    torch.testing.assert_close(module.fc(embedding), logits)
    named = feature_tap(module, Spec(features="bn"), x)
    torch.testing.assert_close(named.call(module, x)[1], embedding)
    with pytest.raises(SpecError, match="absent"):
        feature_tap(module, Spec(features="absent"), x)


def test_a_model_without_a_fitting_classifier_uses_its_logits():
    module = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
    tap = feature_tap(module, Spec(num_classes=3), torch.randn(2, 4))
    assert tap.name == ""
    assert tap.call(module, torch.randn(2, 4))[1].shape == (2, 2)


def test_one_tap_serves_a_module_and_its_twins_from_many_threads(folder):
    module = build_module(folder(4), Spec())
    tap = feature_tap(module, Spec(), torch.zeros(1, 8, 8))
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.fc.weight.add_(1)
    wrong = []

    def work(seed):
        which = (module, twin)[seed % 2]
        generator = torch.Generator().manual_seed(seed)
        for _ in range(50):
            logits, embedding = tap.call(which, torch.randn(3, 8, 8, generator=generator))
            if not torch.allclose(which.fc(embedding), logits, atol=1e-5):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert len(module.fc._forward_pre_hooks) == len(twin.fc._forward_pre_hooks) == 1


def test_input_moments_are_per_instance_and_channel():
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    moments = input_moments(images, "HWC")
    np.testing.assert_allclose(moments.means_NC, images.mean((1, 2)), rtol=1e-5)
    first = input_moments(np.moveaxis(images, -1, 1), "CHW")
    np.testing.assert_allclose(first.squares_NC, moments.squares_NC, rtol=1e-5)
    table = input_moments(np.array([[1.0, 2.0], [np.nan, 4.0]]), "F")
    assert table.means_NC.shape == (2, 2)
    assert np.isnan(table.means_NC[1, 0])
    assert moments.max_N.tolist() == images.max((1, 2, 3)).tolist()


def test_an_unknown_device_is_refused():
    with pytest.raises(SpecError, match="tpu"):
        resolve_device("tpu")
