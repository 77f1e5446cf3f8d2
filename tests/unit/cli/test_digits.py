from pathlib import Path

import numpy as np
import pytest
import torch

from serve_app.digits import prepare as prepare_module
from serve_app.digits.digits_resnet import build
from serve_app.digits.images import Split, fogged_lens, load_images, transformed
from serve_app.digits.prepare import prepare


@pytest.fixture(scope="module")
def parts() -> dict[str, Split]:
    return load_images()


def test_no_image_is_in_two_parts(parts: dict[str, Split]) -> None:
    images = np.concatenate([split.inputs.reshape(len(split.labels), -1) for split in parts.values()])
    assert {name: len(split.labels) for name, split in parts.items()} == {
        "train": 750,
        "reference": 400,
        "traffic": 350,
        "eval": 297,
    }
    assert len(np.unique(images, axis=0)) >= len(images) - 2  # the data set itself repeats hardly any digit


def test_the_same_seed_makes_the_same_drift_and_leaves_torchs_generator_alone(parts: dict[str, Split]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = transformed(parts["eval"], fogged_lens(), 20, seed=3)
    assert torch.equal(torch.rand(1), expected)
    second = transformed(parts["eval"], fogged_lens(), 20, seed=3)
    assert np.array_equal(first.inputs, second.inputs)
    assert first.inputs.shape == (20, 32, 32, 3)
    assert first.inputs.dtype == np.uint8


def test_the_model_takes_images_as_they_are_and_gives_ten_logits() -> None:
    logits = build().eval()(torch.zeros(2, 32, 32, 3, dtype=torch.uint8))
    assert logits.shape == (2, 10)
    assert logits.dtype == torch.float32


def test_a_preparation_that_breaks_leaves_nothing_and_the_next_one_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: Path) -> None:
        (folder / "model.yaml").write_text("half")
        raise RuntimeError("power cut")

    monkeypatch.setattr(prepare_module, "_make", broken)
    with pytest.raises(RuntimeError):
        prepare(tmp_path)
    assert list((tmp_path / "demo").iterdir()) == []
    monkeypatch.setattr(prepare_module, "_make", lambda folder: (folder / "model.yaml").write_text("whole"))
    demo = prepare(tmp_path)
    assert demo.model.read_text() == "whole"
    monkeypatch.setattr(prepare_module, "_make", broken)
    assert prepare(tmp_path) == demo  # made once
