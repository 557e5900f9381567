"""The findings of `manage.py pgbackend check` and `sum`: each has a level, a text and a cure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

OK, NOTE, WARNING, ERROR = "ok", "note", "warning", "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """A fact that an operator should know, and what to do about it, if anything."""

    level: str
    text: str
    cure: str = ""

    def __str__(self) -> str:
        return f"{self.text}{f' Cure: {self.cure}' if self.cure else ''}"


def has_error(findings: Iterable[Finding]) -> bool:
    """Return whether one of `findings` is an error."""
    return any(finding.level == ERROR for finding in findings)


HIDDEN = "(hidden)"
_SECRET = re.compile(r"passw|secret|token|credential|scram_", re.IGNORECASE)
#: Passwords in connection strings and URLs.
_IN_TEXT = (
    (re.compile(r"(passw\w*\s*=\s*)('(?:[^'\\]|\\.)*'|\S+)", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"(://[^/@\s:]*:)[^/@\s]*@"), rf"\1{HIDDEN}@"),
)


def is_secret(name: str) -> bool:
    """Return whether the option `name` holds a secret; `passfile` is the name of a file with it."""
    return bool(_SECRET.search(name)) and name != "passfile"


def shown(name: str, value: Any) -> Any:
    """Return what may be shown of the option `name`: no secret, a function by its name."""
    if is_secret(name) and value:
        return HIDDEN
    if isinstance(value, Mapping):
        return {str(key): shown(str(key), each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [shown("", each) for each in value]
    if callable(value):
        return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__name__)}"
    return value if value is None or isinstance(value, int | float) else without_secrets(str(value))


def without_secrets(text: str, *secrets: object) -> str:
    """Return `text` without `secrets`, and without passwords of connection strings in it."""
    for secret in secrets:
        if isinstance(secret, str) and secret:
            text = text.replace(secret, HIDDEN)
    for pattern, replacement in _IN_TEXT:
        text = pattern.sub(replacement, text)
    return text
