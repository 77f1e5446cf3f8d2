"""An adapter means the same here and in PEFT, never touches its base, and is refused when it does not fit."""

import copy

import numpy as np
import pytest
import torch
from adapters import gap, read, trained, write
from torch import nn

from orchestrator.errors import AdapterError
from orchestrator.messages import Placement, TrialConfig
from tuning.adapter import attach, check_adapter, merged_twin, plan_targets


class ConvNet(nn.Sequential):
    """A flat Sequential: its numeric names collide under PEFT's name endings (`1` and `11`)."""

    def __init__(self):
        super().__init__(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4)),
        )


def build(name):
    torch.manual_seed(0)
    if name == "convnet":
        return ConvNet().eval()
    from torchvision.models import resnet18

    return resnet18(num_classes=4).eval()


PLACEMENTS = [p for p in Placement if p is not Placement.LOGIT_CORRECTION]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["convnet", "resnet18"])
def test_peft_loads_an_exported_adapter_and_gives_the_same_logits(name, placement, tmp_path):
    peft = pytest.importorskip("peft")
    module = build(name)
    x = torch.randn(4, 3, 32, 32)
    handle = trained(module, placement)
    config, tensors = handle.export()
    write(tmp_path, config, tensors)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(module), str(tmp_path)).eval()
    twin = merged_twin(module, config, tensors)
    assert gap(twin, loaded, x) <= 1e-5
    assert gap(twin, handle.module.eval(), x) <= 1e-5
    assert gap(twin, module, x) > 1e-3


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["convnet", "resnet18"])
def test_an_adapter_written_by_peft_merges_to_the_same_logits(name, rslora, tmp_path):
    peft = pytest.importorskip("peft")
    module = build(name)
    conv, saved = {"convnet": ("3", "4"), "resnet18": ("layer1.0.conv1", "bn2")}[name]
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=[conv, "fc" if name == "resnet18" else "8"],
        modules_to_save=[saved],
        rank_pattern={conv: 2},
        alpha_pattern={conv: 3},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    model = peft.get_peft_model(copy.deepcopy(module), config).eval()
    with torch.no_grad():
        for key, value in model.named_buffers():
            if "modules_to_save" in key and value.is_floating_point():
                value.add_(0.1)
    model.save_pretrained(str(tmp_path))
    twin = merged_twin(module, *read(tmp_path))
    x = torch.randn(4, 3, 32, 32)
    assert gap(twin, model, x) <= 1e-5
    assert gap(twin, module, x) > 1e-3


def test_a_twin_shares_every_unchanged_tensor_and_leaves_the_base_bit_identical():
    module = build("resnet18")
    before = {k: v.clone() for k, v in module.state_dict().items()}
    twin = merged_twin(module, *trained(module, Placement.EARLY).export())
    changed = [k for k, v in twin.state_dict().items() if v.data_ptr() != module.state_dict()[k].data_ptr()]
    touched = plan_targets(module, Placement.EARLY)
    assert {k.rpartition(".")[0] for k in changed} == {*touched.lora, *touched.saved}
    twin.train()(torch.randn(4, 3, 32, 32))
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_a_fresh_adapter_changes_no_output():
    module = build("convnet")
    x = torch.randn(4, 3, 32, 32)
    handle = attach(copy.deepcopy(module), TrialConfig(Placement.ALL, adapter_rank=8))
    assert gap(handle.module.eval(), module, x) == 0
    assert gap(merged_twin(module, *handle.export()), module, x) == 0


def test_a_logit_correction_moves_the_logits_by_exactly_its_offset():
    module = build("convnet")
    handle = attach(copy.deepcopy(module), TrialConfig(Placement.LOGIT_CORRECTION))
    offset = np.array([1.0, -1.0, 0.5, 0.0], dtype=np.float32)
    handle.shift_bias(offset)
    x = torch.randn(4, 3, 32, 32)
    twin = merged_twin(module, *handle.export())
    with torch.no_grad():
        torch.testing.assert_close(twin(x) - module(x), torch.from_numpy(offset).expand(4, 4), atol=1e-5, rtol=0)


def test_a_checkpoint_restores_every_tensor():
    module = build("convnet")
    tensors = trained(module, Placement.ALL).export()[1]
    fresh = attach(copy.deepcopy(module), TrialConfig(Placement.ALL, adapter_rank=4))
    fresh.load(tensors)
    restored = fresh.export()[1]
    assert all(np.array_equal(restored[k], v) for k, v in tensors.items())


def break_shape(config, tensors):
    tensors["base_model.model.3.lora_A.weight"] = np.zeros((4, 8, 1, 1), np.float32)


def break_rank(config, tensors):
    config["r"] = 5


def break_value(config, tensors):
    tensors["base_model.model.3.lora_B.weight"][0] = np.nan


def break_dtype(config, tensors):
    tensors["base_model.model.3.lora_B.weight"] = tensors["base_model.model.3.lora_B.weight"].astype(np.int64)


def drop_key(config, tensors):
    del tensors["base_model.model.4.running_var"]


def add_key(config, tensors):
    tensors["base_model.model.99.weight"] = np.zeros(3, np.float32)


def other_kind(config, tensors):
    config["peft_type"] = "IA3"


def dora(config, tensors):
    config["use_dora"] = True


def pissa(config, tensors):
    config["init_lora_weights"] = "pissa"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (break_shape, "3.lora_A.weight"),
        (break_rank, "lora_"),
        (break_value, "3.lora_B.weight"),
        (break_dtype, "3.lora_B.weight"),
        (drop_key, "4.running_var"),
        (add_key, "99.weight"),
        (other_kind, "IA3"),
        (dora, "use_dora"),
        (pissa, "pissa"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(damage, named):
    module = build("convnet")
    config, tensors = trained(module, Placement.ALL).export()
    check_adapter(module, config, tensors)
    damage(config, tensors)
    with pytest.raises(AdapterError, match=named):
        check_adapter(module, config, tensors)


def test_a_model_without_norm_layers_has_no_norm_placement():
    with pytest.raises(AdapterError, match="normalisation"):
        plan_targets(nn.Linear(3, 2), Placement.NORM)
