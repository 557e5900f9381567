"""Rebinds attributes of Django, asgiref and other packages: the table of all, and `install()`.

So the one setting `ENGINE` is enough. Django offers no hook where it calls `sync_to_async`, enters
`Atomic` or makes a wrapper object: each such place is a row of `HOOKS`, with its reason. Other
modules have the replacements, by idea: atomic_methods.py, async_unsafe.py, hops.py, asgi.py,
request_signals.py, iteration.py, other_packages.py; threads.py decides which functions run in
place. With other engines, the replacements do what the originals do.

A row whose target is missing raises an error when it is installed: a new version of Django, or of
another package, has moved the target. Without an error, the project would run without the
replacement, and nobody would notice.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import django
from django.apps import apps
from django.core.exceptions import ImproperlyConfigured

from . import (
    asgi,
    async_unsafe,
    atomic_methods,
    checks,
    conf,
    hops,
    iteration,
    other_packages,
    request_signals,
    thread_locals,
    threads,
)

#: The Django versions that this table was written for, from the first to the last.
FIRST, LAST = (5, 2), (6, 1)


@dataclass(frozen=True)
class Hook:
    """One row of the table: an attribute of another package's object, and its replacement."""

    target: str
    """The owner of the attribute: ``module``, ``module:name``, or ``module:Class()`` for the one
    object of a singleton class."""
    attribute: str
    replace: Callable[[Any], Any]
    """Is given the original; returns its replacement, or the original itself to change nothing."""
    reason: str
    """A sentence that says what would go wrong, or be missing, without the hook."""
    since: tuple[int, int] = FIRST
    """The first version of Django that needs the hook."""
    before: tuple[int, int] | None = None
    """The first version of Django that does not need the hook any more."""
    adds: bool = False
    """True if the hook adds an attribute that the target does not have."""
    at_once: bool = False
    """True if the hook is installed when the backend is loaded; others wait for the models."""
    app: str = ""
    """The hook is installed only if this app is in `INSTALLED_APPS`."""
    modules: tuple[str, ...] = ()
    """The hook is installed only if these modules can be imported: for a package that is no app."""

    def __str__(self) -> str:
        return f"{self.target}.{self.attribute}"

    @property
    def is_needed(self) -> bool:
        """Return whether the installed Django, apps and packages need this hook."""
        return (
            self.since <= django.VERSION[:2]
            and (self.before is None or django.VERSION[:2] < self.before)
            and (not self.app or apps.is_installed(self.app))
            and all(map(_is_installed, self.modules))
        )

    def find_target(self) -> object:
        """Return the object whose attribute is rebound.

        Raises `ImproperlyConfigured` if the object, or its attribute, is missing.
        """
        module, _, name = self.target.partition(":")
        try:
            target = importlib.import_module(module)
            if name:
                target = getattr(target, name.removesuffix("()"))
            if name.endswith("()"):
                target = target()  # type: ignore[operator]
        except (ImportError, AttributeError) as exc:
            raise self._missing(f"there is no {self.target}") from exc
        if not self.adds and not _has(target, self.attribute):
            raise self._missing(f"{self.target} has no attribute {self.attribute!r}")
        return target

    def _missing(self, cause: str) -> ImproperlyConfigured:
        first, last = (".".join(map(str, version)) for version in (FIRST, LAST))
        package = self.target.partition(".")[0].partition(":")[0]
        theirs = "" if package == "django" else f" and a release of {package} that has it"
        return ImproperlyConfigured(
            f"pgbackend must replace {self}, but {cause} with Django {django.__version__}. Why it "
            f"is replaced: {self.reason} Cure: install a Django from {first} to {last}{theirs}, or "
            "a release of pgbackend that was written for the installed versions."
        )


def _has(target: object, attribute: str) -> bool:
    """Return whether `target` has `attribute`.

    If `target` is a class, attributes of `object`, and of its metaclass `type`, do not count.
    """
    if not inspect.isclass(target):
        return hasattr(target, attribute)
    return any(attribute in vars(cls) for cls in target.__mro__ if cls is not object)


