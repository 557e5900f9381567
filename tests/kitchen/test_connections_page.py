"""Tests the admin's page "Connections" in Chromium: live, by keyboard, on a phone, in the dark."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import psycopg
import pytest
from django.db import connection
from selenium.webdriver.common.keys import Keys

from tests.kitchen.conftest import demo_served, url_of
from tests.kitchen.test_pages import fits, focused, one, press, tab_to, text, until
from tests.support.chromium import CONTRAST, prefer

pytestmark = [pytest.mark.browser, pytest.mark.slow]

PAGE = "/admin/pgbackend/connections/"
STATUS, LEASES = "[data-status]", "[data-table=leases]"


@pytest.fixture(scope="module")
def _served(django_db_setup: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve a desk for these tests alone.

    The page opens Django's pool for threads. Another test kills all sessions, and that pool, which
    looks at no connection before it lends it, would fail a later request for each.
    """
    with demo_served(tmp_path_factory.mktemp("demo") / "output") as address:
        yield address


@pytest.fixture
def opened(browse: Callable[..., Any], chef: Any) -> Callable[..., Any]:
    """Return a function that opens the page in Chromium, signed in as a superuser."""

    def opened(**size: int) -> Any:
        page = browse(PAGE, **size)
        one(page, "[name=username]").send_keys("chef")
        one(page, "[name=password]").send_keys("quince", Keys.ENTER)
        until(page, STATUS, "Live")
        return page

    return opened


@contextmanager
def requests_in_flight(served: str, count: int) -> Iterator[None]:
    """Let `count` requests of the menu wait for a lock inside the block."""
    url = url_of(connection.settings_dict["NAME"])
    with psycopg.connect(url) as locking, ThreadPoolExecutor(count) as threads:
        locking.execute("LOCK TABLE kitchen_dish, kitchen_section IN ACCESS EXCLUSIVE MODE")
        asked = [
            threads.submit(httpx.get, f"{served}/?n={n}", timeout=30, trust_env=False)
            for n in range(count)
        ]
        try:
            yield
        finally:
            locking.rollback()
        assert {each.result().status_code for each in asked} == {200}


def test_a_lease_appears_and_goes_without_a_reload(opened, served, menu) -> None:
    page = opened()
    page.execute_script("window.notReloaded = true")
    assert "No connection of a pool is in use" in text(page, "[data-empty=leases]")
    with requests_in_flight(served, 1):
        until(page, LEASES, "GET /")
        shown = text(page, f"{LEASES} tbody")
        assert "in a statement for" in shown
        assert "n=0" not in shown
    until(page, "[data-empty=leases]", "No connection of a pool is in use")
    assert page.execute_script("return window.notReloaded")


def test_the_page_goes_on_while_the_pool_is_full(opened, served, menu) -> None:
    page = opened()
    with requests_in_flight(served, 7):
        until(page, "[data-table=now]", "all connections are in use")
        until(page, "[data-table=waiting]", "GET /")
        before = text(page, "[data-at]")
        until(page, STATUS, "Live")
        for _ in range(2):  # the time goes on, so answers come
            page.execute_async_script("setTimeout(arguments[0], 1100)")
        assert text(page, "[data-at]") != before
        tab_to(page, "Show the dump")
        press(page, Keys.ENTER)
        wait_for_value(page, "Leased, server process")
    until(page, "[data-empty=waiting]", "No task waits")


def wait_for_value(page: Any, part: str) -> None:
    page.execute_async_script(
        """
        const [part, done] = arguments, area = document.querySelector("[data-dump-text]");
        const look = () => area.value.includes(part) ? done() : setTimeout(look, 20);
        look();
        """,
        part,
    )


def test_all_of_it_is_reached_by_keyboard(opened, served) -> None:
    page = opened()
    tab_to(page, "Pause")
    assert page.execute_script(OUTLINE) != "none"
    press(page, Keys.SPACE)
    until(page, STATUS, "Paused.")
    assert focused(page) == "Resume"
    at = text(page, "[data-at]")
    page.execute_async_script("setTimeout(arguments[0], 1500)")
    assert text(page, "[data-at]") == at
    press(page, Keys.ENTER)
    until(page, STATUS, "Live")
    tab_to(page, "Show the dump")
    press(page, Keys.ENTER)
    wait_for_value(page, "pgbackend in process")
    tab_to(page, "Copy the dump")
    press(page, Keys.ENTER)
    until(page, "[data-dump-copy]", "Copied")
    assert page.execute_script(SELECTED) > 100
    tab_to(page, "Open the dump as text")
    press(page, Keys.ENTER)  # which leaves the page; a text has no icon, so Chromium complains
    until(page, "body", "pgbackend in process")
    page.get(f"{served}{PAGE}")
    until(page, STATUS, "Live")
    complaints = [each["message"] for each in page.get_log("browser")]
    assert all("/favicon.ico" in message for message in complaints)


