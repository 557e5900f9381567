"""Tests the registry of shortcuts: which are on with this Django, and what switches one off."""

from __future__ import annotations

import inspect
import json
import logging
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db.backends.base.base import BaseDatabaseWrapper
from django.test import override_settings

from benchmarks.shortcuts_code import CODE, _with_code, lines
from pgbackend import conf
from pgbackend.driver.shortcuts import Switches, switches
from pgbackend.fast import fingerprints, registry
from pgbackend.fast.registry import DISTRIBUTIONS, SHORTCUTS
from pgbackend.patches import NO_OTHERS, unpatched
from tests.support.counting import Proxy
from tests.support.processes import Program, run_all

why_off = registry.why_off.__wrapped__
FUNCTIONS = sorted({name for each in SHORTCUTS.values() for name in each.bypasses})
THERE = [each for each in FUNCTIONS if fingerprints.find(each) is not None]


@pytest.fixture(autouse=True)
def _as_outside_of_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo the patch with which test cases block databases that they do not use."""
    patch = BaseDatabaseWrapper.ensure_connection
    real = inspect.getclosurevars(patch).nonlocals.get("real_ensure_connection", patch)
    monkeypatch.setattr(BaseDatabaseWrapper, "ensure_connection", real)
    monkeypatch.delenv("PGBACKEND_SHORTCUTS", raising=False)


# --- The installed versions -----------------------------------------------------------------------


def test_each_shortcut_is_on_with_what_is_installed() -> None:
    """A new release may have changed a function: then see ``python -m tests.fingerprints``."""
    assert why_off() == {}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS.values())
def test_what_is_installed_has_been_read(distribution: str) -> None:
    assert metadata.version(distribution) in registry.known()["versions"][distribution]


def test_each_function_is_in_a_release() -> None:
    assert sorted(registry.known()["functions"]) == FUNCTIONS


@pytest.mark.parametrize("name", THERE)
def test_an_installed_function_has_the_text_of_its_file(name: str) -> None:
    """`tests.fingerprints` reads the file, and does not import the function."""
    function = inspect.unwrap(fingerprints.find(name))
    texts = fingerprints.of_source(Path(function.__code__.co_filename).read_bytes())
    assert fingerprints.Installed().text(name) == texts[name.partition(":")[2]]


# --- Another text ---------------------------------------------------------------------------------


def bypassing(name: str) -> set[str]:
    """Return the shortcuts that bypass a function, and the shortcuts that need one of them."""
    found = {each for each, shortcut in SHORTCUTS.items() if name in shortcut.bypasses}
    return found | {each for each, one in SHORTCUTS.items() if found & {*one.needs}}


def with_another_text(function: Any, folder: Path) -> FunctionType:
    """Return `function` from a copy of its module, with a comment added to its last line."""
    original = Path(function.__code__.co_filename).read_text().splitlines()
    last = fingerprints._last_line(function.__code__) - 1
    original[last] += "  # changed"
    copy = folder / "copy.py"
    copy.write_text("\n".join(original))
    code = compile(copy.read_text(), str(copy), "exec", dont_inherit=True)
    (changed,) = [
        each
        for each in fingerprints._functions(code)
        if (each.co_qualname, each.co_firstlineno)
        == (function.__qualname__, function.__code__.co_firstlineno)
    ]
    return _function(function, changed)


def _function(function: Any, code: CodeType) -> FunctionType:
    made = FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)
    made.__defaults__, made.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return made


@pytest.mark.sweep(one_in=6)
@pytest.mark.parametrize("name", THERE)
def test_another_text_of_a_function_switches_its_shortcuts_off_and_no_others(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found, find = fingerprints.find(name), fingerprints.find
    changed: Any = with_another_text(inspect.unwrap(found), tmp_path)
    if hasattr(found, "__wrapped__"):
        monkeypatch.setattr(found, "__wrapped__", changed)
    else:
        monkeypatch.setattr(
            fingerprints, "find", lambda each: changed if each == name else find(each)
        )
    with caplog.at_level(logging.INFO, "pgbackend.shortcuts"):
        reasons = why_off()
    assert reasons.keys() == bypassing(name)
    assert any(name in reason and "source that is unknown" in reason for reason in reasons.values())
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    assert all(name in record.getMessage() for record in caplog.records)


def in_a_function(found: Any) -> Any:
    def patch(*args: Any, **kwargs: Any) -> Any:
        return found(*args, **kwargs)

    patch.__wrapped__ = found  # type: ignore[attr-defined]
    return patch


def in_itself(found: Any) -> Any:
    patch = in_a_function(found)
    patch.__wrapped__ = patch
    return patch


def in_a_proxy(found: Any) -> Any:
    return Proxy(found, lambda: None)


@pytest.mark.parametrize("wrapped", [in_a_function, in_a_proxy, in_itself])
def test_a_function_that_is_patched_switches_its_shortcuts_off_without_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wrapped: Any
) -> None:
    """Sentry and OpenTelemetry patch functions; a patch does not mean a new release."""
    name = "django.db.models.sql.compiler:SQLCompiler.as_sql"
    patch = wrapped(fingerprints.find(name))
    assert unpatched(patch) is NO_OTHERS
    module = __import__("django.db.models.sql.compiler", fromlist=["SQLCompiler"])
    monkeypatch.setattr(module.SQLCompiler, "as_sql", patch)
    with caplog.at_level(logging.WARNING, "pgbackend.shortcuts"):
        reasons = why_off()
    assert reasons.keys() == bypassing(name)
    assert reasons["select"] == f"{name} is patched"
    assert not caplog.records


@pytest.mark.parametrize("version", ["6.1.99", "6.2", "7.0.1"])
def test_a_version_that_nobody_has_read_is_compared_with_its_series_or_the_newest(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = metadata.version("Django")
    monkeypatch.setattr(registry, "installed_version", lambda name: version)
    reasons = why_off()
    if installed.startswith("6.1"):
        assert reasons == {}
    else:  # the installed functions are of an older series
        assert reasons
        assert all(version in each for each in reasons.values() if "needs" not in each)


# --- The code of each -----------------------------------------------------------------------------


def test_each_shortcut_names_its_code_for_the_table_of_lines() -> None:
    assert CODE.keys() == SHORTCUTS.keys()


@pytest.mark.parametrize("name", sorted({name for each in CODE.values() for name in each}))
def test_code_that_is_named_is_there(name: str) -> None:
    assert lines([name])


def test_lines_of_code_are_counted_and_no_others() -> None:
    source = [
        *('"""Module."""', "", "# why", 'A = """b', 'c"""', "", "", "def f():", '    """Do."""'),
        *("    return (1,", "    2)", ""),
    ]
    assert sorted(_with_code("\n".join(source))) == [4, 5, 8, 10, 11]


# --- The switch -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "off"),
    [
        ("0", {*SHORTCUTS}),
        ("", set()),
        ("1", set()),
        ("-select", {"select", "known"}),
        ("-statements", {"statements", "run"}),
        ("-lease", {"lease"}),
        (" -rows, -blocks ", {"rows", "blocks"}),
    ],
)
@pytest.mark.parametrize("where", ["environment", "setting"])
def test_shortcuts_are_switched_off_by_name(
    where: str, value: str, off: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "environment":
        monkeypatch.setenv("PGBACKEND_SHORTCUTS", value)
        assert why_off().keys() == off
    else:
        with override_settings(PGBACKEND_SHORTCUTS=value):
            assert why_off().keys() == off


def test_the_environment_comes_before_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGBACKEND_SHORTCUTS", "-rows")
    with override_settings(PGBACKEND_SHORTCUTS="0"):
        assert [*why_off()] == ["rows"]


@pytest.mark.parametrize("value", ["select", "-slect", "-", "all", ["-select"], None, 2])
def test_a_wrong_switch_says_what_it_may_be(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        override_settings(PGBACKEND_SHORTCUTS=value),
        pytest.raises(ImproperlyConfigured, match="the setting PGBACKEND_SHORTCUTS says .*select"),
    ):
        conf.shortcuts_switched_off(SHORTCUTS)


@pytest.mark.parametrize("value", [0, False])
def test_the_setting_may_be_a_number(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PGBACKEND_SHORTCUTS", raising=False)
    with override_settings(PGBACKEND_SHORTCUTS=value):
        assert why_off().keys() == SHORTCUTS.keys()


@pytest.mark.parametrize("off", ["lease", "run", "portals", "blocks"])
def test_the_driver_is_told_which_of_its_shortcuts_are_on(
    monkeypatch: pytest.MonkeyPatch, off: str
) -> None:
    for each in fields(Switches):
        monkeypatch.setattr(switches, each.name, getattr(switches, each.name))
    monkeypatch.setattr(registry, "is_on", lambda name: name != off)
    registry.switch_driver()
    assert [each.name for each in fields(Switches) if not getattr(switches, each.name)] == [off]


def test_the_driver_is_told_when_the_backend_is_loaded_and_has_all_on_alone() -> None:
    show = "from pgbackend.driver.shortcuts import switches as s; print(s.lease, s.queue, s.run)"
    alone = f"import pgbackend.driver.pool; {show}"
    loaded = f"""from django.conf import settings
