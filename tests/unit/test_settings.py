"""Every setting is documented, on the page that the code generates; a wrong one is refused by name."""

from dataclasses import fields
from pathlib import Path

import pytest

from orchestrator.errors import SpecError
from orchestrator.settings import HealSettings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "settings.md"


def test_the_settings_page_is_what_the_code_says() -> None:
    from orchestrator.cli.settings_page import settings_page

    again = "python -m orchestrator.cli.settings_page > docs/settings.md"
    assert PAGE.read_text() == settings_page(), f"docs/settings.md is out of date; run: {again}"


def test_every_setting_and_argument_has_a_description() -> None:
    from orchestrator.launch import AppArgs

    for item in fields(HealSettings):
        assert item.metadata.get("doc"), item.name
    for name, field in AppArgs.model_fields.items():
        assert field.description, name
        assert f"`{name}`" in PAGE.read_text(), name


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("colour", 1, "unknown setting"),
        ("num_trials", 0, ">= 1"),
        ("num_trials", 2.5, "whole number"),
        ("num_trials", True, "whole number"),
        ("bake_s", -1, ">= 0"),
        ("bake_s", float("nan"), "finite"),
        ("bake_s", "soon", "finite"),
        ("max_clean_loss", 1.5, r"\[0, 1\]"),
        ("heartbeat_s", 0, "> 0"),
        ("mode", "sometimes", "observe, approve, auto"),
        ("labels", "some", "none, all or a number"),
        ("without_labels", "maybe", "hold or provisional"),
        ("trial_device", "tpu", "cuda"),
        ("buffer_instances", 10, "min_buffer_instances"),
    ],
)
def test_a_wrong_setting_is_refused_by_name_rule_and_value(name: str, value: object, said: str) -> None:
    with pytest.raises(SpecError, match=said) as caught:
        HealSettings.from_dict({name: value})
    assert name in str(caught.value)


def test_numbers_of_yaml_become_what_a_setting_is() -> None:
    found = HealSettings.from_dict({"labels": 100, "bake_s": 3, "num_trials": 4.0, "max_unweighted_clean_loss": None})
    assert (found.labels, found.bake_s, found.num_trials) == ("100", 3.0, 4)
    assert isinstance(found.num_trials, int)
