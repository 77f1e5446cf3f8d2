"""LoRA on attention means the same here and in PEFT, on the fast path and on the slow one."""

import copy
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from adapters import gap, read, trained, write
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.models import VisionTransformer

from orchestrator.errors import AdapterError
from orchestrator.messages import Placement, TrialConfig
from tuning.adapter import attach, check_adapter, merged_twin, plan_targets

BLOCK = "encoder.layers.encoder_layer_{}"
FIRST = {"vit": BLOCK.format(0) + ".self_attention", "encoder": "layers.0.self_attn"}


class Encoder(nn.Module):
    """torch's own encoder layers over the rows of an image; they read the attention's weights past its forward."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(32, 16)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        h = self.embed(x.flatten(1, 2))
        for layer in self.layers:
            h = layer(h)
        return self.head(h.mean(1))


class CrossAttention(nn.Module):
    """Keys and values of another width than the queries: three weights instead of a packed one."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, kdim=8, vdim=8, batch_first=True)


def build(name):
    torch.manual_seed(0)
    if name == "encoder":
        return Encoder().eval()
    model = VisionTransformer(32, 8, num_layers=2, num_heads=4, hidden_dim=16, mlp_dim=32, num_classes=4)
    nn.init.normal_(model.heads.head.weight)  # zeros otherwise, and all logits with them
    return model.eval()


def images(n=4):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@contextmanager
def slow_path():
    """PEFT's wrapped attention gives an encoder layer's fast path the base's weights, without the adapter."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def lora_keys(name):
    """PEFT's tensor keys of the first attention."""
    layers = (FIRST[name], f"{FIRST[name]}.base_layer.out_proj")
    return {f"base_model.model.{layer}.lora_{part}.weight" for layer in layers for part in "AB"}


@pytest.mark.parametrize("placement", [Placement.ALL, Placement.EARLY])
@pytest.mark.parametrize("name", ["vit", "encoder"])
def test_peft_loads_an_exported_adapter_on_attention_and_gives_the_same_logits(name, placement, tmp_path):
    peft = pytest.importorskip("peft")
    module = build(name)
    config, tensors = trained(module, placement).export()
    assert lora_keys(name) <= tensors.keys()
    write(tmp_path, config, tensors)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(module), str(tmp_path)).eval()
    assert {k for k in peft.get_peft_model_state_dict(loaded) if "lora_" in k} == {k for k in tensors if "lora_" in k}
    with slow_path():
        assert gap(merged_twin(module, config, tensors), loaded, images()) <= 1e-5
    assert gap(merged_twin(module, config, tensors), loaded.merge_and_unload(), images()) <= 1e-5


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["vit", "encoder"])
def test_an_adapter_on_attention_written_by_peft_merges_to_the_same_logits(name, rslora, tmp_path):
    peft = pytest.importorskip("peft")
    module = build(name)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["self_attention" if name == "vit" else "self_attn", "head"],
        rank_pattern={FIRST[name]: 2},
        alpha_pattern={FIRST[name]: 3},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    model = peft.get_peft_model(copy.deepcopy(module), config).eval()
    model.save_pretrained(str(tmp_path))
    twin = merged_twin(module, *read(tmp_path))
    with slow_path():
        assert gap(twin, model, images()) <= 1e-5
    assert gap(twin, module, images()) > 1e-3


@pytest.mark.parametrize(
    ("name", "native"), [("vit", "_native_multi_head_attention"), ("encoder", "_transformer_encoder_layer_fwd")]
)
def test_the_fast_path_sees_the_adapter_as_training_and_the_merged_twin_do(name, native, monkeypatch):
    module = build(name)
    handle = trained(module, Placement.ALL)
    fast, calls = getattr(torch, native), []
    monkeypatch.setattr(torch, native, lambda *args, **kwargs: calls.append(native) or fast(*args, **kwargs))
    with torch.no_grad():
        slow = handle.module.train()(images())
        assert not calls
        quick = handle.module.eval()(images())
        assert len(calls) == 2
        twin = merged_twin(module, *handle.export())(images())
        assert len(calls) == 4
    torch.testing.assert_close(quick, slow, atol=1e-5, rtol=0)
    torch.testing.assert_close(twin, slow, atol=1e-5, rtol=0)
    assert gap(handle.module, module, images()) > 1e-3


@pytest.mark.parametrize("name", ["vit", "encoder"])
def test_a_training_step_reaches_both_projections_and_leaves_the_base_bit_identical(name):
    module = build(name)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    handle = trained(module, Placement.ALL)
    handle.module.train()
    start = handle.export()[1]
    optimiser = torch.optim.AdamW(handle.parameters(), lr=1e-3)
    cross_entropy(handle.module(images()), torch.arange(4)).backward()
    optimiser.step()
    end = handle.export()[1]
    assert all((start[k] != end[k]).all() for k in lora_keys(name))
    attention = handle.module.get_submodule(FIRST[name])
    kept = attention.parametrizations.in_proj_weight.original, attention.out_proj.parametrizations.weight.original
    assert torch.equal(kept[0], before[f"{FIRST[name]}.in_proj_weight"])
    assert torch.equal(kept[1], before[f"{FIRST[name]}.out_proj.weight"])
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


