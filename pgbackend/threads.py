"""Decides which functions of a request run in place, on the loop, and which keep their thread.

Django calls the sync code of a request in the request's thread, by `sync_to_async`. hops.py
replaces that, and asks a policy of this module at each call: True means in place (green), False
means the thread. A function runs in place if all code that it may call is Django's own, and none of
that blocks. Statements do not count as blocking, because they wait on the loop. In a request of
`pgbackend.get_asgi_application()` every function runs in place.

Note [Django's own code]
The module of a function's globals proves who wrote it; `__module__` and `__wrapped__` do not, since
`functools.wraps` copies them. A function of Django's may call other code that it was given: a
decorator calls a view, `user_passes_test()` a test, `as_view()` methods of a class. All that is in
the function's closure, so the closure must be Django's, too. A class counts as Django's if its
bases outside of Django hold no code that is not Django's. A view or middleware class of the
project's never counts. Methods of models, managers and QuerySets count as Django's,
because the ORM calls them in any case. So do the hooks of a ModelAdmin (`get_queryset()`,
`save_model()`): admin pages keep their thread only if the project has written the view itself.

Note [Chains of sync middleware]
Django joins adjacent sync middleware in one chain, and hops to a thread once, with the outermost.
Each middleware knows the next, by its `get_response` or its closure, so one look at what the
outermost holds covers the chain. Django's own middleware can be async, and is sync only if the next
one below is sync: so the innermost of a chain is the project's, and no chain runs in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import FunctionType, MethodType, WrapperDescriptorType
from typing import Any, NamedTuple

from django.apps import apps
from django.core.exceptions import PermissionDenied
from django.core.handlers.base import BaseHandler
from django.db import models, router
from django.db.models.manager import BaseManager
from django.http import Http404
from django.template.response import SimpleTemplateResponse
from django.urls import get_resolver, get_urlconf
from django.utils.functional import cached_property
from django.utils.module_loading import import_string
from django.views import View

from . import conf
from .hybrid import GreenMiddleware
from .request import is_whole_stack

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


# --- Where Django hops to a thread ----------------------------------------------------------------


def in_request(func: Callable[..., Any], args: Args, kwargs: Kwargs) -> bool:
    """Return whether `func`, which serves a request, runs in place.

    `func` is a method of a middleware, a chain of middleware, a view, or a part of the handler.
    """
    if is_whole_stack():
        return True
    if conf.has_foreign_alias():
        return False
    try:
        # The type is part of the key, because the proxy of a tracing tool equals the method.
        key = type(func), type(func.__self__), func.__func__  # type: ignore[attr-defined]
        may_block = _usual[key]
    except (AttributeError, KeyError, TypeError):
        return _unusual(func, args, kwargs)
    return may_block is None or not may_block(func.__self__, args)  # type: ignore[attr-defined]


def _unusual(func: Callable[..., Any], args: Args, kwargs: Kwargs) -> bool:
    """Return whether a function that is not in `_usual` runs in place."""
    owner = getattr(func, "__self__", None)
    if owner is None:
        return _function(func, args, kwargs)
    if type(owner) not in _known and (known := _learn(type(owner))) is not None:
        is_own = type(func) is MethodType and func.__func__ in known.functions
        return is_own and known.runs_in_place(owner, args)
    if isinstance(owner, BaseHandler):  # process_exception_by_middleware()
        handlers: list[Any] = owner._exception_middleware  # type: ignore[attr-defined]  # noqa: SLF001
        return _is_djangos_function(func) and all(map(_is_green, handlers))
    if isinstance(owner, SimpleTemplateResponse):
        return _rendering(func, owner)
    return _view(func, args, kwargs)


def _is_green(method: object) -> bool:
    return type(getattr(method, "__self__", None)) is GreenMiddleware


def in_auth(func: Callable[..., Any], args: Args, kwargs: Kwargs) -> bool:
    """Return whether `func`, a method of an auth backend or a test of a user, runs in place."""
    return is_whole_stack() or (not conf.has_foreign_alias() and is_all_djangos(func))


def in_error(func: Callable[..., Any], args: Args, kwargs: Kwargs) -> bool:
    """Return whether the response to an exception is made in place.

    That is so for `Http404` and `PermissionDenied`, if Django's own error view makes the response.
    """
    if is_whole_stack():
        return True
    if conf.has_foreign_alias() or not _is_djangos_function(func):
        return False
    statuses = ((Http404, 404), (PermissionDenied, 403))
    status = next((code for kind, code in statuses if isinstance(args[1], kind)), None)
    if status is None:
        return False
    view = get_resolver(get_urlconf()).resolve_error_handler(status)
    return is_all_djangos(view, args[:1]) and not users_may_block()


def in_cache(func: Callable[..., Any], args: Args, kwargs: Kwargs) -> bool:
    """Return whether `func`, a method of a cache, runs in place.

    It does if the cache is in memory, or in a table of a database whose engine is pgbackend.
    """
    cache = getattr(func, "__self__", None)
    name = f"{type(cache).__module__}.{type(cache).__qualname__}"
    if name != _CACHE_IN_A_TABLE:
        return name in _CACHES_IN_MEMORY
    model: Any = cache.cache_model_class  # type: ignore[union-attr]
    return conf.alias_is_ours(router.db_for_write(model))


_CACHES_IN_MEMORY = (
    "django.core.cache.backends.dummy.DummyCache",
    "django.core.cache.backends.locmem.LocMemCache",
)
_CACHE_IN_A_TABLE = "django.core.cache.backends.db.DatabaseCache"


def _function(func: Callable[..., Any], args: Args, kwargs: Kwargs) -> bool:
    """Return whether `func`, which is no method and mostly a view, runs in place."""
    if getattr(func, "__name__", "") == "log_response" and _is_djangos_function(func):
        return bool(kwargs["response"].status_code < 500)  # from 500 on, logging may send mail
    return _view(func, args, kwargs)


def _view(view: Callable[..., Any], args: Args, kwargs: Kwargs) -> bool:
    """Return whether `view` runs in place; False also if `kwargs` hold code that may block."""
    if not is_all_djangos(view, args) or (kwargs and not is_all_djangos(kwargs, args)):
        return False
    module, name = getattr(view, "__module__", ""), getattr(view, "__name__", "")
    if module in _MODULES_THAT_HASH or (module, name) == ("django.contrib.admin.sites", "login"):
        works = not args or getattr(args[0], "method", None) not in ("GET", "HEAD")
    else:
        works = module in _MODULES_THAT_BLOCK
    return not works and not users_may_block()


#: Modules whose views read files from disk.
_MODULES_THAT_BLOCK = ("django.contrib.staticfiles.views", "django.views.static")
#: Modules with views that hash a posted password.
_MODULES_THAT_HASH = ("django.contrib.auth.admin", "django.contrib.auth.views")


def _rendering(render: Callable[..., Any], response: Any) -> bool:
    """Return whether `render()` of `response`, which also calls its callbacks, runs in place."""
    return (
        is_all_djangos(render)
        and all(is_all_djangos(callback) for callback in response._post_render_callbacks)  # noqa: SLF001
        and not users_may_block()
    )


# --- What may block below Django's functions ------------------------------------------------------


def users_may_block() -> bool:
    """Return whether the first use of `request.user`, or of a permission, may block."""
    return sessions_may_block() or not all(map(_is_backend_djangos, _backends()))


def _backends() -> Iterable[str]:
    if not apps.is_installed("django.contrib.auth"):
        return ()
    backends: Iterable[str] = conf.of_project("AUTHENTICATION_BACKENDS")
    return backends


def _is_backend_djangos(name: str) -> bool:
    """Return whether the auth backend `name` has Django's methods for users and permissions."""
    if name.startswith("django."):
        return True
    try:
        backend = import_string(name)
    except ImportError:  # Django raises this itself, when it loads the backend
        return False
    methods = (getattr(backend, method, None) for method in _ASKED_OF_BACKENDS)
    return all(method is None or _is_djangos_function(method) for method in methods)


