"""What tools and tests of users do: they put a function of their own in the place of another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Self

import pytest
from django.db import connections


@contextmanager
def patched(owner: Any, name: str, seen: list[str]) -> Iterator[None]:
    original = getattr(owner, name)

    def patch(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(name)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(owner, name, patch)
        yield


@contextmanager
def patched_on_the_object(name: str, seen: list[str]) -> Iterator[None]:
    wrapper = connections["default"]
    original = getattr(wrapper, name)

    def patch(*args: Any, **kwargs: Any) -> Any:
        seen.append(name)
        return original(*args, **kwargs)

    setattr(wrapper, name, patch)
    try:
        yield
    finally:
        delattr(wrapper, name)


class Counting:
    """Counts the calls of a function that it is put in the place of, as packages patch them."""

    def __init__(self, name: str) -> None:
        module, _, qualified = name.partition(":")
        *owners, self.last = qualified.split(".")
        self.owner: Any = import_module(module)
        for each in owners:
            self.owner = getattr(self.owner, each)
        self.original = vars(self.owner)[self.last]
        self.calls = 0

    def __enter__(self) -> Self:
        function = self.original
        for inside in ("__func__", "fget", "func"):
            function = getattr(function, inside, function)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return function(*args, **kwargs)

        kind = type(self.original)
        replaced: Any = counted if kind is type(counted) else kind(counted)
        if hasattr(replaced, "__set_name__"):
            replaced.__set_name__(self.owner, self.last)
        setattr(self.owner, self.last, replaced)
        return self

    def __exit__(self, *exc_info: object) -> None:
        setattr(self.owner, self.last, self.original)

    def count(self, function: Callable[[], Any]) -> int:
        before = self.calls
        function()
        return self.calls - before
