"""Tests which `threading.local` objects follow requests, and where each is replaced."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpResponse
from django.urls import path

from pgbackend import checks, conf, thread_locals
from pgbackend.thread_locals import Following
from tests.conftest import Runner
from tests.support.exchange import Exchange

Load = Callable[..., types.ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Load a module from source, as an import does; look for new thread-locals."""
    before = (list(thread_locals.converted), dict(thread_locals.refused))
    monkeypatch.setattr(thread_locals, "_progress", thread_locals._Progress())
    thread_locals._progress.seen.update(sys.modules)

    def load(source: str, name: str = "a_package.models", **options: Any) -> types.ModuleType:
        module = types.ModuleType(name)
        exec("import threading\n" + source, vars(module))
        monkeypatch.setitem(sys.modules, name, module)
        thread_locals.begin(**options)
        return module

    yield load
    thread_locals.converted[:] = before[0]
    thread_locals.refused.clear()
    thread_locals.refused.update(before[1])


def is_converted(value: object) -> bool:
    return isinstance(value, Following)


def names() -> set[str]:
    return {each.name for each in thread_locals.converted if each.name.startswith("a_package")}


def test_it_is_found_under_a_name_in_a_class_and_in_an_object(load: Load) -> None:
    module = load(
        """
class State: local = threading.local()
class Holder:
    def __init__(self): self.local = threading.local()
local, holder = threading.local(), Holder()
"""
    )
    assert is_converted(module.local)
    assert is_converted(module.State.local)
    assert is_converted(module.holder.local)
    found = {"local", "State.local", "holder.local"}
    assert names() == {f"a_package.models.{each}" for each in found}


def test_it_is_found_beside_objects_that_misstate_their_class(load: Load) -> None:
    """As objects do whose `__getattribute__()` answers for their class (procrastinate's settings).

    An object that is evaluated at its first use (a lazy one) is not evaluated.
    """
    module = load(
        """
class OfClass:
    def __getattribute__(self, name): return getattr(type(self), name)
class Lazy:
    def __getattribute__(self, name): raise RuntimeError("evaluated")
of_class, lazy, local = OfClass(), Lazy(), threading.local()
"""
    )
    assert is_converted(module.local)
    assert names() == {"a_package.models.local"}


def test_it_is_replaced_wherever_something_refers_to_it(load: Load) -> None:
    module = load(
        """
local = threading.local()
class Slotted:
    __slots__ = ("kept",)
slotted = Slotted()
slotted.kept = local
by_key, in_a_list = {"kept": [local]}, [local]
def enclose():
    enclosed = local
    return lambda: enclosed
enclosed = enclose()
"""
    )
    everywhere = (module.slotted.kept, module.by_key["kept"][0], module.in_a_list[0])
    assert is_converted(module.local)
    assert all(each is module.local for each in (*everywhere, module.enclosed()))


def test_other_modules_that_have_imported_it_have_the_same(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = types.ModuleType("a_package.source")
    source.local = threading.local()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, source.__name__, source)
    module = load("from a_package.source import local", name="a_package.user")
    assert is_converted(module.local)
    assert module.local is source.local  # type: ignore[attr-defined]


def test_it_is_replaced_where_the_collector_has_been_told_to_leave_it_alone(load: Load) -> None:
    gc.freeze()
    try:
        module = load("local = threading.local()")
    finally:
        gc.unfreeze()
    assert is_converted(module.local)


def test_one_that_a_tuple_holds_stays_and_is_warned_of(load: Load) -> None:
    module = load("local = threading.local()\nlocals_ = (local,)")
    assert not is_converted(module.local)
    (warning,) = [
        each for each in checks.check_thread_locals(None) if "a_package.models.local" in each.msg
    ]
    assert warning.id == "pgbackend.W001"
    assert "a tuple refers to it" in warning.msg
    assert "PGBACKEND_THREAD_LOCALS['exclude']" in warning.hint


def test_a_check_lists_what_was_converted(load: Load) -> None:
    load("local = threading.local()")
    (listed,) = [each for each in checks.check_thread_locals(None) if each.id == "pgbackend.D001"]
    assert "a_package.models.local" in listed.msg


def test_those_of_the_standard_library_and_of_drivers_stay(load: Load) -> None:
    for name in ("decimal.made_up", "asyncio.made_up", "psycopg.made_up", "asgiref.made_up"):
        assert not is_converted(load("local = threading.local()", name=name).local), name


def test_a_setting_excludes_and_includes_by_dotted_name(load: Load) -> None:
    source = "local, other = threading.local(), threading.local()"
    module = load(source, exclude=frozenset({"a_package.models.local"}))
    assert [is_converted(module.local), is_converted(module.other)] == [False, True]
    module = load(source, "a_package.views", exclude=frozenset({"a_package"}))
    assert [is_converted(module.local), is_converted(module.other)] == [False, False]
    module = load(source, "twisted.made_up", include=frozenset({"twisted.made_up.local"}))
    assert [is_converted(module.local), is_converted(module.other)] == [True, False]