_ASKED_OF_BACKENDS = ("get_user", "has_perm", "has_module_perms", "get_all_permissions")


def sessions_may_block() -> bool:
    """Return whether loading or saving a session of `django.contrib.sessions` may block."""
    engine = conf.of_project("SESSION_ENGINE")
    if engine in _SESSIONS_THAT_DO_NOT_BLOCK:
        return False
    if engine in _SESSIONS_IN_CACHES:
        return cache_may_block(conf.of_project("SESSION_CACHE_ALIAS"))
    return True


_SESSIONS_THAT_DO_NOT_BLOCK = (
    "django.contrib.sessions.backends.db",
    "django.contrib.sessions.backends.signed_cookies",
)
_SESSIONS_IN_CACHES = (
    "django.contrib.sessions.backends.cache",
    "django.contrib.sessions.backends.cached_db",
)


def cache_may_block(alias: str) -> bool:
    """Return whether the cache `alias` may block, assuming that all databases use pgbackend."""
    backend = conf.of_project("CACHES").get(alias, {}).get("BACKEND")
    return backend not in (*_CACHES_IN_MEMORY, _CACHE_IN_A_TABLE)


def _session(middleware: object, args: Args) -> bool:
    return sessions_may_block()


def _user(middleware: object, args: Args) -> bool:
    return users_may_block()


