"""Tests that methods with Django's `async_unsafe` may be called green, if the wrapper is ours."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable
from typing import Any

import pytest
from django.core.exceptions import SynchronousOnlyOperation
from django.db import connection, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.postgresql.base import DatabaseWrapper as PostgresDatabaseWrapper
from django.utils import asyncio as django_asyncio
from django.utils.asyncio import async_unsafe

from pgbackend import aio
from pgbackend.base import DatabaseWrapper
from tests.conftest import Runner
from tests.library.models import Tag

called: list[str] = []


@pytest.fixture(autouse=True)
def _none_called() -> None:
    called.clear()


class Guarded:
    """Overrides methods as a derived backend does: each refuses to run on a loop, as in Django."""

    @async_unsafe
    def cursor(self) -> Any:
        called.append("cursor")
        return super().cursor()  # type: ignore[misc]

    @async_unsafe
    def commit(self) -> None:
        called.append("commit")
        super().commit()  # type: ignore[misc]

    @async_unsafe
    def rollback(self) -> None:
        called.append("rollback")
        super().rollback()  # type: ignore[misc]

    @async_unsafe
    def savepoint(self) -> Any:
        called.append("savepoint")
        return super().savepoint()  # type: ignore[misc]

    @async_unsafe
    def savepoint_rollback(self, sid: str) -> None:
        called.append("savepoint_rollback")
        super().savepoint_rollback(sid)  # type: ignore[misc]

    @async_unsafe
    def savepoint_commit(self, sid: str) -> None:
        called.append("savepoint_commit")
        super().savepoint_commit(sid)  # type: ignore[misc]

    @async_unsafe
    def close(self) -> None:
        called.append("close")
        super().close()  # type: ignore[misc]


class MixinBefore(Guarded, DatabaseWrapper):
    pass


class Derived(DatabaseWrapper):
    """Derives a wrapper whose method, guarded like the next class's, calls its parent's."""

    @async_unsafe
    def rollback(self) -> None:
        called.append("outer rollback")
        super().rollback()


class DerivedTwice(Derived):
    @async_unsafe
    def rollback(self) -> None:
        called.append("outermost rollback")
        super().rollback()


class OfOthers(PostgresDatabaseWrapper):
    """Plays another party's backend; our wrapper is mixed in before it."""

    @async_unsafe
    def vacuum(self) -> str:
        called.append("vacuum")
        return self.alias


class MixinAfter(DatabaseWrapper, OfOthers):
    pass


class Undo(Exception):
    pass


def use(wrapper_class: type[Any]) -> Any:
    """Replace the running task's wrapper by one of this class."""
    connections["default"] = wrapper = wrapper_class(connections.settings["default"], "default")
    return wrapper


def write_and_undo() -> None:
    with transaction.atomic():
        Tag.objects.create(name="kept")
        with pytest.raises(Undo), transaction.atomic():
            Tag.objects.create(name="undone")
            raise Undo
    with pytest.raises(Undo), transaction.atomic():
        Tag.objects.create(name="lost")
        raise Undo
    connections["default"].close()
    assert [tag.name for tag in Tag.objects.all()] == ["kept"]
    Tag.objects.all().delete()


def test_what_a_derived_wrapper_guards_works_green(run: Runner) -> None:
    def green() -> None:
        use(MixinBefore)
        write_and_undo()
        assert set(called) == {name for name in vars(Guarded) if not name.startswith("__")}

    run.green(green)


def test_async_with_atomic_rolls_back_by_a_guarded_method(run: Runner) -> None:
    async def main() -> None:
        use(MixinBefore)
        with pytest.raises(Undo):
            async with transaction.atomic():
                await Tag.objects.acreate(name="lost")
                with pytest.raises(Undo):
                    async with transaction.atomic():
                        raise Undo
                raise Undo
        assert await Tag.objects.acount() == 0
        assert {"savepoint", "savepoint_rollback", "rollback"} <= set(called)

    run(main())


def test_a_guarded_method_may_call_the_next_by_super(run: Runner) -> None:
    def green() -> None:
        use(DerivedTwice)
        write_and_undo()
        assert called == ["outermost rollback", "outer rollback"]

    run.green(green)


def test_a_guarded_method_of_a_class_behind_ours_works_green(run: Runner) -> None:
    def green() -> None:
        assert use(MixinAfter).vacuum() == "default"
        write_and_undo()

    run.green(green)


