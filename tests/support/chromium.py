"""Starts a headless Chromium for a test, and looks at what a page shows in it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def require_chromium(config: pytest.Config) -> None:
    """Skip the test if Chromium is missing; with `--require-browser` let it fail."""
    if not (CHROMIUM and CHROMEDRIVER):
        missing = "chromium and chromedriver are not on the PATH: see 'make browser'"
        if config.getoption("--require-browser", default=False):
            pytest.fail(missing)
        pytest.skip(missing)


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield a Chromium with an empty profile; at the end, nothing may be left in its console."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER))
        try:
            yield driver
            complaints = [each["message"] for each in driver.get_log("browser")]
            assert not complaints, complaints
        finally:
            driver.quit()


def show_at(driver: Any, width: int, height: int = 900) -> None:
    """Show pages at a width in pixels; below 500 as a phone does."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def prefer(driver: Any, theme: str) -> None:
    """Let the system of the browser prefer a theme: "light" or "dark"."""
    features = [{"name": "prefers-color-scheme", "value": theme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


#: Returns the page's background, the lowest contrast of a text with what is behind it, and its
#: element. The argument is a selector of the elements whose texts are looked at.
CONTRAST = """
const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
        const [r, g, b, a = 1] = numbers(getComputedStyle(each).backgroundColor);
        if (a > 0) return [r, g, b];
    }
    return [255, 255, 255];
};
const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((part) => {
        const c = part / 255;
        return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
};
let lowest = 21, where = "";
for (const each of document.querySelectorAll(arguments[0])) {
    const says = [...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!(says || each.value) || !each.getClientRects().length) continue;
    for (const part of [null, "::before"]) {
        const ink = light(numbers(getComputedStyle(each, part).color).slice(0, 3));
        const paper = light(behind(each));
        const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
        if (ratio < lowest) [lowest, where] = [ratio, each.outerHTML.slice(0, 120)];
    }
}
return [behind(document.body), lowest, where];
"""
