"""The table of hooks: each is declared with its reason, and none is passed over in silence."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import django
import pytest
from django.core.exceptions import ImproperlyConfigured
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.base import BaseHandler
from django.test.utils import modify_settings

from pgbackend import asgi, hooks, request_signals
from pgbackend.fast.registry import is_on
from pgbackend.hooks import HOOKS, Hook

ROOT = Path(__file__).parents[2]
BY_NAME = {str(hook): hook for hook in HOOKS}


@pytest.mark.parametrize("hook", HOOKS, ids=str)
def test_each_hook_has_its_reason_and_its_target(hook: Hook) -> None:
    assert hook.reason[0].isupper() or hook.reason[0] == "`"
    assert hook.reason.endswith(".")
    assert hook.is_needed or hook.since > django.VERSION[:2] or hook.app or hook.modules
    if hook.is_needed:
        assert hook.find_target() is not None


@pytest.mark.parametrize("rebound", hooks.installed, ids=lambda rebound: str(rebound.hook))
def test_each_hook_that_is_needed_has_been_rebound(rebound: hooks.Rebound) -> None:
    found = getattr(rebound.hook.find_target(), rebound.hook.attribute)
    if rebound.hook.attribute != "receivers":  # tests connect others
        assert found is rebound.replacement
    assert found is not rebound.original


def test_nothing_is_rebound_twice_and_nothing_is_left_out() -> None:
    assert Counter(map(str, HOOKS)).most_common(1)[0][1] == 1
    assert Counter(str(rebound.hook) for rebound in hooks.installed) == Counter(
        str(hook) for hook in HOOKS if hook.is_needed
    )


def test_the_table_was_written_for_the_versions_that_the_package_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    first, (major, minor) = ".".join(map(str, hooks.FIRST)), hooks.LAST
    assert f"Django>={first},<{major}.{minor + 1}" in project["dependencies"]


def test_a_paginator_with_a_methods_came_with_django_60() -> None:
    assert BY_NAME["django.core.paginator.sync_to_async"].is_needed == (django.VERSION >= (6, 0))


def test_each_seam_of_requests_is_plugged_if_its_shortcut_is_on() -> None:
    assert (asgi.new_wrapper.__module__ == "pgbackend.fast.wrappers") == is_on("wrappers")
    assert (request_signals.send.__module__ == "pgbackend.fast.signals") == is_on("signals")
    assert (ASGIHandler.handle.__module__ == "pgbackend.fast.handler") == is_on("handler")
    assert ("django.core.signals:request_started.send" in BY_NAME) == is_on("signals")


# --- A target that is missing ---------------------------------------------------------------------


class Owner:
    """Stands for a class of Django's."""

    def method(self) -> str:
        return "Django's"


PLAIN = Hook(
    f"{__name__}:Owner", "method", lambda djangos: lambda self: "ours", "Nobody would hear of us."
)


