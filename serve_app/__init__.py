"""The serving side: `serve run serve_app:app`, or `serve_app.healable.Healable` inside a deployment of your own.

`app` and `default_app` are resolved by name when they are asked for, because the builder that wires everything lies in
a higher layer. No submodule may be called `app`: importing it would hide the attribute.
"""

from __future__ import annotations

import importlib
from typing import Any

from orchestrator.settings import APP_FACTORY

_LAZY = ("app", "default_app")


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, _ = APP_FACTORY.partition(":")
    return getattr(importlib.import_module(module), name)
