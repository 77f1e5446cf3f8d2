"""docs/settings.md: every setting with type, default and meaning, generated from the code; a test compares the two.

python -m orchestrator.cli.settings_page > docs/settings.md
"""

from __future__ import annotations

from dataclasses import fields
from enum import Enum
from typing import Any

from orchestrator.launch import AppArgs, ServiceArgs
from orchestrator.settings import HealSettings


def settings_page() -> str:
    """The page's text.

    Raises:
        ValueError: a setting has no description; the message names it.
    """
    service = ["| Argument | Default | Meaning |", "|---|---|---|"]
    for name, field in ServiceArgs.model_fields.items():
        service.append(f"| `{name}` | {_shown(field.default)} | {_described(name, field.description)} |")
    healing = ["| Setting | Type | Default | Meaning |", "|---|---|---|---|"]
    for item in fields(HealSettings):
        kind = str(item.type).replace(" | ", " or ")
        said = _described(item.name, item.metadata.get("doc"))
        healing.append(f"| `{item.name}` | {kind} | {_shown(item.default)} | {said} |")
    missing = {item.name for item in fields(HealSettings)} - set(AppArgs.model_fields)
    if missing:
        raise ValueError(f"every healing setting must be an argument of the app; these are not: {sorted(missing)}")
    return "\n".join(
        [
            "# Settings",
            "",
            "Generated from the code: `python -m orchestrator.cli.settings_page > docs/settings.md`.",
            "",
            "## Arguments of `serve_app:app`",
            "",
            "`serve run serve_app:app name=value ...` takes these and every healing setting below.",
            "",
            *service,
            "",
            "## Healing settings",
            "",
            "`--set name=value` of `heal demo` and `heal rehearse`; keyword arguments of `Healable`; times in seconds.",
            "",
            *healing,
            "",
        ]
    )


def _described(name: str, text: str | None) -> str:
    if not text:
        raise ValueError(f"setting {name!r} must have a description")
    return text.replace("|", "\\|")


def _shown(value: Any) -> str:
    return f"`{value.value if isinstance(value, Enum) else value}`"


if __name__ == "__main__":
    print(settings_page(), end="")
