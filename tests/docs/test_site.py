"""Tests the site that ``make docs`` builds, by a crawl of it in Chromium."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests.docs.snippets import ROOT
from tests.support.chromium import CONTRAST, chromium, prefer, require_chromium, show_at
from tests.support.polling import wait_for
from tests.support.ports import free_port

pytestmark = [pytest.mark.browser, pytest.mark.slow]

PHONE = 360
#: Returns the page's title, the addresses of its links, the ids in it, what it has loaded, and the
#: images that are shown as broken.
_CONTENT = """
const all = (selector) => [...document.querySelectorAll(selector)];
return {
    title: document.title,
    links: all("a[href]").map((each) => each.href),
    ids: all("[id]").map((each) => each.id),
    loaded: performance.getEntriesByType("resource").map((each) => each.name),
    broken: all("img").filter((each) => !each.naturalWidth).map((each) => each.src),
};
"""
#: Returns the elements of the article that a phone cuts off: they are wider than the screen, and
#: in no box that scrolls.
_CUT_OFF = """
const width = document.documentElement.clientWidth;
const scrolls = (element) => {
    for (let each = element; each; each = each.parentElement)
        if (["auto", "scroll"].includes(getComputedStyle(each).overflowX)) return true;
    return false;
};
const wide = [...document.querySelectorAll("article *")]
    .filter((each) => each.getClientRects().length && !scrolls(each))
    .filter((each) => each.getBoundingClientRect().right > width + 0.5)
    .map((each) => each.outerHTML.slice(0, 100));
return [document.documentElement.scrollWidth - width, wide.slice(0, 3)];
"""
#: Returns the titles of the pages that a search has found, when each is there with its summary.
_FOUND = """
const found = [...document.querySelectorAll("#search-results li")];
const summarised = found.filter((each) => each.matches(".kind-object, :has(p.context)"));
// The page of the results may still be on its way, or have no summary yet.
const summary = document.querySelector(".search-summary")?.innerText ?? "";
if (!summary.includes(" found ") || summarised.length < found.length) return [];
return found.map((each) => each.querySelector("a").innerText);
"""
#: Returns the element that has the keyboard, and whether it is in the window, whatever moves.
_FOCUSED = """
document.getAnimations().forEach((each) => each.finish());
const box = document.activeElement.getBoundingClientRect();
const shown = box.left >= 0 && box.right <= innerWidth + 0.5 && box.top >= 0 && box.width > 0;
return [document.activeElement.outerHTML.slice(0, 100), shown];
"""
_TEXTS = "article, article *, .sidebar-tree *, .toc-tree *, .related-pages *, footer *"


@dataclass
class Page:
    """Holds what a visit of a page has found."""

    title: str
    links: list[str]
    ids: list[str]
    loaded: list[str]
    broken: list[str]


@dataclass
class Crawl:
    """Holds the pages that links lead to from the first page, by their addresses."""

    origin: str
    pages: dict[str, Page] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)
    """The lines in the console of the browser."""


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Build the site as ``make docs`` does, and serve it; the value is its address."""
    site = tmp_path_factory.mktemp("site")
    options = ("--quiet", "--fresh-env", "--fail-on-warning", "--keep-going")
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, "docs", str(site)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    port = str(free_port())
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", port]
    served = subprocess.Popen(command, cwd=site, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: _accepts(int(port)), "the server of the site")
        yield f"http://127.0.0.1:{port}/"
    finally:
        served.terminate()
        served.wait(10)


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def browser(request: pytest.FixtureRequest, origin: str) -> Iterator[Any]:
    require_chromium(request.config)
    with chromium() as driver:
        yield driver