def _is_installed(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:  # not installed, or another package of this name
        return False
    return True


# --- The table ------------------------------------------------------------------------------------

_ATOMIC = "django.db.transaction:Atomic"
_HANDLER = "django.core.handlers.base:BaseHandler"
_QUERY = "django.db.models.query"

_ORM_IN_THREADS = "The ORM's a-methods would send each statement to a thread."
_IN_THREADS = "Each request would need a thread for synchronous code of Django's own."
_CLOSING = "Each request would start a thread, to close its response."
_REFUSED = "Coroutines that synchronous code waits for could not use the ORM's plain methods."
_HASHING = "Sync views that run on the loop would stop it while they hash a password."
_AUTH = "django.contrib.auth"


def _thread(module: str, policy: hops.Policy, reason: str, **conditions: Any) -> Hook:
    """Return a hook that replaces `sync_to_async` in a module of Django's; see `hops.Policy`."""
    return Hook(module, "sync_to_async", hops.make_sync_to_async(policy), reason, **conditions)


#: The table. It is also a seam: a shortcut that replaces a function of Django's adds a row before
#: `install()`. Without the row, the plain way is Django's function.
HOOKS: list[Hook] = [
    Hook(
        _ATOMIC,
        "__enter__",
        atomic_methods.make_enter,
        "Tasks that share a transaction would enter each other's blocks.",
        at_once=True,
    ),
    Hook(
        _ATOMIC,
        "__exit__",
        atomic_methods.make_exit,
        "A cancellation could come after the end of a block, before waiting tasks are told of it.",
        at_once=True,
    ),
    Hook(
        _ATOMIC,
        "__aenter__",
        atomic_methods.make_aenter,
        "`async with atomic()` needs it.",
        adds=True,
        at_once=True,
    ),
    Hook(
        _ATOMIC,
        "__aexit__",
        atomic_methods.make_aexit,
        "`async with atomic()` needs it.",
        adds=True,
        at_once=True,
    ),
    Hook(
        _ATOMIC,
        "__call__",
        atomic_methods.make_call,
        "A block around a coroutine function would end when the coroutine is made.",
        at_once=True,
    ),
    Hook(
        "django.utils.asyncio",
        "get_running_loop",
        async_unsafe.make_get_running_loop,
        "Methods of derived wrappers, which carry `async_unsafe`, would refuse green code.",
        at_once=True,
    ),
    Hook(
        "django.db.backends.dummy.base:DatabaseWrapper",
        "cursor",
        inspect.unwrap,
        "On a loop, a missing DATABASES would be reported as a blocking call.",
        at_once=True,
    ),
    Hook(
        "asgiref.sync:AsyncToSync",
        "__call__",
        hops.make_call_of_async_to_sync,
        "`async_to_sync(f)()` would fail in green code, for a loop runs there.",
        at_once=True,
    ),
    Hook(
        "asgiref.sync:SyncToAsync",
        "__call__",
        hops.make_call_of_sync_to_async,
        "A thread would not take part in the block of the generator, or the test, that calls it.",
        at_once=True,
    ),
    # Threads for the ORM.
    _thread(_QUERY, hops.of_the_orm, _ORM_IN_THREADS),
    _thread("django.db.models.base", hops.of_the_orm, _ORM_IN_THREADS),
    _thread("django.db.models.fields.related_descriptors", hops.of_the_orm, _ORM_IN_THREADS),
    _thread("django.core.paginator", hops.of_the_orm, _ORM_IN_THREADS, since=(6, 0)),
    _thread(
        "django.contrib.contenttypes.fields",
        hops.of_the_orm,
        _ORM_IN_THREADS,
        app="django.contrib.contenttypes",
    ),
    _thread(
        "django.contrib.sessions.backends.db",
        hops.of_the_orm,
        _ORM_IN_THREADS,
        app="django.contrib.sessions",
    ),
    # Threads for the rest of a request.
    _thread("django.core.handlers.base", threads.in_request, _IN_THREADS),
    _thread("django.core.cache.backends.base", threads.in_cache, _IN_THREADS),
    _thread("django.core.handlers.exception", threads.in_error, _IN_THREADS),
    _thread("django.dispatch.dispatcher", hops.of_receivers, _IN_THREADS),
    _thread("django.utils.deprecation", threads.in_request, _IN_THREADS),
    _thread("django.contrib.auth.backends", threads.in_auth, _IN_THREADS, app=_AUTH),
    _thread("django.contrib.auth.decorators", threads.in_auth, _IN_THREADS, app=_AUTH),
    # Coroutines that Django calls from sync code: async views, async streams, async receivers.
    Hook("django.core.handlers.base", "async_to_sync", hops.make_async_to_sync, _REFUSED),
    Hook("django.dispatch.dispatcher", "async_to_sync", hops.make_async_to_sync, _REFUSED),
    Hook("django.http.response", "async_to_sync", hops.make_async_to_sync, _REFUSED),
    # Work that would stop the loop.
    *(
        Hook(module, name, hops.make_hashing, _HASHING, app=_AUTH)
        for module, name in (
            (f"{_AUTH}.hashers", "verify_password"),
            (f"{_AUTH}.hashers", "make_password"),
            (f"{_AUTH}.base_user", "make_password"),
            (f"{_AUTH}.models", "make_password"),
        )
    ),
    # Requests.
    Hook(
        "django.core.handlers.asgi:ASGIHandler",
        "__call__",
        asgi.make_call,
        "Requests would not be green, and would share the values of the loop's thread.",
    ),
    Hook(
        "django.test.client:AsyncClientHandler",
        "__call__",
        asgi.make_call_of_test_client,
        "Requests of the async test client would not be green.",
    ),
    Hook(
        _HANDLER,
        "make_view_atomic",
        asgi.make_view_atomic,
        "`ATOMIC_REQUESTS` would refuse async views.",
    ),
    Hook(
        _HANDLER,
        "load_middleware",
        asgi.make_load_middleware,
        "The `threading.local` objects of middleware would be shared by all requests.",
    ),
    Hook(
        _HANDLER,
        "resolve_request",
        asgi.make_resolve_request,
        "The `threading.local` objects of modules that views load would be shared by all requests.",
    ),
    Hook(
        "django.db.utils:ConnectionHandler",
        "create_connection",
        asgi.make_create_connection,
        "Under `async_to_sync()` in a thread, nothing set on the thread's wrapper would be seen.",
    ),
    Hook(
        "django.core.signals:request_started",
        "receivers",
        request_signals.replace_receivers,
        "Each request would look all connections up, although most have nothing to tidy up.",
    ),
    Hook(
        "django.core.signals:request_finished",
        "receivers",
        request_signals.replace_receivers,
        "Each request would look all connections up, although most have nothing to tidy up.",
    ),
    Hook(
        "django.dispatch:Signal",
        "asend",
        request_signals.make_asend,
        "Each request would start a thread, to call the receivers of its signals.",
    ),
    Hook(
        "django.core.handlers.asgi",
        "sync_to_async",
        request_signals.make_sync_to_async,
        _CLOSING,
    ),
    Hook(
        "django.test.client",
        "sync_to_async",
        request_signals.make_sync_to_async,
        _CLOSING,
    ),
    # Rows.
    Hook(
        f"{_QUERY}:BaseIterable",
        "_async_generator",
        iteration.make_async_generator,
        "`aiterator()` would fetch each chunk in a thread.",
    ),
    Hook(
        f"{_QUERY}:QuerySet",
        "__aiter__",
        iteration.make_aiter,
        "`async for` would leave its lease to the garbage collector when it is cancelled.",
    ),
    Hook(
        f"{_QUERY}:RawQuerySet",
        "__aiter__",
        iteration.make_aiter,
        "`async for` would leave its lease to the garbage collector when it is cancelled.",
    ),
    Hook(
        f"{_QUERY}:QuerySet",
        "aiterator",
        iteration.make_aiterator,
        "Closing the iterator would leave its cursor, with the lease, to the garbage collector.",
    ),
    Hook(
        "django.db.models.sql.query:RawQuery",
        "_execute_query",
        iteration.make_execute_query,
        "The cursor of `raw()` would hold its connection for as long as the QuerySet is kept.",
    ),
    # Other packages.
    Hook(
        "channels.consumer:AsyncConsumer",
        "__call__",
        other_packages.make_call_of_consumer,
        "Consumers would not be green.",
        modules=("channels.consumer", "channels.db"),
    ),
    Hook(
        "channels.db",
        "sync_to_async",
        other_packages.make_sync_to_async_of_consumer,
        "Each message would start asgiref's thread, only to look whether it has connections.",
        modules=("channels.consumer", "channels.db"),
    ),
    Hook(
        "debug_toolbar.panels.sql:SQLPanel",
        "aenable_instrumentation",
        other_packages.make_instrumentation_of_toolbar,
        "The SQL panel would not see the statements of async views.",
        app="debug_toolbar",
    ),
    Hook(
        "silk.collector:DataCollector()",
        "local",
        other_packages.make_local_of_silk,
        "The statements of requests that run at the same time would be mixed up.",
        app="silk",
    ),
]


# --- Installing it --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rebound:
    """An installed hook, with the original attribute and its replacement."""

    hook: Hook
    original: object
    replacement: object


#: The installed hooks.
installed: list[Rebound] = []
_has_begun = False


def install() -> None:
    """Install all hooks of the table, once; most of them as soon as the app registry is ready."""
    global _has_begun  # noqa: PLW0603 - a process has one Django
    if _has_begun:
        return
    rebind(hook for hook in HOOKS if hook.at_once)
    _has_begun = True
    _when_ready(_install_the_rest)


def _install_the_rest() -> None:
    rebind(hook for hook in HOOKS if not hook.at_once)
    thread_locals.begin(**conf.thread_locals())
    checks.register()


def rebind(hooks: Iterable[Hook]) -> None:
    """Install those of `hooks` that are needed.

    If a target is missing, raises `ImproperlyConfigured`, and installs none.
    """
    found = [(hook, hook.find_target()) for hook in hooks if hook.is_needed]
    for hook, target in found:
        original = None if hook.adds else getattr(target, hook.attribute)
        replacement = hook.replace(original)
        if replacement is not original:
            setattr(target, hook.attribute, replacement)
        installed.append(Rebound(hook, original, replacement))


def _when_ready(callback: Callable[[], None]) -> None:
    # The backend is imported while models load, and Django has no signal for the end of that.
    if apps.ready:
        callback()
        return
    set_ready = apps.ready_event.set

    def ready() -> None:
        set_ready()
        callback()

    apps.ready_event.set = ready  # type: ignore[method-assign]