SELECTED = """
const area = document.querySelector("textarea");
return area.selectionEnd - area.selectionStart;
"""
OUTLINE = "return getComputedStyle(document.activeElement).outlineStyle"


def test_a_hidden_page_asks_nothing(opened) -> None:
    page = opened()
    page.execute_script(
        """
        window.asked = 0;
        const fetched = window.fetch;
        window.fetch = (...given) => { window.asked += 1; return fetched(...given); };
        window.hide = (hidden) => {
            Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
            document.dispatchEvent(new Event("visibilitychange"));
        };
        hide(true);
        """
    )
    page.execute_async_script("setTimeout(arguments[0], 1500)")
    assert page.execute_script("return window.asked") == 0
    page.execute_script("hide(false)")
    until(page, STATUS, "Live")
    assert page.execute_script("return window.asked") >= 1


def test_it_fits_a_phone(opened, served, menu) -> None:
    page = opened(width=360, height=740)
    with requests_in_flight(served, 6):
        until(page, LEASES, "GET /")
        until(page, "[data-table=waiting]", "GET /")
        tab_to(page, "Show the dump")
        press(page, Keys.ENTER)
        wait_for_value(page, "Leased")
        assert fits(page)
        assert page.execute_script(TOO_WIDE) == []
        # Each cell has its heading before it, and is a cell of a table for a screen reader still.
        cell = one(page, f"{LEASES} tbody td")
        before = "return getComputedStyle(arguments[0], '::before').content"
        assert "Held by" in page.execute_script(before, cell)
        assert cell.aria_role in {"cell", "gridcell"}


#: The elements of the page that reach beyond the window.
TOO_WIDE = """
const width = document.documentElement.clientWidth;
return [...document.querySelectorAll(".pgb *")]
    .filter((each) => each.getClientRects().length && !each.closest("thead"))
    .filter((each) => each.getBoundingClientRect().right > width + 0.5)
    .map((each) => each.outerHTML.slice(0, 80));
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_has_contrast_in_both_themes(opened, served, menu, theme) -> None:
    page = opened()
    prefer(page, theme)
    with requests_in_flight(served, 6):
        until(page, "[data-table=waiting]", "GET /")
        tab_to(page, "Show the dump")
        press(page, Keys.ENTER)
        wait_for_value(page, "Leased")
        background, lowest, where = page.execute_script(CONTRAST, "#content, #content *")
    assert (sum(background) < 150) == (theme == "dark")
    assert lowest >= 4.5, where


def test_without_a_script_it_shows_figures_that_a_reload_renews(opened, served, menu) -> None:
    page = opened()
    page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    page.get(served + PAGE)
    until_now = one(page, ".pgb").text
    assert "live updates need JavaScript" in until_now
    assert "No connection of a pool is in use" in until_now
    assert "Pause" not in until_now
    assert "Show the dump" not in until_now
    assert "Open the dump as text" in until_now


def test_the_page_says_that_the_session_is_over(opened) -> None:
    from django.contrib.sessions.models import Session

    page = opened()
    Session.objects.all().delete()
    page.delete_cookie("sessionid")  # its pass holds for that cookie only
    until(page, STATUS, "You are signed out")
    assert page.execute_script("return document.querySelector('[data-pause]').hidden")
    (complaint,) = page.get_log("browser")  # it asks no more
    assert "403" in complaint["message"]


def test_several_processes_are_told_apart(opened) -> None:
    page = opened()
    page.execute_script(
        """
        const fetched = window.fetch;
        let turn = 0;
        window.fetch = async (...given) => {
            const answer = await fetched(...given), data = await answer.json();
            turn += 1;
            if (turn % 2) data.pid = 4242;
            return new Response(JSON.stringify(data), { status: 200 });
        };
        """
    )
    until(page, "[data-processes]", "Process 4242")
    shown = text(page, "[data-pid-shown]")
    assert shown != "4242"  # it stays with the process that it began with
    tab_to(page, "Process 4242")
    press(page, Keys.ENTER)
    until(page, "[data-pid-shown]", "4242")
    assert one(page, "[data-processes] [aria-pressed=true]").text == "Process 4242"


@pytest.mark.parametrize("width", [360, 1280])
def test_the_health_views_can_be_read_in_a_browser(browse, width) -> None:
    page = browse("/health/ready/", width=width, height=740)
    assert json.loads(text(page, "pre"))["databases"]["default"]["state"] == "ok"
    assert fits(page)
    page = browse("/health/live/", width=width, height=740)
    assert json.loads(text(page, "pre")) == {"status": "alive"}
