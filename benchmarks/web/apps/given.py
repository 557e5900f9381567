"""What the harness tells a server, by its environment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

_STACK, _DATABASE, _NAME = "BENCH_STACK", "BENCH_DATABASE", "BENCH_APPLICATION_NAME"


def as_environment(
    stack: Mapping[str, Any], database: Mapping[str, Any], application_name: str
) -> dict[str, str]:
    """Write it; the functions below read it."""
    return {
        _STACK: json.dumps(stack),
        _DATABASE: json.dumps(database),
        _NAME: application_name,
    }


def stack() -> Any:
    """The stack's own settings."""
    return json.loads(os.environ[_STACK])


def database() -> Any:
    """NAME, USER, PASSWORD, HOST, PORT and, if there are any, OPTIONS, as Django names them."""
    return json.loads(os.environ[_DATABASE])


def application_name() -> str:
    """By which the harness counts the stack's connections."""
    return os.environ[_NAME]