settings.configure()
import pgbackend.base
{show}"""
    environment = {"PGBACKEND_SHORTCUTS": "-queue,-statements"}
    programs = [Program(["-c", each], environment=environment) for each in (alone, loaded)]
    assert [each.check() for each in run_all(programs)] == [
        "True True True\n",
        "True False False\n",
    ]


def test_the_seams_of_cursors_have_the_plain_way_while_the_shortcut_is_off() -> None:
    show = """from django.conf import settings
settings.configure()
from pgbackend.base import DatabaseWrapper as cls
print({each.__module__ for each in (cls.cursor, cls._cursor, cls.create_cursor)})
"""
    programs = [
        Program(["-c", show], environment={"PGBACKEND_SHORTCUTS": off}) for off in ("", "-cursors")
    ]
    assert [each.check() for each in run_all(programs)] == [
        "{'pgbackend.fast.cursors'}\n",
        "{'pgbackend.wrapper.cursors'}\n",
    ]


# --- Their seams ----------------------------------------------------------------------------------


def test_the_compilers_are_loaded_without_a_shortcut() -> None:
    show = "import sys, pgbackend.compiler; print('pgbackend.fast' in sys.modules)"
    assert [each.check() for each in run_all([Program(["-c", show])])] == ["False\n"]


@pytest.mark.parametrize("off", ["", "0"])
def test_a_compiler_that_is_derived_before_shortcuts_are_plugged_in_is_like_one_derived_later(
    off: str,
) -> None:
    code = """from django.conf import settings
