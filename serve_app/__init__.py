"""The serving side: `serve run serve_app:app`, or `serve_app.healable.Healable` inside a deployment of your own.

`app` and `default_app` are resolved by name when they are asked for, because the builder that wires everything lies in
a higher layer. No submodule may be called `app`: importing it would hide the attribute.
"""

from __future__ import annotations

import importlib
from typing import Any

from orchestrator.settings import APP_FACTORY

_BUILDER, _BOUND = "app", "default_app"  # takes arguments; an application with every argument at its default


def __getattr__(name: str) -> Any:
    if name not in (_BUILDER, _BOUND):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, _ = APP_FACTORY.partition(":")
    found = getattr(importlib.import_module(module), name)
    return found() if name == _BOUND else found