@pytest.mark.parametrize("name", ["vit", "encoder"])
def test_a_fresh_adapter_on_attention_changes_no_output(name):
    module = build(name)
    handle = attach(copy.deepcopy(module), TrialConfig(Placement.ALL, adapter_rank=8))
    assert gap(handle.module.eval(), module, images()) == 0
    assert gap(merged_twin(module, *handle.export()), module, images()) == 0


def test_a_twin_shares_what_attention_keeps():
    module = build("vit")
    twin = merged_twin(module, *trained(module, Placement.EARLY).export())
    state = module.state_dict()
    changed = {k for k, v in twin.state_dict().items() if v.data_ptr() != state[k].data_ptr()}
    first = BLOCK.format(0)
    norms = {f"{norm}.{part}" for norm in plan_targets(module, Placement.EARLY).saved for part in ("weight", "bias")}
    projections = {f"{FIRST['vit']}.{weight}" for weight in ("in_proj_weight", "out_proj.weight")}
    assert changed == norms | projections | {"conv_proj.weight", f"{first}.mlp.0.weight"}


def test_early_takes_the_first_third_of_the_layers_with_attention_as_one_of_them():
    everything = plan_targets(build("vit"), Placement.ALL).lora
    blocks = [f"{BLOCK.format(i)}.{layer}" for i in range(2) for layer in ("self_attention", "mlp.0", "mlp.3")]
    assert everything == ("conv_proj", *blocks, "heads.head")
    assert plan_targets(build("vit"), Placement.EARLY).lora == everything[:3]


@pytest.mark.parametrize("name", ["vit", "encoder"])
def test_a_checkpoint_restores_attention(name):
    module = build(name)
    handle = trained(module, Placement.ALL)
    fresh = attach(copy.deepcopy(module), TrialConfig(Placement.ALL, adapter_rank=4, seed=9))
    fresh.load(handle.export()[1])
    assert gap(fresh.module.eval(), handle.module.eval(), images()) == 0


def test_attention_with_separate_weights_is_left_out_and_refused_by_name():
    alone, module = CrossAttention(), nn.Sequential(CrossAttention(), nn.Linear(16, 4))
    assert plan_targets(module, Placement.ALL).lora == ("1",)
    with pytest.raises(AdapterError, match="q, k and v in one weight"):
        plan_targets(alone, Placement.ALL)
    config = trained(build("encoder"), Placement.ALL).config | {
        "target_modules": ["attention"],
        "modules_to_save": None,
    }
    with pytest.raises(AdapterError, match=r"q, k and v in one weight; 0\.attention is"):
        check_adapter(module, config, {})


IN_A, OUT_A, IN_B, OUT_B = sorted(lora_keys("vit"), key=lambda k: ("lora_B" in k, "out_proj" in k))


def one_projection_of_three(config, tensors):
    tensors[IN_B] = tensors[IN_B][:16]


def in_for_out(config, tensors):
    tensors[OUT_B] = tensors[IN_B]


def wide_a(config, tensors):
    tensors[OUT_A] = np.zeros((4, 48), np.float32)


def lost_out(config, tensors):
    del tensors[OUT_A]


def integers(config, tensors):
    tensors[IN_A] = tensors[IN_A].astype(np.int64)


def out_alone(config, tensors):
    config["target_modules"] = [f"{FIRST['vit']}.out_proj"]


def saved_inside(config, tensors):
    config["modules_to_save"] = [f"{FIRST['vit']}.out_proj"]


def later_peft(config, tensors):
    config["peft_version"] = "0.22.0.dev0@3f2a9c"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (one_projection_of_three, r"self_attention.lora_B.weight must have shape \(48, 4\); got \(16, 4\)"),
        (in_for_out, r"out_proj.lora_B.weight must have shape \(16, 4\); got \(48, 4\)"),
        (wide_a, r"out_proj.lora_A.weight must have shape \(4, 16\)"),
        (lost_out, r"lacks tensor .*out_proj.lora_A"),
        (integers, "self_attention.lora_A.weight must be floating; got int64"),
        (out_alone, "must name the attention"),
        (saved_inside, "saved whole, not both"),
        (later_peft, r"PEFT <= 0.21.2 wrote it; got 0.22.0"),
    ],
)
def test_an_adapter_that_does_not_fit_attention_is_refused_by_name(damage, named):
    module = build("vit")
    config, tensors = trained(module, Placement.ALL).export()
    check_adapter(module, config, tensors)
    damage(config, tensors)
    with pytest.raises(AdapterError, match=named):
        check_adapter(module, config, tensors)