from pgbackend.compiler import SQLCompiler
class Early(SQLCompiler):
    pass
settings.configure()
import pgbackend.base
class Late(SQLCompiler):
    pass
from pgbackend import compiler
assert Early.__mro__[1:] == Late.__mro__[1:] == SQLCompiler.__mro__
assert compiler.SQLCompiler is SQLCompiler
print(any(each.__module__.startswith("pgbackend.fast.") for each in Early.__mro__))"""
    program = Program(["-c", code], environment={"PGBACKEND_SHORTCUTS": off})
    assert [each.check() for each in run_all([program])] == [f"{not off}\n"]


# --- Without them ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_results_and_statements_are_djangos_without_each_shortcut(conninfo: str) -> None:
    """Green and sync code are compared with Django's own engine."""
    values = ["", "0", *(f"-{name}" for name in SHORTCUTS)]
    programs = [
        Program(
            ["tests/support/compare.py"],
            environment={"DATABASE_URL": conninfo, "PGBACKEND_SHORTCUTS": value},
        )
        for value in values
    ]
    for value, program in zip(values, programs, strict=True):
        (finished,) = run_all([program])
        seen = json.loads(finished.check())
        assert seen["stock"]["rows"], value
        for context in ("sync", "green"):
            assert seen[context] == seen["stock"], f"{value}, {context}"


def test_the_command_prints_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    (finished,) = run_all(
        [Program(["-m", "pgbackend.fast"], environment={"PGBACKEND_SHORTCUTS": "-select"})]
    )
    lines = finished.check().splitlines()
    on = [line.split()[0] for line in lines if line.split()[1] == "on"]
    assert on == [each for each in SHORTCUTS if each not in {"select", "known"}]
    assert "(switched off by PGBACKEND_SHORTCUTS in the environment)" in lines[1]
    assert "(it needs 'select')" in lines[3]