@pytest.fixture
def rebound(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the list in which `rebind()` notes its work; put back what a test rebinds."""
    noted: list[Any] = []
    monkeypatch.setattr(hooks, "installed", noted)
    monkeypatch.setattr(Owner, "method", Owner.method)  # to be put back
    return noted


def test_a_target_is_rebound_and_noted(rebound: list[Any]) -> None:
    original = Owner.method
    hooks.rebind([PLAIN])
    assert Owner().method() == "ours"
    assert rebound == [hooks.Rebound(PLAIN, original, Owner.method)]


def test_what_is_to_stay_is_left_alone(rebound: list[Any]) -> None:
    class Derived(Owner):
        pass

    hooks.rebind([replace(PLAIN, replace=lambda djangos: djangos)])
    assert Owner().method() == "Django's"
    assert "method" not in vars(Derived)
    assert len(rebound) == 1


@pytest.mark.parametrize(
    ("target", "attribute", "cause"),
    [
        (f"{__name__}:Owner", "moved", f"{__name__}:Owner has no attribute 'moved'"),
        (f"{__name__}:Owner", "__call__", f"{__name__}:Owner has no attribute '__call__'"),
        (f"{__name__}:Moved", "method", f"there is no {__name__}:Moved"),
        ("django.moved", "function", "there is no django.moved"),
        ("django.moved:Owner", "method", "there is no django.moved:Owner"),
        ("django.utils.asyncio", "moved", "django.utils.asyncio has no attribute 'moved'"),
    ],
)
def test_a_missing_target_is_an_error_with_cause_and_cure(
    target: str, attribute: str, cause: str, rebound: list[Any]
) -> None:
    with pytest.raises(ImproperlyConfigured) as caught:
        hooks.rebind([replace(PLAIN, target=target, attribute=attribute)])
    message = str(caught.value)
    assert f"must replace {target}.{attribute}, but {cause}" in message
    assert f"Django {django.__version__}" in message
    assert PLAIN.reason in message
    assert "Cure: install a Django from 5.2 to 6.1" in message
    assert rebound == []


def test_of_another_package_the_error_names_the_package() -> None:
    hook = replace(PLAIN, target="asgiref.sync:AsyncToSync", attribute="moved")
    with pytest.raises(ImproperlyConfigured, match="and a release of asgiref that has it, or"):
        hooks.rebind([hook])


def test_if_one_target_is_missing_none_is_rebound(rebound: list[Any]) -> None:
    with pytest.raises(ImproperlyConfigured):
        hooks.rebind([PLAIN, replace(PLAIN, attribute="moved")])
    assert Owner().method() == "Django's"
    assert rebound == []


def test_each_row_of_the_table_notices_that_its_attribute_is_gone(
    monkeypatch: pytest.MonkeyPatch, rebound: list[Any]
) -> None:
    noticed = 0
    for hook in HOOKS:
        if hook.is_needed and not hook.adds:
            with pytest.raises(ImproperlyConfigured, match="has no attribute 'moved'"):
                hooks.rebind([replace(hook, attribute="moved")])
            noticed += 1
    assert noticed > 30


def test_a_method_that_django_has_taken_away_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(BaseHandler, "resolve_request")
    with pytest.raises(ImproperlyConfigured, match="Handler has no attribute 'resolve_request'"):
        hooks.rebind([BY_NAME["django.core.handlers.base:BaseHandler.resolve_request"]])


def test_a_hook_for_other_versions_or_packages_is_not_looked_for(
    monkeypatch: pytest.MonkeyPatch, rebound: list[Any]
) -> None:
    missing = replace(PLAIN, attribute="moved")
    monkeypatch.setattr(hooks.django, "VERSION", (6, 0, 3, "final", 0))
    hooks.rebind(
        [
            replace(missing, since=(6, 1)),
            replace(missing, before=(6, 0)),
            replace(missing, app="django.contrib.humanize"),
            replace(missing, modules=("sys", "a_package_that_nobody_has_installed")),
        ]
    )
    assert rebound == []
    for needed in (replace(missing, since=(6, 0)), replace(missing, before=(6, 1))):
        with pytest.raises(ImproperlyConfigured):
            hooks.rebind([needed])


def test_a_hook_for_an_app_is_looked_for_if_the_app_is_there(rebound: list[Any]) -> None:
    with modify_settings(INSTALLED_APPS={"append": "django.contrib.humanize"}):
        with pytest.raises(ImproperlyConfigured):
            hooks.rebind([replace(PLAIN, attribute="moved", app="django.contrib.humanize")])


# In processes of their own: what is rebound stays so.
@pytest.mark.parametrize(
    ("take_away", "named"),
    [
        (
            "from django.utils import asyncio; del asyncio.get_running_loop",
            "django.utils.asyncio.get_running_loop",
        ),
        (
            "from django.core.handlers.base import BaseHandler as B; del B.resolve_request",
            "django.core.handlers.base:BaseHandler.resolve_request",
        ),
    ],
    ids=["at once", "when models are ready"],
)
def test_a_project_does_not_start_on_a_django_without_a_target(take_away: str, named: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _START.format(take_away=take_away)],
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith(
        f"django.core.exceptions.ImproperlyConfigured: pgbackend must replace {named}, but"
    )


_START = """
import django
from django.conf import settings

settings.configure(
    DATABASES={{"default": {{"ENGINE": "pgbackend", "NAME": "never_used"}}}},
    INSTALLED_APPS=["django.contrib.contenttypes"],
)
{take_away}
from django.db import connection
connection.vendor
django.setup()
"""
