"""Tests the pages as people use them: with a mouse, a keyboard, a phone, and without a script."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from kitchen.models import Order

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def one(page: Any, selector: str) -> Any:
    return page.find_element(By.CSS_SELECTOR, selector)


def text(page: Any, selector: str) -> str:
    # One query of the document: an element may be replaced between two.
    script = "return document.querySelector(arguments[0])?.innerText ?? ''"
    return page.execute_script(script, selector)


def until(page: Any, selector: str, part: str, seconds: float = 10) -> None:
    """Wait until the element is there and its `part` contains the text."""
    waited = WebDriverWait(page, seconds, poll_frequency=0.02)
    waited.until(lambda page: part in text(page, selector), f"{part!r} in {selector}")


def live(page: Any) -> None:
    until(page, ".pulse", "Live")


def press(page: Any, *keys: str) -> None:
    page.switch_to.active_element.send_keys(*keys)


def focused(page: Any) -> str:
    return page.execute_script("return document.activeElement.innerText ?? ''").strip()


def tab_to(page: Any, words: str) -> None:
    """Press Tab until the focused element says `words`."""
    for _ in range(80):
        if focused(page) == words:
            return
        press(page, Keys.TAB)
    raise AssertionError(f"no way to {words!r} by Tab")


def sign_in(page: Any) -> None:
    one(page, "[name=username]").send_keys("chef")
    one(page, "[name=password]").send_keys("quince", Keys.ENTER)
    live(page)


def fits(page: Any) -> bool:
    return page.execute_script(
        "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )


def place(served: str, menu: dict[str, Any], table: str = "7") -> int:
    """Place an order from elsewhere."""
    body = {"table": table, "lines": [{"dish": menu["Broth"].pk, "quantity": 2}]}
    return httpx.post(f"{served}/api/orders/", json=body, trust_env=False).json()["id"]


# --- Ordering ----------------------------------------------------------------------------------


def test_a_guest_orders_and_follows_the_order(browse, menu) -> None:
    page = browse()
    more = one(page, "[aria-label='One Broth more']")
    more.click()
    more.click()
    one(page, "[aria-label='One Bread more']").click()
    one(page, "[aria-label='One Bread less']").click()
    assert text(page, "[data-lines]").split() == ["2", "Broth", "€", "13.60"]
    assert text(page, "output[data-total]") == "€ 13.60"
    one(page, "[name=table]").send_keys("7")
    one(page, "[data-send]").click()
    until(page, "h1", "About 12 minutes")
    until(page, ".kicker", "Table 7")
    order = Order.objects.get()
    order.status = "ready"
    order.save()
    until(page, "h1", "It is on its way")
    assert text(page, "[aria-current=step]") == "Ready"


def test_the_button_is_busy_while_the_kitchen_is_asked(browse, menu) -> None:
    page = browse()
    one(page, "[aria-label='One Broth more']").click()
    one(page, "[name=table]").send_keys("7")
    # The look of the page at the moment of sending; the next page soon replaces it.
    page.execute_script(
        "document.querySelector('form.ordering')"
        ".addEventListener('submit', (event) => event.preventDefault())"
    )
    one(page, "[data-send]").click()
    button = one(page, "[data-send]")
    assert button.text == "Asking the kitchen…"
    assert button.get_attribute("aria-busy") == "true"
    assert not button.is_enabled(), "a second press sends no second order"


def test_a_wrong_order_leads_to_what_is_wrong(browse, menu) -> None:
    page = browse()
    one(page, "[data-send]").click()
    until(page, "#problems", "This field is required.")
    assert page.switch_to.active_element.get_attribute("id") == "problems"
    one(page, "#problems a").click()
    press(page, "7")
    assert one(page, "[name=table]").get_attribute("value") == "7"
    _forgive(page, "422")


def _forgive(page: Any, status: str) -> None:
    """Accept one entry of Chromium's console, which logs each answer that is no success."""
    noted = page.get_log("browser")
    assert [status in entry["message"] for entry in noted] == [True], noted


def test_ordering_works_by_keyboard_alone(browse, menu) -> None:
    page = browse()
    press(page, Keys.TAB)
    assert focused(page) == "Skip to the content"
    press(page, Keys.ENTER)
    press(page, Keys.TAB, Keys.TAB)
    assert page.switch_to.active_element.get_attribute("type") == "number"
    press(page, "3")
    assert text(page, "[data-lines]").startswith("3")
    one(page, "[name=table]").send_keys("Ada")
    press(page, Keys.ENTER)
    until(page, ".kicker", "Ada")


# --- The board ---------------------------------------------------------------------------------


def test_an_order_from_elsewhere_appears_on_the_board(browse, served, menu) -> None:
    page = browse("/board/")
    live(page)
    until(page, "#column-accepted", "No new orders.")
    number = place(served, menu, "Ada")
    until(page, f"#column-accepted #order-{number}", "Ada")
    until(page, f"#order-{number}", "of 12 min")
    until(page, "#column-accepted [data-count]", "1")
    until(page, "[data-announce]", f"rder {number} for Ada")


