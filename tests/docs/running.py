"""Runs a snippet: as settings, or as code with the names that its page speaks of."""

from __future__ import annotations

import ast
import asyncio
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

from django.utils.module_loading import import_string

import pgbackend
from pgbackend import options
from tests.docs.snippets import Snippet

Names = dict[str, Any]
Around = AbstractContextManager[Names]
Runner = Callable[[Snippet], None]


def settings(**names: Any) -> Runner:
    """Return a runner that checks a snippet of settings; `names` are those that it uses."""

    def run(snippet: Snippet) -> None:
        found: Names = dict(names)
        exec(compile(snippet.settings(), str(snippet), "exec"), found)
        databases = found.get("DATABASES", {})
        for alias, settings_dict in {**databases, **_entries(found)}.items():
            assert [*_problems(alias, settings_dict)] == []
        for app in found.get("INSTALLED_APPS", []):
            import_module(app)
        for setting in ("DATABASE_ROUTERS", "MIDDLEWARE"):
            for path in found.get(setting, []):
                import_string(path)

    return run


def _entries(found: Names) -> dict[str, Any]:
    """Return the databases of a snippet that shows entries of a dictionary without its name."""
    entries = found.get("entries", {})
    is_a_database = not all(isinstance(each, dict) for each in entries.values())
    return {"default": entries} if is_a_database or "OPTIONS" in entries else entries


def _problems(alias: str, settings_dict: Mapping[str, Any]) -> list[str]:
    complete = {"OPTIONS": {}, **settings_dict}
    found = [*options.problems(alias, complete)]
    return [problem.text for problem in found]


def compiles() -> Runner:
    """Return a runner that compiles a snippet, which `tests/docs/elsewhere.py` runs."""

    def run(snippet: Snippet) -> None:
        compile(snippet.code(), str(snippet), "exec", dont_inherit=True)

    return run


def code(
    before: Callable[[], Names | Around] = dict, then: Callable[[Names], Any] | None = None
) -> Runner:
    """Return a runner that runs a snippet green, on a loop.

    `before` returns the names that the snippet uses and does not define, or a context manager that
    yields them; `then` gets all names, and may be a coroutine function. Both are called green, too.
    """

    def run(snippet: Snippet) -> None:
        asyncio.run(pgbackend.aio.portal(_run(snippet, before, then)))

    return run


def sync_code(before: Callable[[], Names], then: Callable[[Names], Any]) -> Runner:
    """Return a runner that runs a snippet, `before` and `then` in sync code."""

    def run(snippet: Snippet) -> None:
        names = {"pgbackend": pgbackend, **before()}
        exec(compile(snippet.code(), str(snippet), "exec", dont_inherit=True), names)
        then(names)

    return run


async def _run(
    snippet: Snippet,
    before: Callable[[], Names | Around],
    then: Callable[[Names], Any] | None,
) -> None:
    given = before()
    with given if isinstance(given, AbstractContextManager) else nullcontext(given) as names:
        await _run_with(snippet, {"pgbackend": pgbackend, **names}, then)


async def _run_with(snippet: Snippet, names: Names, then: Callable[[Names], Any] | None) -> None:
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    compiled = compile(snippet.code(), str(snippet), "exec", flags=flags, dont_inherit=True)
    result = eval(compiled, names)
    if inspect.iscoroutine(result):
        await result
    if then is not None and inspect.isawaitable(result := then(names)):
        await result
