"""Looks at this installation and its settings: packages, shortcuts, system checks."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
from django.core.checks import WARNING as WARNING_LEVEL
from django.core.checks.registry import registry

from pgbackend import conf

from .findings import NOTE, OK, WARNING, Finding
from .shortcuts import listed
from .versions import OPTIONAL, installed


def findings() -> Iterator[Finding]:
    """Yield what is worth knowing before a database is asked."""
    yield from _of_system_checks()
    if psycopg.pq.__impl__ == "python":
        yield Finding(
            WARNING,
            "psycopg works in pure Python: each statement takes several times as long.",
            "pip install 'psycopg[binary]', or 'psycopg[c]' beside a compiler and libpq.",
        )
    for name, what in OPTIONAL.items():
        if installed(name) is None:
            text = f"{name} is not installed ({what})."
            yield Finding(NOTE, text, f"pip install {name}, if your server can use it.")
    if conf.is_debugging():
        yield Finding(
            NOTE, "DEBUG is on: Django keeps each statement of a request.", "Set it to False."
        )
    yield from _of_shortcuts()


def _of_system_checks() -> Iterator[Finding]:
    """Yield what pgbackend's own checks find; checking.py tells the errors, with their alias."""
    own = [
        check
        for check in registry.get_checks()
        if getattr(check, "__module__", "").startswith("pgbackend.")
    ]
    found = [
        each
        for check in own
        for each in check(app_configs=None, databases=None)
        if not each.is_silenced()
    ]
    told = [each for each in found if each.level >= WARNING_LEVEL]
    for each in told:
        if each.level == WARNING_LEVEL:
            yield Finding(WARNING, f"{each.id}: {each.msg}", each.hint or "")
    if not told:
        yield Finding(OK, "The system checks of pgbackend find nothing wrong.")


def _of_shortcuts() -> Iterator[Finding]:
    off = {each["name"]: each["why_off"] for each in listed() if not each["on"]}
    if not off:
        yield Finding(OK, "All shortcuts are on.")
    for name, reason in off.items():
        level = NOTE if reason.startswith("switched off") else WARNING
        text = f"The shortcut {name!r} is off: {reason}."
        yield Finding(level, text, "The plain way does its work, in more time (docs/shortcuts.md).")
