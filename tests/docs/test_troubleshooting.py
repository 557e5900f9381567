"""Tests that each text that pgbackend raises, warns of or logs is on the page about trouble."""

from __future__ import annotations

import re
from functools import cache

from tests.docs.messages import collected, listed, plain
from tests.docs.snippets import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"

#: Files whose texts are no messages of their own, with the reason; what a statement of theirs
#: raises, warns of or logs by itself is collected all the same.
ELSEWHERE = {
    "operating/*": "findings of `manage.py pgbackend check`, printed with the cure of each",
    "management/*": "help and output of the command",
    "contrib/*": "descriptions of metrics",
    "panel.py": "labels of the page in the admin",
    "admin.py": "labels of the page in the admin",
    "models.py": "labels of the page in the admin",
    "fast/*": "descriptions of shortcuts, and of the functions that they bypass",
    "hooks.py": "reasons of what is replaced: parts of one text, which is on the page",
    "embedded/__main__.py": "help of the command",
}

#: Texts that no user meets, or not alone, with the reason.
INTERNAL = {
    "module … has no attribute …": "a mistake in the name of an attribute, in Python's own words",
    "… object has no attribute …": "a mistake in the name of an attribute, in Python's own words",
    "no event loop that this call would block": (
        "caught where it is raised: Django's guard asks for a loop"
    ),
    "the server does not set client_connection_check_interval: …": (
        "for debugging: the server lacks an option, and works without"
    ),
    "wait timeout expired": (
        "psycopg's own text: how its notifies(timeout=...) ends; caught by psycopg"
    ),
    "Listening on … in thread …": "a line of `pgbackend.dump()`, which docs/hang.md shows",
    "Pool … in thread …: … leased, … free, … open or being opened, … waiting": (
        "a line of `pgbackend.dump()`, which docs/hang.md shows"
    ),
    "is about to run": "a line of `pgbackend.dump()`, which docs/hang.md shows",
    "waits for the task …": "a line of `pgbackend.dump()`, which docs/hang.md shows",
    "waits for … at once: …": "a line of `pgbackend.dump()`, which docs/hang.md shows",
    "Its event loop has been blocked for … s": (
        "a line of `pgbackend.dump()`, which docs/hang.md shows"
    ),
    "waits for a connection of …": "a line of `pgbackend.dump()`, which docs/hang.md shows",
    "Portal of an unknown task in thread …": (
        "a line of `pgbackend.dump()`, which docs/hang.md shows"
    ),
    "waits for the server's reply for … s (process …)": (
        "a line of `pgbackend.dump()`, which docs/hang.md shows"
    ),
    "a query of the ORM": "a part of the texts that name who holds a connection",
    "the pool … is closed": "of psycopg_pool; another text of pgbackend is raised instead",
    "no connection was opened in time": (
        "of psycopg_pool; another text of pgbackend is raised instead"
    ),
    "no connection came in time": "of psycopg_pool; another text of pgbackend is raised instead",
    "the task that waited was closed": (
        "of psycopg_pool; another text of pgbackend is raised instead"
    ),
    "<Pool …: … leased, … idle, … waiting, …>": "the repr of a pool",
    "cancellation timeout expired": "caught where it is raised: the connection is closed then",
    "error ignored in the clean-up of a cancelled statement: …": (
        "for debugging: the connection is closed then"
    ),
    "the default host of libpq is not known": (
        "caught where it is raised: the server is not asked then"
    ),
    "the value that RESET sets": "the repr of a constant",
    "the last operation didn't produce records": "psycopg's own text, for a statement without rows",
}


@cache
def _sources() -> dict[str, str]:
    return {each.text: each.where for each in collected(ELSEWHERE)}


def test_each_text_of_the_sources_is_on_the_page() -> None:
    on_page = {*listed(PAGE)}
    missing = {text: where for text, where in _sources().items() if text not in INTERNAL}
    assert {text: where for text, where in missing.items() if text not in on_page} == {}


def test_each_text_on_the_page_is_in_the_sources() -> None:
    texts = listed(PAGE)
    assert [text for text in texts if text not in _sources()] == []
    assert len(texts) == len(set(texts)), "each text has one place"


def test_each_internal_text_is_in_the_sources_and_not_on_the_page() -> None:
    assert [text for text in INTERNAL if text not in _sources()] == []
    assert {*INTERNAL} & {*listed(PAGE)} == set()


def test_each_symptom_has_a_text_of_its_own_or_a_cure_with_a_link() -> None:
    parts = re.split(r"^### (.+)$", PAGE.read_text(), flags=re.MULTILINE)[1:]
    symptoms = dict(zip(parts[::2], parts[1::2], strict=True))
    assert [title for title, text in symptoms.items() if ".md" not in text] == []


def test_collection_takes_all_kinds_of_texts() -> None:
    found = _sources()
    for part in ("couldn't get a connection", "a connection of … is held", "the ORM was called"):
        assert any(text.startswith(part) for text in found), part


def test_values_become_ellipses() -> None:
    assert plain("a {name!r} of\n {0} in %.2f s, %s%s, 50%") == "a … of … in … s, …, 50%"
