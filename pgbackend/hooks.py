"""What makes the one setting enough: the only place where an object of Django's is rebound.

Each hook has its reason above it, is installed once, and does nothing where pgbackend is not
concerned. The rule for Django's hops to a thread (`sync_to_async` inside Django):

- the ORM's a-methods run their synchronous twin green, if its alias is pgbackend's;
- what Django itself defines and does not block (its middleware, its views, rendering, the receivers
  of signals) runs green, in place, if every alias of the project is pgbackend's;
- what users define (sync views, sync middleware) keeps its thread, wherever it stands, for it may
  block. threads.py tells one from the other.

Password hashing keeps its thread too: it is work, not waiting, and would stop the loop.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from itertools import islice
from types import FrameType
from typing import Any, TypeAlias
from weakref import ReferenceType

from asgiref.local import Local
from asgiref.sync import AsyncToSync, SyncToAsync, async_to_sync, iscoroutinefunction, sync_to_async
from django.apps import apps
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.base import BaseHandler
from django.core.signals import request_finished, request_started, setting_changed
from django.db import close_old_connections, connections, reset_queries, router, transaction
from django.db.backends.dummy import base as dummy
from django.db.models.sql.query import RawQuery
from django.db.utils import ConnectionHandler
from django.dispatch import Signal
from django.utils import asyncio as django_asyncio
from django.utils.asyncio import async_unsafe

from . import (
    asgi,
    atomic_blocks,
    block_context,
    checks,
    conf,
    generators,
    request,
    state,
    thread_locals,
    threads,
    wrappers,
)
from .driver import bridge
from .driver.connection import let_go
from .fast.registry import is_on
from .patches import if_djangos

Policy: TypeAlias = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], bool]

_installed = False


def install() -> None:
    """Install the hooks, once; those that need models when the app registry is ready."""
    global _installed  # noqa: PLW0603 - a process has one Django
    if _installed:
        return
    _installed = True
    _hook_atomic()
    _hook_async_unsafe()
    _hook_async_to_sync()
    _hook_sync_to_async()
    _when_ready(_hook_django)


def _when_ready(callback: Callable[[], None]) -> None:
    # The backend is imported while models load, and Django has no signal for the end of it.
    if apps.ready:
        callback()
        return
    set_ready = apps.ready_event.set

    def ready() -> None:
        set_ready()
        callback()

    apps.ready_event.set = ready  # type: ignore[method-assign]


def is_ours(connection: Any) -> bool:
    """Whether `connection` is a `DatabaseWrapper` of pgbackend's."""
    return hasattr(connection, "async_session")


def run_coroutine_function(func: Callable[[], Awaitable[Any]]) -> Any:
    """Call the coroutine function `func` from synchronous code, green or not."""
    if bridge.current() is not None:
        return bridge.await_(func())
    return _green_async_to_sync(func)()


# --- transaction.atomic -------------------------------------------------------------------------


def _hook_atomic() -> None:  # noqa: C901 - five short methods
    """`Atomic` takes its turn among the tasks of its transaction, and knows coroutines.

    See atomic_blocks.py.
    """
    atomic = transaction.Atomic
    enter, leave, call = atomic.__enter__, atomic.__exit__, atomic.__call__

    @functools.wraps(enter)
    def __enter__(self: Any) -> None:
        connection = transaction.get_connection(self.using)
        if is_ours(connection):
            atomic_blocks.enter(connection, self, enter)
        else:
            atomic_blocks.async_with.frame = None
            enter(self)

    @functools.wraps(leave)
    def __exit__(self: Any, *exc_info: Any) -> None:
        connection = transaction.get_connection(self.using)
        if not is_ours(connection):
            atomic_blocks.async_with.frame = None
            leave(self, *exc_info)
            return
        # Whoever closes a generator by dropping it cannot be given an exception.
        with bridge.postpone_delivery(deliver=exc_info[0] is not GeneratorExit):
            atomic_blocks.leave(connection, self, leave, exc_info)

    async def __aenter__(self: Any) -> None:
        atomic_blocks.async_with.frame = sys._getframe(1)
        await bridge.run(self.__enter__)

    async def __aexit__(self: Any, *exc_info: Any) -> None:
        atomic_blocks.async_with.frame = sys._getframe(1)
        await bridge.run(self.__exit__, *exc_info)

    @functools.wraps(call)
    def __call__(self: Any, func: Callable[..., Any]) -> Callable[..., Any]:
        if not iscoroutinefunction(func):
            return call(self, func)

        @functools.wraps(func)
        async def inner(*args: Any, **kwargs: Any) -> Any:
            async with self._recreate_cm():
                return await func(*args, **kwargs)

        return inner

    for method in (__enter__, __exit__, __aenter__, __aexit__, __call__):
        setattr(atomic, method.__name__, method)


