"""Wraps functions of Django's or psycopg's as tools patch them, to count the calls."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import FunctionType
from typing import Any, Literal, Self

import wrapt


class Counting:
    """Counts the calls of a function in whose place it is put, as packages patch functions.

    The replacement is another function, or a proxy of wrapt's, which equals the function it wraps.
    """

    def __init__(self, name: str, by: Literal["function", "proxy"] = "function") -> None:
        module, _, qualified = name.partition(":")
        *owners, self.last = qualified.split(".")
        self.owner: Any = import_module(module)
        for each in owners:
            self.owner = getattr(self.owner, each)
        self.original = vars(self.owner)[self.last]
        self.by = by
        self.calls = 0

    def __enter__(self) -> Self:
        function = self.original
        for inside in ("__func__", "fget", "func"):
            function = getattr(function, inside, function)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return function(*args, **kwargs)

        kind = type(self.original)
        if self.by == "proxy" and kind in (FunctionType, classmethod, staticmethod):
            replaced: Any = wrapt.FunctionWrapper(self.original, self._count)
        elif self.by == "proxy":
            replaced = kind(wrapt.FunctionWrapper(function, self._count))
        else:
            replaced = counted if kind is FunctionType else kind(counted)
        if hasattr(replaced, "__set_name__"):
            replaced.__set_name__(self.owner, self.last)
        setattr(self.owner, self.last, replaced)
        return self

    def __exit__(self, *exc_info: object) -> None:
        setattr(self.owner, self.last, self.original)

    def _count(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        self.calls += 1
        return wrapped(*args, **kwargs)

    def count(self, function: Callable[[], Any]) -> int:
        before = self.calls
        function()
        return self.calls - before


class Proxy:
    """Wraps a function and claims to be that function, as the wrappers of tracing tools do."""

    def __init__(self, function: Any, seen: Callable[[], None]) -> None:
        self.__wrapped__ = function
        self._seen = seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__wrapped__, name)

    def __eq__(self, other: object) -> bool:
        return bool(self.__wrapped__ == other)

    def __hash__(self) -> int:
        return hash(self.__wrapped__)

    def __get__(self, instance: Any, owner: Any) -> Any:
        return Proxy(self.__wrapped__.__get__(instance, owner), self._seen)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._seen()
        return self.__wrapped__(*args, **kwargs)