@pytest.fixture(scope="module")
def crawl(browser: Any, origin: str) -> Crawl:
    """Visit each page that a link leads to."""
    show_at(browser, 1280)
    crawl, first = Crawl(origin), urljoin(origin, "index.html")
    ahead, seen = [first], {first}
    while ahead:
        address = ahead.pop()
        browser.get(address)
        page = crawl.pages[address] = Page(**browser.execute_script(_CONTENT))
        crawl.complaints += [each["message"] for each in browser.get_log("browser")]
        targets = {urldefrag(link).url for link in page.links}
        new = {each for each in targets - seen if each.startswith(origin) and ".html" in each}
        seen |= new
        ahead += sorted(new)
    return crawl


def _written(crawl: Crawl) -> list[str]:
    """Return the addresses of the pages that people write: without those of source files."""
    return [each for each in crawl.pages if "/files/" not in each]


def test_the_crawl_finds_every_page(crawl: Crawl) -> None:
    names = {each.stem for each in (ROOT / "docs").glob("*.md")}
    assert {Path(each).stem for each in crawl.pages} >= names


def test_no_link_is_dead(crawl: Crawl) -> None:
    dead = [
        f"{address} -> {link}"
        for address, page in crawl.pages.items()
        for link in page.links
        if (known := crawl.pages.get(urldefrag(link).url))
        and (fragment := unquote(urldefrag(link).fragment))
        and fragment not in known.ids
    ]
    assert not dead


def test_the_console_says_nothing(crawl: Crawl) -> None:
    assert crawl.complaints == []  # a file that is missing is said there, too


def test_nothing_is_loaded_from_elsewhere(crawl: Crawl) -> None:
    loaded = {each for page in crawl.pages.values() for each in page.loaded}
    assert {each for each in loaded if not each.startswith(crawl.origin)} == set()
    assert not [each for page in crawl.pages.values() for each in page.broken]


def test_each_page_has_a_title_of_its_own(crawl: Crawl) -> None:
    titles = [page.title for page in crawl.pages.values()]
    assert sorted(titles) == sorted(set(titles))


def test_each_page_can_be_read_on_a_phone(browser: Any, crawl: Crawl) -> None:
    show_at(browser, PHONE)
    cut_off = {}
    for address in _written(crawl):
        browser.get(address)
        beyond, elements = browser.execute_script(_CUT_OFF)
        if beyond > 0 or elements:
            cut_off[address] = (beyond, elements)
    show_at(browser, 1280)
    assert cut_off == {}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_each_text_has_contrast(browser: Any, crawl: Crawl, theme: str) -> None:
    prefer(browser, theme)
    faint = {}
    for address in _written(crawl):
        browser.get(address)
        background, lowest, where = browser.execute_script(CONTRAST, _TEXTS)
        assert (sum(background) < 150) == (theme == "dark")
        if lowest < 4.5:
            faint[address] = (round(lowest, 2), where)
    assert faint == {}


@pytest.mark.parametrize("width", [PHONE, 1280])
def test_the_keyboard_is_where_one_sees_it(browser: Any, origin: str, width: int) -> None:
    show_at(browser, width)
    browser.get(urljoin(origin, "start.html"))
    steps = []
    for _ in range(30):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        steps.append(browser.execute_script(_FOCUSED))
    show_at(browser, 1280)
    assert "skip-to-content" in steps[0][0]
    assert [each for each, shown in steps if not shown] == []
    assert any('name="q"' in each for each, _ in steps)
    assert any("toctree" in each or "reference internal" in each for each, _ in steps)


@pytest.mark.parametrize(
    ("words", "title"),
    [
        ("pinned", "Functions"),
        ("PoolTimeout", "Reference"),
        ("Wagtail", "Start with a Wagtail site"),
    ],
)
def test_the_search_finds_pages(browser: Any, origin: str, words: str, title: str) -> None:
    browser.get(origin)
    browser.find_element(By.NAME, "q").send_keys(words + Keys.ENTER)
    wait = WebDriverWait(browser, 10)
    wait.until(lambda driver: title in driver.execute_script(_FOUND))
    # Sphinx asks for the id `a.b.c` as if b and c were classes; then it shows the page's beginning.
    said = [each["message"] for each in browser.get_log("browser")]
    assert not [each for each in said if "Anchored content block not found" not in each]
