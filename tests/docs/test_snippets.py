"""Tests that each Python snippet of the pages runs: its settings are right, its code works."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.db import connection

from tests.docs.cases import CASES, WHOLE
from tests.docs.running import Runner
from tests.docs.snippets import Snippet, collected

SNIPPETS = [snippet for snippet in collected() if snippet.page not in WHOLE]


def _of(page: str, text: str) -> list[Snippet]:
    return [each for each in SNIPPETS if each.page == page and text in each.text]


def test_each_snippet_has_one_case() -> None:
    assert {(page, text): len(_of(page, text)) for page, text, _ in CASES} == {
        (page, text): 1 for page, text, _ in CASES
    }
    with_case = {str(_of(page, text)[0]) for page, text, _ in CASES}
    assert {str(each) for each in SNIPPETS} - with_case == set()


@pytest.fixture
def reader(transactional_db: None) -> Iterator[None]:
    """Make the role that a page speaks of."""
    with connection.cursor() as cursor:
        cursor.execute("CREATE ROLE reader")
    yield
    with connection.cursor() as cursor:
        cursor.execute("DROP ROLE reader")


@pytest.mark.parametrize(
    "page, text, runner", CASES, ids=[f"{page}: {text}" for page, text, _ in CASES]
)
@pytest.mark.usefixtures("reader")
def test_snippet_runs(page: str, text: str, runner: Runner) -> None:
    (snippet,) = _of(page, text)
    runner(snippet)
