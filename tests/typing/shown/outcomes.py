"""`pgbackend.OutcomeUnknown`: an error of Django's that asks the server for a verdict."""

from __future__ import annotations

from typing import assert_type

from django.db import OperationalError, transaction

from pgbackend import OutcomeUnknown, Verdict


def pay() -> bool:
    try:
        with transaction.atomic():
            return True
    except OutcomeUnknown as error:
        verdict = error.verdict(timeout=2)
        assert_type(verdict, Verdict)
        return verdict is Verdict.COMMITTED


async def apay(error: OutcomeUnknown) -> OperationalError:
    assert_type(await error.averdict(), Verdict)
    return error
