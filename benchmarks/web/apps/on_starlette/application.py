"""Serves the site with Starlette; the module that the harness names makes the queries."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from benchmarks.web.apps import given
from benchmarks.web.apps.shape import WAITS, gate

Answer = Callable[[int], Awaitable[Any]]

_ANSWERS = import_module(f"{__package__}.{given.stack()['answers']}")
_NAMES = ("one", "ten", "list", "stream", "park")
_WRITING = ("update", "insert")
_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parents[1] / "templates"), autoescape=True
)
_PAGE = _TEMPLATES.get_template("page.jinja")


def _json(answer: Answer) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return JSONResponse(await answer(request.path_params["n"]))

    return endpoint


async def page(request: Request) -> Response:
    books = await _ANSWERS.page_answer(request.path_params["n"])
    return HTMLResponse(_PAGE.render(books=books))


async def waiting(request: Request) -> Response:
    """Return how many requests are parked."""
    return JSONResponse({"waiting": gate.waiting})


async def release(request: Request) -> Response:
    gate.open()
    return JSONResponse({})


def _route(name: str, answer: Answer, method: str = "GET") -> Route:
    return Route(f"/{name}/{{n:int}}", _json(answer), methods=[method])


def _routes() -> list[Route]:
    found = [
        _route(name, getattr(_ANSWERS, f"{name}_answer"), "POST" if name in _WRITING else "GET")
        for name in (*_NAMES, *_WRITING)
        if hasattr(_ANSWERS, f"{name}_answer")
    ]
    waits = [
        _route(name, partial(_ANSWERS.wait_answer, seconds=seconds))
        for name, seconds in WAITS.items()
    ]
    return [
        *found,
        *waits,
        Route("/page/{n:int}", page),
        Route("/gate", waiting),
        Route("/gate/open", release, methods=["POST"]),
    ]


application = Starlette(routes=_routes(), lifespan=_ANSWERS.lifespan)
