"""What `serve_app:app` accepts, and what it refuses in one line before anything is deployed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

import serve_app
from orchestrator import launch
from orchestrator.errors import SpecError
from orchestrator.launch import AppArgs, app


@pytest.fixture
def spec(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may break."""
    return Path(shutil.copytree(tiny_model.parent, tmp_path / "model")) / "model.yaml"


def build(spec: Path, **args: object) -> object:
    return app(AppArgs(model=str(spec), storage=str(spec.parent.parent / "records"), **args))


def test_gpus_are_an_option_and_none_is_asked_for_by_default(spec: Path) -> None:
    for num_gpus, device in ((0, "cpu"), (0.5, "cuda")):
        deployment = build(spec, num_gpus=num_gpus)._bound_deployment
        assert deployment.ray_actor_options["num_gpus"] == num_gpus
        assert deployment.init_kwargs["device"] == device


@pytest.mark.parametrize(
    ("line", "change", "message"),
    [
        ("factory: stripes_net:build", "factory: nowhere:build", "factory 'nowhere:build' cannot be imported"),
        ("shape: [16, 16, 3]", "shape: [8, 8, 4]", "forward must take input UINT8 .*4.*it raised RuntimeError"),
        ("diagonal, checker]", "diagonal]", r"forward must return logits \[N, 3\].*got \[2, 4\]"),
    ],
)
def test_model_that_does_not_fit_its_spec_is_refused(spec: Path, line: str, change: str, message: str) -> None:
    spec.write_text(spec.read_text().replace(line, change))
    with pytest.raises(SpecError, match=message):
        build(spec)


def test_weights_that_do_not_fit_are_refused_by_name(spec: Path) -> None:
    file = spec.parent / "weights.safetensors"
    tensors = load_file(file)
    del tensors["head.bias"]
    save_file(tensors | {"head.weight": torch.zeros(7, 32), "extra": torch.zeros(1)}, file)
    with pytest.raises(SpecError, match=r"missing: head.bias; unexpected: extra; wrong shape: head.weight \(7, 32\)"):
        build(spec)


def test_pickle_under_the_name_of_safetensors_is_refused(spec: Path) -> None:
    torch.save({"head.bias": torch.zeros(4)}, spec.parent / "weights.safetensors")
    with pytest.raises(SpecError, match="holds a zip or pickle"):
        build(spec)


@pytest.mark.parametrize("args", [{"replicas": 0}, {"mode": "wild"}, {"num_gpus": -1}, {"nonsense": 1}])
def test_argument_out_of_range_is_refused_by_name(args: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(args))):
        AppArgs(**args)


def test_default_application_is_bound_and_the_builder_is_a_function(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEAL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(launch, "_demo_model", lambda: spec)  # else the digits model is trained here
    assert serve_app.app is app
    assert type(serve_app.default_app).__name__ == "Application"
    with pytest.raises(AttributeError, match="nothing"):
        _ = serve_app.nothing


def test_serve_run_validates_its_arguments_into_the_applications_own(spec: Path) -> None:
    """`serve run serve_app:app key=value` calls a builder in this way."""
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve.deployment import Application

    with pytest.raises(ValidationError, match="replcas"):
        call_user_app_builder_with_args_if_necessary(serve_app.app, {"replcas": "3"})
    given = {"model": str(spec), "storage": str(spec.parent.parent / "records"), "replicas": "3", "mode": "auto"}
    built = call_user_app_builder_with_args_if_necessary(serve_app.app, given)
    assert isinstance(built, Application)
    assert built._bound_deployment.num_replicas == 3
