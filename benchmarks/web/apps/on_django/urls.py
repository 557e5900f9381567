"""Gives all Django stacks the same addresses, as far as a stack has the view."""

from __future__ import annotations

from importlib import import_module

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path

from benchmarks.web.apps import given
from benchmarks.web.apps.shape import WAITS, gate

_VIEWS = import_module(f"{__package__}.{given.stack()['views']}")
_NAMES = ("one", "ten", "list", "update", "insert", "page", "stream", "park")


async def waiting(request: HttpRequest) -> HttpResponse:
    """Return how many requests are parked."""
    return JsonResponse({"waiting": gate.waiting})


async def release(request: HttpRequest) -> HttpResponse:
    gate.open()
    return JsonResponse({})


urlpatterns = [
    *(
        path(f"{name}/<int:n>", getattr(_VIEWS, f"{name}_view"))
        for name in _NAMES
        if hasattr(_VIEWS, f"{name}_view")
    ),
    *(
        path(f"{name}/<int:n>", _VIEWS.wait_view, {"seconds": seconds})
        for name, seconds in WAITS.items()
    ),
    path("gate", waiting),
    path("gate/open", release),
]