def test_staff_move_orders_by_keyboard_and_keep_their_place(browse, served, menu, chef) -> None:
    number, other = place(served, menu), place(served, menu)
    page = browse("/sign-in/?next=/board/")
    sign_in(page)
    tab_to(page, "Start cooking")
    press(page, Keys.ENTER)
    until(page, f"#column-cooking #order-{number}", "Mark as ready")
    assert focused(page) == "Mark as ready"
    press(page, Keys.SPACE)
    until(page, f"#column-ready #order-{number}", "Mark as served")
    press(page, Keys.ENTER)
    until(page, f"#column-served #order-{number}", "took")
    assert page.switch_to.active_element.get_attribute("id") == f"order-{number}"
    assert Order.objects.get(pk=number).status == "served"
    assert Order.objects.get(pk=other).status == "accepted"


def test_a_second_board_follows_the_first(browse, served, menu, chef) -> None:
    number = place(served, menu)
    guest, staff = browse("/board/"), browse("/sign-in/?next=/board/")
    live(guest)
    sign_in(staff)
    one(staff, f"#order-{number} .move").click()
    until(guest, f"#column-cooking #order-{number}", "Table 7")
    assert not guest.find_elements(By.CSS_SELECTOR, ".move")


def test_an_order_that_a_colleague_moved_first_is_said_to_be(browse, served, menu, chef) -> None:
    number = place(served, menu)
    page = browse("/sign-in/?next=/board/")
    sign_in(page)
    # The page has not heard of the change yet.
    page.execute_script(f"document.querySelector('#order-{number} [name=seen]').value = 'ready'")
    one(page, f"#order-{number} .move").click()
    until(page, "[data-problem]", f"Order {number} has been moved by somebody else.")
    _forgive(page, "409")


def test_clearing_the_board_asks_first(browse, served, menu, chef) -> None:
    place(served, menu)
    page = browse("/sign-in/?next=/board/")
    sign_in(page)
    one(page, ".clear button").click()
    until(page, ".clear button", "Really all of them?")
    assert Order.objects.get().status == "accepted"
    one(page, ".clear button").click()
    until(page, "#column-accepted", "No new orders.")
    until(page, "#column-served", "Table 7")
    until(page, ".clear button", "Serve everything")


def test_a_late_order_is_marked_in_words_too(browse, order) -> None:
    from datetime import timedelta

    late = order(promised_minutes=5)
    Order.objects.update(created_at=late.created_at - timedelta(minutes=6))
    page = browse("/board/")
    until(page, f"#order-{late.pk}.late", "of 5 min, late")


# --- Status ------------------------------------------------------------------------------------


def test_the_status_page_shows_a_rush(browse, menu) -> None:
    page = browse("/status/")
    live(page)
    size = one(page, "[name=size]")
    size.clear()
    size.send_keys("60")
    one(page, "[data-rush] button").click()
    until(page, "[data-progress-text]", "60 of 60 orders answered", seconds=30)
    until(page, "[data-number='pool.max_size']", "4")
    assert int(text(page, "[data-number='peak']").replace(",", "")) > 4
    assert int(text(page, "[data-number='answered']").replace(",", "")) >= 60
    drawn = page.execute_script(
        "const canvas = document.querySelector('canvas');"
        "const {width, height} = canvas;"
        "return canvas.getContext('2d').getImageData(0, 0, width, height).data.some(Boolean)"
    )
    assert drawn
    assert Order.objects.count() == 60


# --- All pages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/board/", "/status/", "/sign-in/", "{order}"])
def test_a_page_fits_a_phone(path, browse, served, menu, chef, order) -> None:
    long = order("Bartholomew-Featherstonehaugh-the-Third", note="x" * 120, promised_minutes=12)
    page = browse("/sign-in/?next=/board/", width=360, height=740)
    sign_in(page)
    page.get(served + path.format(order=long.get_absolute_url()))
    assert fits(page)
    small = page.execute_script(
        "return [...document.querySelectorAll('main button, main input:not([type=hidden])')]"
        ".filter((e) => e.offsetParent && e.getBoundingClientRect().height < 32)"
        ".map((e) => e.outerHTML)"
    )
    assert small == [], "large enough for a finger"


@pytest.mark.parametrize("path", ["/", "/board/", "/status/", "/sign-in/"])
def test_a_page_is_built_for_everyone(path, browse, menu, order) -> None:
    order()
    page = browse(path)
    assert page.execute_script("return document.documentElement.lang") == "en"
    assert len(page.find_elements(By.CSS_SELECTOR, "main")) == 1
    assert len(page.find_elements(By.CSS_SELECTOR, "h1")) == 1
    unnamed = page.execute_script(
        "return [...document.querySelectorAll('input:not([type=hidden]), textarea, button, a')]"
        ".filter((e) => !(e.labels?.length || e.ariaLabel || e.textContent.trim()))"
        ".map((e) => e.outerHTML)"
    )
    assert unnamed == []


def test_nothing_is_fetched_from_elsewhere(browse, served, menu) -> None:
    page = browse()
    fetched = page.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert fetched
    assert all(url.startswith(served) for url in fetched)


def test_the_admin_opens(browse, chef, order) -> None:
    order("Ada")
    page = browse("/sign-in/?next=/board/")
    sign_in(page)
    one(page, ".who a").click()
    until(page, "#site-name", "Quince")
    page.get(page.current_url + "kitchen/order/")
    until(page, "#result_list", "Ada")
