"""Writes and reads rows by which tests of transactions see what was written."""

from __future__ import annotations

from pgbackend import aio
from tests.library.models import Tag


class Oops(Exception):
    """Ends a block: tests raise it inside."""


def names() -> list[str]:
    return sorted(Tag.objects.values_list("name", flat=True))


async def anames() -> list[str]:
    return await aio.run(names)