def _messages(middleware: object, args: Args) -> bool:
    storage = conf.of_project("MESSAGE_STORAGE")
    if storage == "django.contrib.messages.storage.cookie.CookieStorage":
        return False
    return sessions_may_block() or not storage.startswith("django.")


def _csrf(middleware: object, args: Args) -> bool:
    """Return whether the CSRF check may block.

    Return True if it reads a session that may block. Else return False for GET, HEAD, OPTIONS and
    TRACE. For other methods, return True if the failure view or an upload handler is not Django's,
    if `users_may_block()`, or if the form may be too long to be kept in memory.
    """
    if conf.of_project("CSRF_USE_SESSIONS") and sessions_may_block():
        return True
    request = args[0] if args else None
    if getattr(request, "method", None) in ("GET", "HEAD", "OPTIONS", "TRACE"):
        return False
    refuses = conf.of_project("CSRF_FAILURE_VIEW")
    if refuses != "django.views.csrf.csrf_failure" or users_may_block():
        return True
    uploads = all(name.startswith("django.") for name in conf.of_project("FILE_UPLOAD_HANDLERS"))
    return not uploads or _length(request) > conf.most_in_memory()


def _length(request: Any) -> int:
    """Return the request's CONTENT_LENGTH, in bytes; 0 if there is none."""
    try:
        return int(request.META.get("CONTENT_LENGTH") or 0)
    except (AttributeError, ValueError):
        return 0


def _cache(middleware: Any, args: Args) -> bool:
    return cache_may_block(middleware.cache_alias)


def _compression(middleware: object, args: Args) -> bool:
    """Return True if compressing the response may block: if it has more than 32 KiB.

    From there on it takes a millisecond or more. Returns False for a response that is streamed.
    """
    response = args[1] if len(args) > 1 else None
    return response is not None and not response.streaming and len(response.content) > 32 * 1024


def _broken_link(middleware: object, args: Args) -> bool:
    """Return True if the middleware may send mail, which blocks: for a 404, or no response yet."""
    return len(args) < 2 or args[1].status_code == 404


#: Django's middleware, and a function that tells whether it may block; None: it never does. All
#: other middleware is taken to block.
_MIDDLEWARE: dict[str, Callable[[Any, Args], bool] | None] = {
    "django.contrib.admindocs.middleware.XViewMiddleware": _user,
    "django.contrib.auth.middleware.AuthenticationMiddleware": None,  # request.user is lazy
    "django.contrib.auth.middleware.LoginRequiredMiddleware": _user,
    "django.contrib.flatpages.middleware.FlatpageFallbackMiddleware": _user,
    "django.contrib.messages.middleware.MessageMiddleware": _messages,
    "django.contrib.redirects.middleware.RedirectFallbackMiddleware": None,
    "django.contrib.sessions.middleware.SessionMiddleware": _session,
    "django.contrib.sites.middleware.CurrentSiteMiddleware": None,
    "django.middleware.cache.CacheMiddleware": _cache,
    "django.middleware.cache.FetchFromCacheMiddleware": _cache,
    "django.middleware.cache.UpdateCacheMiddleware": _cache,
    "django.middleware.clickjacking.XFrameOptionsMiddleware": None,
    "django.middleware.common.BrokenLinkEmailsMiddleware": _broken_link,
    "django.middleware.common.CommonMiddleware": None,
    "django.middleware.csp.ContentSecurityPolicyMiddleware": None,
    "django.middleware.csrf.CsrfViewMiddleware": _csrf,
    "django.middleware.gzip.GZipMiddleware": _compression,
    "django.middleware.http.ConditionalGetMiddleware": None,
    "django.middleware.locale.LocaleMiddleware": None,
    "django.middleware.security.SecurityMiddleware": None,
    "django.views.decorators.csrf._EnsureCsrfCookie": _csrf,
    "django.views.decorators.csrf._EnsureCsrfToken": _csrf,
}


class _Middleware(NamedTuple):
    """Describes a class of Django's middleware; kept in `_known` while the process lives."""

    functions: frozenset[Any]
    """The functions of the class and its bases; empty if one of them is patched."""
    may_block: Callable[[Any, Args], bool] | None

    def runs_in_place(self, middleware: object, args: Args) -> bool:
        blocks = self.may_block
        return bool(self.functions) and (blocks is None or not blocks(middleware, args))


_known: dict[type[Any], _Middleware] = {}
#: The `may_block` of each known method, by the types of the method and of its object, and by its
#: function: each request makes a dozen such calls.
_usual: dict[tuple[type[Any], type[Any], Any], Callable[[Any, Args], bool] | None] = {}