# --- async_unsafe -------------------------------------------------------------------------------


def _hook_async_unsafe() -> None:
    """`async_unsafe` refuses where a loop runs; green, none is blocked by a wrapper of ours.

    So it does not ask for the loop what guards a method of one: our own have guards of their own
    (see base.py), but derived wrappers, mixins and patches carry Django's. It is still what guards
    the other engines, and whatever else it is put on.
    """
    get_running_loop = django_asyncio.get_running_loop  # type: ignore[attr-defined]

    @functools.wraps(get_running_loop)
    def hooked() -> Any:
        here = bridge.current()
        if here is not None and _guards_ours(sys._getframe(1)):
            raise RuntimeError("no event loop that this call would block")
        return get_running_loop()

    django_asyncio.get_running_loop = hooked  # type: ignore[attr-defined]
    # What stands for a missing DATABASES waits for nothing: it says what is missing.
    dummy.DatabaseWrapper.cursor = inspect.unwrap(dummy.DatabaseWrapper.cursor)  # type: ignore[method-assign]


#: What `async_unsafe` puts in the place of each function that it guards.
_GUARD = async_unsafe(is_ours).__code__


def _guards_ours(frame: FrameType) -> bool:
    """Whether `frame` is that of a guard, of a method that is called on a wrapper of ours."""
    if frame.f_code is not _GUARD:
        return False
    names = frame.f_locals
    args = names["args"]
    return is_ours(args[0] if args else getattr(names.get("func"), "__self__", None))


# --- asgiref ------------------------------------------------------------------------------------


