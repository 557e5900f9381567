"""Tests the work of the worker's runner around each test."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from django.db import connection
from django.db.backends.signals import connection_created

import pgbackend
from pgbackend import aio
from pgbackend.driver import bridge
from tests.conftest import Runner

from .recorder import settle


@pytest.mark.django_db(transaction=True)
def test_a_test_begins_when_no_session_is_being_prepared_any_more(run: Runner) -> None:
    prepared: list[str] = []
    may_go_on = asyncio.Event()

    def receiver(sender: Any, **kwargs: Any) -> None:
        bridge.await_(may_go_on.wait())
        prepared.append("a session")

    def work() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
            connection_created.connect(receiver)  # the reset after this raw statement calls it
        asyncio.get_running_loop().call_later(0.02, may_go_on.set)
        settle()
        assert prepared
        assert all(pool.size == pool.idle for pool in pgbackend.statistics())

    try:
        run(aio.run(work))
    finally:
        connection_created.disconnect(receiver)
