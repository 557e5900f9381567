"""Patches functions as users' tools and tests do: puts a wrapper in a function's place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