def _hook_async_to_sync() -> None:
    """Under a running loop `async_to_sync(f)()` fails; green, it can wait for `f` in place.

    In a thread, `f` is lent the wrapper objects of that: see Note [Lent wrappers] in state.py.
    """
    call: Any = AsyncToSync.__call__

    @functools.wraps(call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if bridge.current() is not None:
            return bridge.await_(self.awaitable(*args, **kwargs))
        ours = {alias: connections[alias] for alias in connections if conf.alias_is_ours(alias)}
        with state.lending(ours), request.lend():
            return call(self, *args, **kwargs)

    AsyncToSync.__call__ = __call__  # type: ignore[method-assign]


def _hook_sync_to_async() -> None:
    """A thread inherits the context of the task: in the midst of a generator, with its block.

    In a test, with the test's.
    """
    call: Any = SyncToAsync.__call__

    @functools.wraps(call)
    async def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if generators.carried:
            block_context.settle()
        request.follow()
        if block_context.test_blocks:
            with block_context.in_tests():
                return await call(self, *args, **kwargs)
        return await call(self, *args, **kwargs)

    SyncToAsync.__call__ = __call__  # type: ignore[method-assign]


def _green_async_to_sync(func: Callable[..., Awaitable[Any]]) -> Callable[..., Any]:
    """asgiref's `async_to_sync`, with the coroutine green on whatever loop it runs."""

    @functools.wraps(func)
    async def green(*args: Any, **kwargs: Any) -> Any:
        return await bridge.portal(func(*args, **kwargs))  # type: ignore[arg-type]

    return async_to_sync(_bound_like(func, green))


def _bound_like(method: Any, function: Any) -> Any:
    """Let `function` name the object of `method`, as asgiref's wrappers do: Django asks for it."""
    if hasattr(method, "__self__"):
        function.__self__ = method.__self__
    return function


def _hop(policy: Policy) -> Callable[..., Any]:
    """Make a `sync_to_async` that runs the function green where `policy` says so."""

    def hop(func: Callable[..., Any] | None = None, **options: Any) -> Any:
        if func is None:
            return functools.partial(hop, **options)
        if policy is _orm and not conf.has_foreign_alias():
            return functools.partial(bridge.run, func)  # whatever it will be called with

        async def call(*args: Any, **kwargs: Any) -> Any:
            if policy(func, args, kwargs):
                return await bridge.run(func, *args, **kwargs)
            return await sync_to_async(func, **options)(*args, **kwargs)

        return _bound_like(func, call)

    return hop


# --- Policies -----------------------------------------------------------------------------------


def _orm(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """A method of the ORM: green if the database that it uses is pgbackend's."""
    if not conf.has_foreign_alias():
        return True
    alias = kwargs.get("using") or next(
        filter(None, map(_alias_of, (getattr(func, "__self__", None), *args))), None
    )
    return alias is not None and conf.alias_is_ours(alias)


def _alias_of(subject: Any) -> str | None:
    """The database that a QuerySet, manager, instance, session, or list of these, uses."""
    if isinstance(subject, list | tuple):
        return _alias_of(subject[0]) if subject else None
    if hasattr(subject, "_state"):
        used: str | None = subject._state.db  # noqa: SLF001 - documented by Django
        return used or router.db_for_write(type(subject), instance=subject)
    alias = getattr(subject, "db", None)
    if isinstance(alias, str):
        return alias
    model = getattr(subject, "model", None)
    return router.db_for_write(model) if inspect.isclass(model) else None  # type: ignore[arg-type]


def _receivers(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """The receivers of a signal: in place, as those of `send()`."""
    return not conf.has_foreign_alias()


# --- Django -------------------------------------------------------------------------------------

#: Each module that imported `sync_to_async` by name, and when its calls need no thread.
_HOPS: dict[str, Policy] = {
    "django.db.models.query": _orm,
    "django.db.models.base": _orm,
    "django.db.models.fields.related_descriptors": _orm,
    "django.core.paginator": _orm,
    "django.core.handlers.base": threads.in_request,
    "django.core.cache.backends.base": threads.in_cache,
    "django.core.handlers.exception": threads.in_error,
    "django.dispatch.dispatcher": _receivers,
    "django.utils.deprecation": threads.in_request,
}
#: The same, for modules of apps.
_APP_HOPS: dict[str, dict[str, Policy]] = {
    "django.contrib.auth": {
        "django.contrib.auth.backends": threads.in_auth,
        "django.contrib.auth.decorators": threads.in_auth,
    },
    "django.contrib.contenttypes": {"django.contrib.contenttypes.fields": _orm},
    "django.contrib.sessions": {"django.contrib.sessions.backends.db": _orm},
}


def _hook_django() -> None:
    hops = dict(_HOPS)
    for app, app_hops in _APP_HOPS.items():
        if apps.is_installed(app):
            hops.update(app_hops)
    for name, policy in hops.items():
        module = importlib.import_module(name)
        if hasattr(module, "sync_to_async"):
            module.sync_to_async = _hop(policy)  # type: ignore[attr-defined]
    # Async views under a sync middleware or WSGI, streams of theirs, receivers under send().
    for name in ("django.core.handlers.base", "django.dispatch.dispatcher", "django.http.response"):
        importlib.import_module(name).async_to_sync = _green_async_to_sync  # type: ignore[attr-defined]
    for app, hook in _TOOLS.items():
        if apps.is_installed(app):
            hook()
    _hook_handlers()
    _hook_wrappers()
    _hook_signals_of_requests()
    _hook_view_atomic()
    _hook_async_iteration()
    _hook_raw()
    _hook_channels()
    _hook_thread_locals()


def _hook_thread_locals() -> None:
    """Let values that packages and the project keep by thread follow requests.

    See thread_locals.py.

    Middleware is loaded with the handler, and views by the first request that looks for one.
    """
    thread_locals.begin(**conf.thread_locals())
    checks.register()
    load, resolve = BaseHandler.load_middleware, BaseHandler.resolve_request

    @functools.wraps(load)
    def load_middleware(self: Any, is_async: bool = False) -> None:
        load(self, is_async)
        thread_locals.look_at_new_modules()

    @functools.wraps(resolve)
    def resolve_request(self: Any, request: Any) -> Any:
        match = resolve(self, request)
        thread_locals.go_on()
        return match

    BaseHandler.load_middleware = load_middleware  # type: ignore[method-assign]
    BaseHandler.resolve_request = resolve_request  # type: ignore[method-assign]


def _hook_handlers() -> None:
    """A request runs in a portal, so that everything below its view is green."""
    from django.test.client import AsyncClientHandler

    _make_call_green(ASGIHandler)
    if is_on("handler") and if_djangos(ASGIHandler.handle) is not None:  # and nobody has patched it
        asgi.handle.__wrapped__ = ASGIHandler.handle  # type: ignore[attr-defined]
        ASGIHandler.handle = asgi.handle  # type: ignore[method-assign]
    test: Any = AsyncClientHandler.__call__

    @functools.wraps(test)
    async def __call__(self: Any, scope: Any) -> Any:
        token = request.begin()  # what its middleware sets is not the test's
        try:
            return await bridge.portal(test(self, scope))
        finally:
            request.end(token)

    AsyncClientHandler.__call__ = __call__  # type: ignore[method-assign]


def _make_call_green(cls: type[Any]) -> None:
    """Run each call of an ASGI application in a portal.

    The arguments are spelled out: uvicorn calls an application without any, to see whether it is a
    factory, and takes it for one unless that is a `TypeError`.
    """
    call = cls.__call__

    @functools.wraps(call)
    async def __call__(self: Any, scope: Any, receive: Any, send: Any) -> Any:
        token = request.begin()
        try:
            return await bridge.drive(call(self, scope, receive, send))
        finally:
            request.end(token)

    cls.__call__ = __call__


#: The loops that asgiref has made for threads which wait for them.
_loops_of_threads: Mapping[Any, Any] = AsyncToSync.loop_thread_executors


def _hook_wrappers() -> None:
    """A request is given the wrapper object of one that has ended, if there is one.

    A loop that was started for a thread which waits for it is given that thread's.
    """
    create = ConnectionHandler.create_connection

    @functools.wraps(create)
    def create_connection(self: ConnectionHandler, alias: str) -> Any:
        if self is connections and asyncio._get_running_loop() in _loops_of_threads:
            wrapper = state.lent(alias)
            if wrapper is not None:
                return wrapper
        if self is not connections or bridge.current() is None or not is_on("wrappers"):
            return create(self, alias)
        wrapper = wrappers.take(alias)
        if wrapper is None:
            wrapper = create(self, alias)
            wrappers.lend(wrapper)
        return wrapper

    ConnectionHandler.create_connection = create_connection  # type: ignore[method-assign]
    setting_changed.connect(wrappers.forget)


def _hook_signals_of_requests() -> None:
    """See Note [Tidying up after a request] in asgi.py."""
    for signal in (request_started, request_finished):
        for receiver in (close_old_connections, reset_queries):
            _replace_receiver(signal, receiver, asgi.where_needed(receiver))
        if asgi.sends_as_django:
            signal.send = functools.partial(asgi.send, signal)  # type: ignore[method-assign]
    if asgi.sends_as_django:
        asgi.asend.__wrapped__ = Signal.asend  # type: ignore[attr-defined]
        Signal.asend = asgi.asend  # type: ignore[method-assign]
    for name in ("django.core.handlers.asgi", "django.test.client"):
        importlib.import_module(name).sync_to_async = asgi.hop_of_response  # type: ignore[attr-defined]


def _replace_receiver(signal: Any, receiver: Any, by: Any) -> None:
    """Put `by` in the place of a receiver, if it is connected.

    The key stays: Django's tests disconnect and connect again what it stands for.
    """
    for place, (key, connected, *rest) in enumerate(signal.receivers):
        if isinstance(connected, ReferenceType) and connected() is receiver:
            signal.receivers[place] = (key, by, *rest)


def _hook_channels() -> None:
    """A consumer of channels is green, as a view is; a sync one handles messages in a thread."""
    try:
        consumer: Any = importlib.import_module("channels.consumer")
        database: Any = importlib.import_module("channels.db")
    except ImportError:  # not installed, or another package of this name
        return
    _make_call_green(consumer.AsyncConsumer)
    call = consumer.AsyncConsumer.__call__

    @functools.wraps(call)
    async def __call__(self: Any, scope: Any, receive: Any, send: Any) -> Any:
        thread_locals.go_on()  # consumers are loaded when the handler of requests has been made
        return await call(self, scope, receive, send)

    consumer.AsyncConsumer.__call__ = __call__
    database.sync_to_async = _hop_of_consumer


def _hop_of_consumer(func: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Before each message channels calls `close_old_connections`: in place and in the thread.

    That is asgiref's one thread, for consumers have none of their own; it is not started for this.
    """

    async def call(*args: Any, **kwargs: Any) -> None:
        await bridge.run(func, *args, **kwargs)
        if SyncToAsync.single_thread_executor._threads:  # noqa: SLF001
            await sync_to_async(func, **options)(*args, **kwargs)

    return call


def _hook_view_atomic() -> None:
    """`ATOMIC_REQUESTS` refuses async views, because atomic() did."""
    make_view_atomic = BaseHandler.make_view_atomic

    @functools.wraps(make_view_atomic)
    def hooked(self: Any, view: Callable[..., Any]) -> Callable[..., Any]:
        for settings_dict in connections.settings.values():  # in each request: no generator
            if settings_dict["ATOMIC_REQUESTS"]:
                break
        else:
            return view
        if not iscoroutinefunction(view):
            return make_view_atomic(self, view)
        exempt: set[str] = getattr(view, "_non_atomic_requests", set())
        for alias, settings_dict in connections.settings.items():
            if not settings_dict["ATOMIC_REQUESTS"] or alias in exempt:
                continue
            if not conf.engine_is_ours(settings_dict["ENGINE"]):
                return make_view_atomic(self, view)  # raises, as it does in Django
            view = transaction.atomic(using=alias)(view)
        return view

    BaseHandler.make_view_atomic = hooked  # type: ignore[method-assign]


#: Objects that are made of a chunk's rows at a time: few enough to be in the processor's cache when
#: they are looked at.
_AT_A_TIME = 100


def _hook_async_iteration() -> None:
    """`aiterator()` fetches its chunks green, and closes its cursor when it is closed."""
    from django.db.models.query import BaseIterable, QuerySet, RawQuerySet

    iterable: Any = BaseIterable
    in_threads = iterable._async_generator  # noqa: SLF001

    async def _async_generator(self: Any) -> AsyncIterator[Any]:
        if not conf.alias_is_ours(self.queryset.db):
            async for item in in_threads(self):
                yield item
            return
        rows = await bridge.run(iter, self)  # that of values() executes its statement in there
        maker = self.queryset.__dict__.get("_maker")
        try:
            while ready := await bridge.run(_take, rows, min(self.chunk_size, _AT_A_TIME)):
                if maker is not None:
                    state.leave_to(maker, connections[self.queryset.db])
                for item in ready:
                    yield item
        finally:
            if hasattr(rows, "close"):
                await bridge.run(rows.close)

    iterable._async_generator = _async_generator  # noqa: SLF001
    for cls in (QuerySet, RawQuerySet):
        _hook_aiter(cls)
    _hook_aiterator(QuerySet, iterable.__aiter__)


def _hook_aiterator(cls: Any, djangos_aiter: Any) -> None:
    """`aiterator()` hands out the generator of its rows, with none of its own around it.

    Each row would go through both; and to close the outer one would leave the inner one, with its
    cursor and its lease, to the garbage collector.

    Its steps may be made by other tasks, which end (`asyncio.wait_for()` on Python 3.11, a
    heartbeat): the connection then passes on to the task that has called `aiterator()`.
    """
    original = cls.aiterator
    # 2000; None from Django 6.2 on, which stands for 2000 where nothing is prefetched.
    default = inspect.signature(original).parameters["chunk_size"].default

    @functools.wraps(original)
    def aiterator(
        self: Any, chunk_size: int | None = default, *args: Any, **kwargs: Any
    ) -> AsyncIterator[Any]:
        ours = conf.alias_is_ours(self.db)
        if ours and bridge.current_task() is not None:
            self = _known_by(state.task_sessions(), self)
        size = 2000 if chunk_size is default is None else chunk_size
        if (
            args
            or kwargs
            or not isinstance(size, int)
            or size <= 0
            or self._prefetch_related_lookups
            or self._iterable_class.__aiter__ is not djangos_aiter
            or not ours
        ):
            rows: AsyncIterator[Any] = original(self, chunk_size, *args, **kwargs)
            return rows
        on_server = not connections.settings[self.db].get("DISABLE_SERVER_SIDE_CURSORS")
        return aiter(self._iterable_class(self, chunked_fetch=on_server, chunk_size=size))

    cls.aiterator = aiterator


def _known_by(maker: Any, queryset: Any) -> Any:
    """Return a twin of `queryset` that knows who has called `aiterator()`.

    The iterable of its rows, which Django makes at the first step, knows its QuerySet. What the
    caller has may be iterated by several tasks at once, copied and pickled.
    """
    twin = object.__new__(type(queryset))
    twin.__dict__.update(queryset.__dict__, _maker=maker)
    return twin


def _hook_raw() -> None:
    """The cursor of `raw()` holds no connection once its rows are in memory.

    Django keeps it for as long as somebody keeps the QuerySet, and never closes it.
    """
    execute: Any = RawQuery._execute_query  # type: ignore[attr-defined]  # noqa: SLF001

    @functools.wraps(execute)
    def _execute_query(self: Any) -> None:
        execute(self)
        if conf.alias_is_ours(self.using):
            let_go(getattr(self.cursor, "cursor", None))

    RawQuery._execute_query = _execute_query  # type: ignore[attr-defined]  # noqa: SLF001


def _hook_aiter(cls: Any) -> None:
    """`async for` of a QuerySet fetches its rows in a coroutine, not in an async generator.

    Before Python 3.13 a coroutine that is closed does not close the generator that it iterates: the
    statement, and its lease, would be the garbage collector's.
    """
    original = cls.__aiter__

    @functools.wraps(original)
    def __aiter__(self: Any) -> Any:
        return _FetchedRows(self) if conf.alias_is_ours(self.db) else original(self)

    cls.__aiter__ = __aiter__


class _FetchedRows:
    """The rows of a QuerySet, fetched at the first step, green."""

    __slots__ = ("_queryset", "_rows")

    def __init__(self, queryset: Any) -> None:
        self._queryset = queryset
        self._rows: Any = None

    def __aiter__(self) -> _FetchedRows:
        return self

    def __anext__(self) -> Awaitable[Any]:
        next_row: Awaitable[Any] = self._first() if self._rows is None else self._rows.__anext__()
        return next_row

    async def _first(self) -> Any:
        await bridge.run(self._queryset._fetch_all)  # noqa: SLF001
        self._rows = _each(self._queryset._result_cache)  # noqa: SLF001
        return await self._rows.__anext__()


async def _each(rows: list[Any]) -> AsyncIterator[Any]:
    for row in rows:
        yield row


def _hook_silk() -> None:
    """django-silk keeps what it collects by thread: that of its middleware, a synchronous one.

    The statements of an async view would be run in that thread too; here they run on the loop,
    beside those of other requests. So what belongs to a request is kept by context.
    """
    collector: Any = importlib.import_module("silk.collector").DataCollector()
    collector.local = Local()
    collector.clear()


def _hook_debug_toolbar() -> None:
    """The SQL panel watches the connections of the thread in which Django would run async code.

    That thread still runs a request's synchronous code; the statements of an async view are made
    on the loop.
    """
    panel: Any = importlib.import_module("debug_toolbar.panels.sql").SQLPanel
    enable = panel.aenable_instrumentation

    @functools.wraps(enable)
    async def aenable_instrumentation(self: Any) -> None:
        self.enable_instrumentation()
        await enable(self)

    panel.aenable_instrumentation = aenable_instrumentation


#: Tools that look for statements where Django would make them.
_TOOLS: dict[str, Callable[[], None]] = {
    "debug_toolbar": _hook_debug_toolbar,
    "silk": _hook_silk,
}


def _take(rows: Any, size: int) -> list[Any]:
    return list(islice(rows, size))
