"""Asks the kitchen how long an order will take: an HTTP call, as slow as another team's service.

The service is a view of this very project (``kitchen.views.service``) unless
``KITCHEN_SERVICE_URL`` says otherwise. No database connection is held during the call: that is
the point of the demonstration.
"""

import asyncio
import logging
from functools import cache

import httpx
from django.conf import settings
from django.urls import reverse

logger = logging.getLogger(__name__)


def client():
    """Return an HTTP client for one call, whose connection nobody else waits for.

    A client that all requests share looks through all its connections at each call: with hundreds
    of orders in flight that is most of the work. Proxies from the environment are ignored: they are
    for the world outside, not for a call to oneself. The caller sets the deadline.
    """
    return httpx.AsyncClient(verify=_certificates(), trust_env=False, timeout=None)  # noqa: S113


@cache
def _certificates():
    """Read the certificates of the authorities once: each client would read them again."""
    return httpx.create_ssl_context()


def own_address(request):
    """Return this server's base URL from its socket: the client could choose any ``Host`` header.

    Django fills ``SERVER_NAME`` and ``SERVER_PORT`` from ``scope["server"]``.
    """
    host, port = request.META["SERVER_NAME"], request.META["SERVER_PORT"]
    if not port.isdigit():
        raise ValueError("a server on a unix socket has no URL of its own: set KITCHEN_SERVICE_URL")
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def address(request):
    """Return the (URL, headers) of the kitchen service for an order made in ``request``."""
    if settings.KITCHEN_SERVICE_URL:
        return settings.KITCHEN_SERVICE_URL, {}
    # ALLOWED_HOSTS has just let this name through; it might refuse the bare address.
    return own_address(request) + reverse("kitchen:estimate"), {"Host": request.get_host()}


async def promised_minutes(request, lines):
    """Return the minutes that the kitchen promises, or ``None`` if it is down, slow or odd."""
    question = {"lines": [{"dish": dish.name, "quantity": quantity} for dish, quantity in lines]}
    try:
        url, headers = address(request)
        async with asyncio.timeout(settings.KITCHEN_SERVICE_TIMEOUT), client() as http:
            answer = await http.post(url, json=question, headers=headers)
        return _minutes(answer.raise_for_status().json())
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError) as error:
        logger.warning("no promise from the kitchen service: %s", error or type(error).__name__)
        return None


def _minutes(answer):
    minutes = answer.get("minutes") if isinstance(answer, dict) else None
    if type(minutes) is not int or not 0 < minutes < 1000:
        raise ValueError(f"expected whole minutes, got {answer!r}")
    return minutes