def _learn(cls: type[Any]) -> _Middleware | None:
    """Return a description of the class `cls`; None if `cls` is no middleware of Django's.

    The description is kept in `_known`, unless a method of `cls` is patched: the patch may be
    undone. With the description of a patched class, no method runs in place.
    """
    name = f"{cls.__module__}.{cls.__qualname__}"
    if name not in _MIDDLEWARE:
        return None
    members = {key: member for base in cls.__mro__[::-1] for key, member in vars(base).items()}
    functions = [member for member in members.values() if isinstance(member, FunctionType)]
    if not all(map(_is_djangos_function, functions)):
        return _Middleware(frozenset(), None)  # patched; not kept, since the patch may be undone
    known = _known[cls] = _Middleware(frozenset(functions), _MIDDLEWARE[name])
    _usual.update({(MethodType, cls, function): known.may_block for function in functions})
    return known


# --- Note [Django's own code] ---------------------------------------------------------------------


def is_all_djangos(thing: object, args: Args = ()) -> bool:
    """Return whether all code that `thing` may run, and all that it holds, is Django's own.

    `patches.unpatched()` asks less: whether one function is Django's own.

    Also returns False if `thing` holds a middleware that may block when it is called with `args`.
    """
    return _Look(args).is_all_djangos(thing)


class _Look:
    """One search through the objects that a function holds, and all that these hold in turn."""

    def __init__(self, args: Args) -> None:
        self._args = args
        #: The objects seen so far, by identity: closures may hold themselves.
        self._met: dict[int, Any] = {}

    def is_all_djangos(self, thing: object) -> bool:
        if id(thing) in self._met:
            return True
        self._met[id(thing)] = thing
        if type(thing) is FunctionType and not _is_djangos_function(thing):
            return False
        held = _held_by(thing)
        return self._is_object_djangos(thing) if held is None else self._all(held)

    def _is_object_djangos(self, thing: Any) -> bool:
        cls = type(thing)  # not `__class__`, which would evaluate a lazy object
        if issubclass(cls, type):
            return self._is_class_djangos(thing)
        known = _known.get(cls) or _learn(cls)
        if known is None:
            is_middleware = "get_response" in getattr(thing, "__dict__", ())
            return not is_middleware and self._is_class_djangos(cls)
        return known.runs_in_place(thing, self._args) and self.is_all_djangos(thing.get_response)

    def _all(self, things: Iterable[Any]) -> bool:
        return all(map(self.is_all_djangos, things))

    def _is_class_djangos(self, cls: type[Any]) -> bool:
        if issubclass(cls, _ORM) or any(base.__module__ in _ADMIN for base in cls.__mro__):
            return True
        others = [base for base in cls.__mro__ if not _is_of_django(base.__module__)]
        if others and issubclass(cls, View):
            return False
        if any(type(vars(base).get("__call__")) is WrapperDescriptorType for base in others):
            return False  # C code, which may call anything: the proxies of wrapt
        members = (item for base in others for item in vars(base).items())
        return self._all(member for name, member in members if not name.startswith("__annotate"))


_ORM = (models.Model, models.QuerySet, BaseManager)
_ADMIN = ("django.contrib.admin.options", "django.contrib.admin.sites")
#: Types whose objects hold functions, and the attributes that hold them.
_PARTS: dict[type[Any], tuple[str, ...]] = {
    MethodType: ("__func__", "__self__"),
    cached_property: ("func",),
    classmethod: ("__func__",),
    functools.partial: ("func", "args", "keywords"),
    type(functools.cache(len)): ("__wrapped__",),
    property: ("fget", "fset"),
    staticmethod: ("__func__",),
}
#: Modules of the standard library whose functions do not block, nor call code from elsewhere. This
#: is a list because a project's app may have the name of another module of the standard library.
_PLAIN = {
    *("_thread", "abc", "builtins", "collections", "contextlib", "datetime", "decimal", "enum"),
    *("functools", "operator", "pathlib", "pathlib._local", "re", "types", "uuid", "zoneinfo"),
}


def _is_of_django(module: object) -> bool:
    return isinstance(module, str) and (module.startswith("django.") or module in _PLAIN)


def _is_djangos_function(function: object) -> bool:
    """Return whether the module of a function's globals is Django's; `function` may be a method."""
    if type(function) is MethodType:
        function = function.__func__
    return type(function) is FunctionType and _is_of_django(function.__globals__.get("__name__"))


def _held_by(thing: Any) -> Iterable[Any] | None:
    """Return the objects in a function's closure, or in a container; None if `thing` is neither."""
    cls = type(thing)
    if cls is FunctionType:
        return _closure(thing)
    if cls in _PARTS:
        return [getattr(thing, name) for name in _PARTS[cls]]
    if issubclass(cls, dict):
        held: Iterable[Any] = thing.values()
        return held
    return thing if issubclass(cls, list | tuple | set | frozenset) else None


def _closure(function: Any) -> Iterable[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # the cell is still empty
            continue
