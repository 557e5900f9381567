"""Views that tell a supervisor or a load balancer whether this process lives, and can serve.

In the project's URLs, ``path("health/", include("pgbackend.health"))`` gives ``health/live/`` and
``health/ready/``; `readiness()` makes a view with other options. No app has to be installed.

The views need no session, no user and no transaction, and tell strangers no more than the names and
the states of the aliases; the log has the errors.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from time import monotonic
from typing import Any, TypeAlias

from django.core.exceptions import ImproperlyConfigured
from django.core.handlers.asgi import ASGIRequest
from django.db import connections
from django.http import HttpRequest, HttpResponse, HttpResponseNotAllowed, JsonResponse
from django.urls import re_path

from . import conf, thread_probes
from .driver.outages import one_line
from .driver.probing import Finding, State, probe
from .non_atomic import never_atomic
from .options import REPLICA_OF

__all__ = ["begin_shutdown", "live", "readiness", "ready"]

logger = logging.getLogger("pgbackend.health")

#: Seconds that a look at one database takes at most.
TIMEOUT = 1.0

View: TypeAlias = Callable[[HttpRequest], Coroutine[Any, Any, HttpResponse]]


class _Shutdown:
    """A note that this process is about to end."""

    begun = False


def begin_shutdown() -> None:
    """Make each readiness view of this process answer 503 from now on.

    Call it some seconds before the server is told to end, so that no new requests are sent to it.
    """
    _Shutdown.begun = True


def _for_supervisors(view: View) -> View:
    """Return `view` for GET and HEAD: without a transaction, a login, or a copy in any cache."""

    async def answer(request: HttpRequest) -> HttpResponse:
        if request.method not in ("GET", "HEAD"):
            return HttpResponseNotAllowed(["GET", "HEAD"])
        response = await view(request)
        response["Cache-Control"] = "no-store"
        # Django would log each 503 as an error, and mail it to the project's admins.
        response._has_been_logged = True  # type: ignore[attr-defined]  # noqa: SLF001 - Django's
        if request.method == "HEAD":
            response.content = b""
        return response

    never_atomic(answer)
    vars(answer).update(login_required=False)
    return answer


@_for_supervisors
async def live(request: HttpRequest) -> HttpResponse:
    """Answer 200: the process lives, and its event loop has turns. No database is asked."""
    return JsonResponse({"status": "alive"})


def readiness(
    using: Iterable[str] | None = None,
    *,
    timeout: float = TIMEOUT,
    busy_is_ready: bool = True,
    stop_file: str | Path | None = None,
) -> View:
    """Return a view that answers 200 if the process can serve requests, else 503.

    It looks whether each alias of `using` executes a statement within `timeout` seconds. By default
    these are all aliases but replicas, whose reads go to the primary while they are down. A pool
    whose connections are all in use, but come free, is *busy*, which is ready unless
    `busy_is_ready` is False. While the file `stop_file` exists, the process is not ready.
    """
    aliases = None if using is None else _checked(using)
    _check_timeout(timeout)
    stop = None if stop_file is None else Path(stop_file)
    serving = {State.OK, State.BUSY} if busy_is_ready else {State.OK}

    @_for_supervisors
    async def ready(request: HttpRequest) -> HttpResponse:
        if _Shutdown.begun or (stop is not None and stop.exists()):
            return JsonResponse({"status": "not ready", "reason": "shutting down"}, status=503)
        found = await _look(request, _default_aliases() if aliases is None else aliases, timeout)
        is_ready = all(finding.state in serving for finding in found.values())
        _log(found, serving)
        body = {
            "status": "ready" if is_ready else "not ready",
            "databases": {alias: _told(finding) for alias, finding in found.items()},
        }
        return JsonResponse(body, status=200 if is_ready else 503)

    return ready


def _checked(using: Iterable[str]) -> list[str]:
    aliases = [using] if isinstance(using, str) else [*using]
    for alias in aliases:
        if alias not in connections.settings:
            known = ", ".join(map(repr, connections.settings))
            raise ImproperlyConfigured(
                f"readiness(using=...) names {alias!r}, which DATABASES lacks: it has {known}."
            )
    return aliases


def _check_timeout(timeout: object) -> None:
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
        raise ImproperlyConfigured(
            f"readiness(timeout={timeout!r}): give a number of seconds above 0."
        )


def _default_aliases() -> list[str]:
    return [
        alias
        for alias, entry in connections.settings.items()
        if entry["ENGINE"] != "django.db.backends.dummy" and not entry["OPTIONS"].get(REPLICA_OF)
    ]


async def _look(request: HttpRequest, aliases: Iterable[str], timeout: float) -> dict[str, Finding]:
    is_async = isinstance(request, ASGIRequest)
    looks = {
        alias: _in_pool(alias, timeout)
        if is_async and conf.alias_is_ours(alias)
        else _in_thread(alias, timeout)
        for alias in aliases
    }
    return dict(zip(looks, await asyncio.gather(*looks.values()), strict=True))


async def _in_pool(alias: str, timeout: float) -> Finding:
    began = monotonic()
    wrapper: Any = connections[alias]
    try:
        return await probe(wrapper._async_pool(), timeout)  # noqa: SLF001 - ours
    except Exception as exc:  # wrong options
        return Finding(State.ERROR, monotonic() - began, exc)


async def _in_thread(alias: str, timeout: float) -> Finding:
    demand = thread_probes.Demand(alias)
    looking = asyncio.wrap_future(thread_probes.start(alias))
    await asyncio.wait([looking], timeout=timeout)
    return looking.result() if looking.done() else Finding(demand.state(), timeout)


def _told(finding: Finding) -> dict[str, object]:
    told: dict[str, object] = {"state": finding.state, "ms": round(1000 * finding.seconds, 1)}
    if finding.error is not None and conf.is_debugging():
        told["error"] = f"{type(finding.error).__name__}: {finding.error}"
    return told


#: The state in which each alias was last found.
_last: dict[str, State] = {}


def _log(found: dict[str, Finding], serving: set[State]) -> None:
    """Log each alias that is not as it was at the last look, if it matters."""
    for alias, finding in found.items():
        before, _last[alias] = _last.get(alias, State.OK), finding.state
        if finding.state == before or {finding.state, before} <= serving:
            continue
        if finding.state in serving:
            logger.info("the database %r serves again: %s", alias, finding.state)
        else:
            why = "" if finding.error is None else f": {one_line(finding.error)}"
            logger.warning("not ready, because of the database %r: %s%s", alias, finding.state, why)


ready = readiness()

app_name = "pgbackend-health"
urlpatterns = [
    re_path(r"^live/?$", live, name="live"),
    re_path(r"^ready/?$", ready, name="ready"),
]
