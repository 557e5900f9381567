"""Makes sync middleware hybrid: served green in an async chain, and as it is in a sync one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction

from .driver import bridge


def hybrid_middleware(factory: Callable[..., Any], /) -> Callable[..., Any]:
    """Return a middleware factory that runs the sync middleware of `factory` green, on the loop.

    `factory` is a class or function, as `MIDDLEWARE` names them; this may decorate it. In an async
    chain the middleware uses no thread, and its statements do not block the loop; in a sync chain
    (WSGI) it is used as it is. Other blocking calls in it (`requests`) would block the loop.

    For a middleware of another package, name the result in the settings::

        tenant = hybrid_middleware(package.TenantMiddleware)  # MIDDLEWARE: "project.module.tenant"
    """

    @functools.wraps(factory, updated=())
    def make(get_response: Callable[[Any], Any]) -> Any:
        if not iscoroutinefunction(get_response):
            return factory(get_response)
        middleware = factory(lambda request: bridge.await_(get_response(request)))
        return None if middleware is None else GreenMiddleware(middleware)

    make.sync_capable = make.async_capable = True  # type: ignore[attr-defined]
    return make


class GreenMiddleware:
    """A middleware for an async chain, which calls a sync `middleware` and its hooks green."""

    def __init__(self, middleware: Any) -> None:
        self._middleware = middleware
        # Django looks which hooks there are; the hook for exceptions must be sync in any chain.
        for name in ("process_view", "process_template_response"):
            if hasattr(middleware, name):
                setattr(self, name, _green_hook(self, getattr(middleware, name)))
        if hasattr(middleware, "process_exception"):
            self.process_exception = self._process_exception
        markcoroutinefunction(self)

    def __repr__(self) -> str:
        return f"<green {self._middleware!r}>"

    async def __call__(self, request: Any) -> Any:
        return await bridge.run(self._middleware, request)

    def _process_exception(self, request: Any, exception: Exception) -> Any:
        return self._middleware.process_exception(request, exception)


def _green_hook(owner: GreenMiddleware, hook: Any) -> Callable[..., Coroutine[Any, Any, Any]]:
    if iscoroutinefunction(hook):
        found: Callable[..., Coroutine[Any, Any, Any]] = hook
        return found

    async def green(*args: Any, **kwargs: Any) -> Any:
        return await bridge.run(hook, *args, **kwargs)

    green.__self__ = owner  # type: ignore[attr-defined]  # Django names its class in an error
    return green