@pytest.mark.parametrize(
    "value",
    [["a.b"], {"excluded": ["a.b"]}, {"exclude": "a.b"}, {"include": [1]}],
)
def test_a_setting_that_is_wrong_is_refused_with_the_cure(settings: Any, value: Any) -> None:
    settings.PGBACKEND_THREAD_LOCALS = value
    with pytest.raises(ImproperlyConfigured, match="Set it to a"):
        conf.thread_locals()


def test_the_setting_is_read(settings: Any) -> None:
    assert conf.thread_locals() == {"exclude": frozenset(), "include": frozenset()}
    settings.PGBACKEND_THREAD_LOCALS = {"exclude": ["a.b"]}
    assert conf.thread_locals() == {"exclude": frozenset({"a.b"}), "include": frozenset()}


def test_the_script_that_runs_is_looked_at_each_time(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load("", name="__main__")
    script.local = threading.local()  # type: ignore[attr-defined] - by a line further down
    thread_locals.look_at_new_modules()
    assert is_converted(script.local)


def test_modules_that_a_request_loads_are_looked_at_before_its_view_runs(
    load: Load, run_once: Runner, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The URLconf is loaded by the first request."""
    settings.MIDDLEWARE = []
    module = types.ModuleType("a_package.views")
    module.local = threading.local()  # type: ignore[attr-defined]

    class Urls:
        @property
        def urlpatterns(self) -> list[Any]:
            monkeypatch.setitem(sys.modules, "a_package.views", module)
            return [path("", lambda request: HttpResponse(str(is_converted(module.local))))]  # type: ignore[attr-defined]

    settings.ROOT_URLCONF = Urls()
    thread_locals.begin()

    async def main() -> None:
        exchange = Exchange()
        await exchange.start()
        assert exchange.content == b"True"

    run_once(main())


# --- Converted objects ----------------------------------------------------------------------------

CLASS = """
class Local(threading.local):
    default = "of the class"
    def __init__(self, first, *, second):
        self.made_with = [first, second]
    @property
    def last(self): return self.made_with[-1]
    @last.setter
    def last(self, value): self.made_with[-1] = value
    @last.deleter
    def last(self): del self.made_with[-1]
    def __getattr__(self, name):
        if name.startswith("lazy"): return name
        raise AttributeError(name)
local = Local(1, second=2)
"""


def test_in_code_that_follows_nothing_it_is_what_it_was(load: Load) -> None:
    module = load(f"{CLASS}\nlocal.made_with.append(3)\nlocal.set_before = True")
    local = module.local
    assert isinstance(local, module.Local)
    assert isinstance(local, threading.local)
    assert (local.made_with, local.set_before, local.last) == ([1, 2, 3], True, 3)
    local.set_here = True
    seen: list[Any] = []
    thread = threading.Thread(
        target=lambda: seen.append((local.made_with, hasattr(local, "set_here"), vars(local)))
    )
    thread.start()
    thread.join()
    assert seen == [([1, 2], False, {"made_with": [1, 2]})], "each thread has its own"
    del local.set_here
    assert vars(local) == {"made_with": [1, 2, 3], "set_before": True}


def test_in_a_task_it_begins_as_in_a_new_thread(load: Load) -> None:
    local = load(CLASS).local
    local.made_with.append(3)

    async def main() -> None:
        assert (local.made_with, local.default, local.last, local.lazy_one) == (
            *([1, 2], "of the class", 2, "lazy_one"),
        )
        local.last = 5
        del local.last
        local.default = "of the task"
        assert (local.made_with, local.default) == ([1], "of the task")
        del local.default
        assert local.default == "of the class"
        with pytest.raises(AttributeError):
            del local.default
        with pytest.raises(AttributeError):
            local.missing

    asyncio.run(main())
    assert (local.made_with, local.default) == ([1, 2, 3], "of the class")


def test_its_dictionary_is_that_of_the_task(load: Load) -> None:
    local = load("local = threading.local()").local
    local.of_the_thread = 1

    async def main() -> None:
        assert vars(local) == {}
        local.__dict__.update(a=1, b=2)
        vars(local).pop("a")
        assert (local.b, dict(vars(local)), len(vars(local))) == (2, {"b": 2}, 1)
        assert repr(vars(local)) == "{'b': 2}"
        local.__dict__.clear()
        assert not hasattr(local, "b")

    asyncio.run(main())
    assert vars(local) == {"of_the_thread": 1}


def test_a_second_look_changes_nothing(load: Load) -> None:
    module = load("local = threading.local()")
    before = module.local
    thread_locals.look_at_new_modules()
    thread_locals.go_on()
    assert module.local is before