def on_the_object(wrapper: Any) -> Callable[..., Any]:
    """Bind a guarded function to the wrapper; the guard comes before or after the binding."""

    def rollback(self: Any) -> None:
        called.append("rollback")
        type(self).rollback(self)

    return types.MethodType(rollback, wrapper)


@pytest.mark.parametrize(
    "guard",
    [
        lambda bound: types.MethodType(async_unsafe(bound.__func__), bound.__self__),
        async_unsafe,
        async_unsafe("it has a message of its own"),
    ],
    ids=["then bound", "bound", "with a message"],
)
def test_a_guarded_attribute_of_the_object_works_green(
    run: Runner, guard: Callable[[Any], Any]
) -> None:
    def green() -> None:
        wrapper = use(DatabaseWrapper)
        wrapper.rollback = guard(on_the_object(wrapper))
        write_and_undo()
        assert called == ["rollback"]

    run.green(green)


@pytest.mark.parametrize("owner", [DatabaseWrapper, PostgresDatabaseWrapper, BaseDatabaseWrapper])
def test_a_class_that_is_patched_with_a_guarded_method_works_green(
    run: Runner, monkeypatch: pytest.MonkeyPatch, owner: type[Any]
) -> None:
    original = owner.rollback

    @async_unsafe
    def rollback(self: Any) -> None:
        called.append("rollback")
        original(self)

    monkeypatch.setattr(owner, "rollback", rollback)
    run.green(write_and_undo)
    assert called == ["rollback"]


def test_on_the_bare_loop_a_guarded_method_is_refused(run: Runner) -> None:
    async def main() -> None:
        wrapper = use(MixinBefore)
        bound = on_the_object(wrapper)
        for method in (wrapper.rollback, wrapper.close, wrapper.cursor, async_unsafe(bound)):
            with pytest.raises(SynchronousOnlyOperation):
                method()
        assert not called

    run(main())


def stock() -> Any:
    settings = connections.settings["default"]
    options = {name: value for name, value in settings["OPTIONS"].items() if name != "pool"}
    return PostgresDatabaseWrapper({**settings, "OPTIONS": options}, "stock")


def test_djangos_own_wrapper_is_refused_green(run: Runner) -> None:
    """Such a wrapper blocks the loop: the guard checks its class, not where the call comes from."""
    foreign = stock()

    class Reporting(DatabaseWrapper):
        @async_unsafe
        def rollback(self) -> None:
            called.append("rollback")
            with pytest.raises(SynchronousOnlyOperation):
                foreign.cursor()
            super().rollback()

    def green() -> None:
        for method in (foreign.cursor, foreign.connect, foreign.rollback, foreign.close):
            with pytest.raises(SynchronousOnlyOperation):
                method()
        use(Reporting)
        write_and_undo()
        assert called == ["rollback"]

    run.green(green)


def test_a_patch_that_asks_another_engine_is_refused_there(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our call of a patched method of Django's opens the guard for our own wrapper only."""
    foreign, original = stock(), PostgresDatabaseWrapper.rollback

    def rollback(self: Any) -> None:
        called.append("rollback")
        with pytest.raises(SynchronousOnlyOperation):
            foreign.cursor()
        original(self)

    monkeypatch.setattr(PostgresDatabaseWrapper, "rollback", rollback)
    run.green(write_and_undo)
    assert called == ["rollback"]


def test_a_guarded_function_of_no_wrapper_is_refused_green(run: Runner) -> None:
    @async_unsafe
    def work(*args: Any) -> None:
        called.append("work")

    def green() -> None:
        for args in ((), (1,), ([],), ("default",)):
            with pytest.raises(SynchronousOnlyOperation):
                work(*args)
        assert not called

    run.green(green)


def test_who_asks_for_the_loop_as_the_guard_does_gets_it(run: Runner) -> None:
    def green(args: tuple[Any, ...]) -> Any:
        return django_asyncio.get_running_loop()  # type: ignore[attr-defined]

    async def main() -> None:
        assert await aio.run(green, (connection,)) is asyncio.get_running_loop()

    run(main())


def test_a_wrapper_that_does_not_stand_for_its_alias_may_be_guarded_too(run: Runner) -> None:
    """The wrapper has a connection of its own, and does not block the loop either."""

    async def main() -> None:
        wrapper = MixinBefore(dict(connections.settings["default"]), "default")

        def green() -> None:
            with wrapper.cursor() as cursor:
                cursor.execute("SELECT 1")
            wrapper.rollback()
            wrapper.close()

        await aio.run(green)
        assert called == ["cursor", "rollback", "close"]

    run(main())
    assert connection.connection is None or not connection.in_atomic_block
