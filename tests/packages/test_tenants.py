"""Tests C15 with tenants by schema under load, with django-tenants as it is released."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.processes import Program, run_all

LIMIT_SET_CALLS = [False, True]


@pytest.fixture(scope="module")
def seen(conninfo: str) -> dict[bool, dict[str, Any]]:
    """Return what 2,000 requests of 50 tenants have seen (see many_tenants.py), by a setting."""
    finished = run_all(
        (
            Program(
                ["-m", "tests.packages.run", "many_tenants"],
                environment={
                    "PACKAGES_DATABASE": f"many_tenants_{limit}",
                    "TENANT_LIMIT_SET_CALLS": "yes" if limit else "",
                },
            )
            for limit in LIMIT_SET_CALLS
        ),
        timeout=300,
    )
    for each in finished:
        assert each.returncode == 0, each.errors
    answers = [json.loads(each.output) for each in finished]
    return dict(zip(LIMIT_SET_CALLS, answers, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("limit", LIMIT_SET_CALLS, ids=["", "limit_set_calls"])
def test_2000_requests_of_50_tenants_read_and_write_their_own(
    seen: dict[bool, dict[str, Any]], limit: bool
) -> None:
    saw = seen[limit]
    print(saw)
    assert not saw["number of errors"], saw["errors"]
    cancelled = saw["cancelled"] + saw["left"]
    assert saw["finished"] + cancelled == 2000
    assert cancelled > 300, "a fifth is cancelled, but for those that have just ended"
    assert saw["seen"].keys() == {"reads"}, "none of others, none of public"
    assert saw["seen"]["reads"] > 9 * saw["finished"]
    assert saw["rows of others"] == saw["torn transactions"] == saw["requests that lack rows"] == 0
    assert not saw["leases"]
    assert saw["open transactions"] == 0
