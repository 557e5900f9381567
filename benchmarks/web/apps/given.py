"""Passes settings from the harness to a server, through environment variables."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

_STACK, _DATABASE, _NAME = "BENCH_STACK", "BENCH_DATABASE", "BENCH_APPLICATION_NAME"


def as_environment(
    stack: Mapping[str, Any], database: Mapping[str, Any], application_name: str
) -> dict[str, str]:
    """Return the environment variables that the functions below read."""
    return {
        _STACK: json.dumps(stack),
        _DATABASE: json.dumps(database),
        _NAME: application_name,
    }


def stack() -> Any:
    """Return the stack's own settings."""
    return json.loads(os.environ[_STACK])


def database() -> Any:
    """Return NAME, USER, PASSWORD, HOST, PORT and OPTIONS (if any), as Django names them."""
    return json.loads(os.environ[_DATABASE])


def application_name() -> str:
    """Return the name by which the harness counts the stack's connections."""
    return os.environ[_NAME]
