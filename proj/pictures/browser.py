"""Opens the order desk's pages in headless Chromium: still pictures, and a film of a rush."""

import asyncio
import io
import shutil
import sys
import tempfile
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By

from proj.pictures import desk as running
from proj.pictures.guests import Guests, Staff, client

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
#: The still pictures: name, path, width and height of the page, and whether the chef is signed in.
SCREENS = (
    ("order", "/", 1120, 760, False),
    ("order-phone", "/", 390, 760, False),
    ("board", "/board/", 1120, 760, True),
    ("board-phone", "/board/", 390, 760, True),
    ("status", "/status/", 1120, 760, False),
    ("status-phone", "/status/", 390, 760, False),
    ("connections", "/admin/pgbackend/connections/", 1120, 760, True),
)
FRAME = 200  # milliseconds of a frame of the film
WIDTH, HEIGHT = 1024, 500  # of the board in the film; the figures of the status page are below it
WALL, PAD = "#eef0e6", 16


@contextmanager
def chromium(width, height, *, dark=False):
    """Provide a browser whose page has this size, and the system's colours light or dark."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or sys.exit("no chromium: 'make browser'")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            _resize(driver, width, height)
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
            yield driver
        finally:
            driver.quit()


def _resize(driver, width, height):
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def sign_in(driver, address):
    driver.get(f"{address}/sign-in/")
    driver.find_element(By.NAME, "username").send_keys("chef")
    driver.find_element(By.NAME, "password").send_keys(running.PASSWORD)
    driver.find_element(By.CSS_SELECTOR, "main button").click()


def shot(driver, element=None):
    """Return a picture of the window, or of the element that a selector finds."""
    seen = driver.find_element(By.CSS_SELECTOR, element).screenshot_as_png if element else None
    return Image.open(io.BytesIO(seen or driver.get_screenshot_as_png())).convert("RGB")


def make(url, into, *, only, quick):
    screens, schemes, frames = (SCREENS[:1], [True], 3) if quick else (SCREENS, [False, True], 40)
    with running.desk(url, pool=8, service_seconds=0.2 if quick else 5) as desk:
        if "film" in only:
            asyncio.run(_film(desk, into, frames))
        if "screens" in only:
            asyncio.run(_screens(desk, into, screens, schemes))


# --- Still pictures ----------------------------------------------------------------------------


async def _screens(desk, into, screens, schemes):
    """Photograph each page light and dark, while a rush of guests is on."""
    async with _staff(desk) as (guests, staff):
        await _evening(guests, staff)
        for dark in schemes:
            async with _busy(guests):
                await asyncio.to_thread(_photograph, desk, into, screens, dark)


def _photograph(desk, into, screens, dark):
    for as_chef in sorted({screen[-1] for screen in screens}):
        with chromium(1120, 760, dark=dark) as driver:
            if as_chef:
                sign_in(driver, desk.address)
            for name, path, width, height, _ in [s for s in screens if s[-1] == as_chef]:
                _resize(driver, width, height)
                _open(driver, desk.address, path)
                file = into / f"{name}-{'dark' if dark else 'light'}.webp"
                shot(driver).save(file, quality=80, method=6)


def _open(driver, address, path):
    driver.get(address + path)
    if "Something burnt" in driver.page_source:
        sys.exit(f"proj.pictures: {path} is an error's page: is the machine too busy?")
    _wait(driver, 24 if path == "/status/" else 1)  # the curve of the last seconds


def _wait(driver, seconds):
    """Let the page live for some seconds, by its own clock."""
    driver.set_script_timeout(seconds + 20)
    driver.execute_async_script(f"setTimeout(arguments[0], {seconds * 1000})")


@asynccontextmanager
async def _staff(desk):
    async with client(desk) as http:
        guests, staff = Guests(desk), Staff(http)
        await guests.read_menu()
        await staff.sign_in()
        yield guests, staff


async def _evening(guests, staff):
    """Serve what is left, then place orders of which some are cooking, ready and served."""
    await staff.clear()
    await asyncio.gather(*(guests.order() for _ in range(14)))
    orders = await staff.waiting()
    for place, (pk, _) in enumerate(orders):
        for status in ("accepted", "cooking", "ready")[: 3 - place // 3 if place < 9 else 0]:
            await staff.move(pk, status)


@asynccontextmanager
async def _busy(guests):
    """Send guests all the time, until the block ends."""
    task = asyncio.create_task(_come_and_come(guests))
    try:
        await asyncio.sleep(3)
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _come_and_come(guests):
    while True:
        await guests.rush(12, 30)


# --- The film ----------------------------------------------------------------------------------


async def _film(desk, into, frames):
    """Film the board beside the status page, while guests come and the staff moves orders on."""
    async with _staff(desk) as (guests, staff):
        await _evening(guests, staff)
        with ExitStack() as stack:
            open_one = partial(asyncio.to_thread, stack.enter_context)
            board = await open_one(chromium(WIDTH, HEIGHT))
            # A frame in the midst of a fade would show the tickets half there.
            await asyncio.to_thread(_without_motion, board)
            figures = await open_one(chromium(WIDTH, HEIGHT))
            await asyncio.to_thread(board.get, f"{desk.address}/board/")
            await asyncio.to_thread(figures.get, f"{desk.address}/status/")
            async with asyncio.TaskGroup() as group:
                coming = group.create_task(guests.rush(frames * 0.5, 16))
                working = group.create_task(staff.work(0.3))
                pictures = [await _frame(board, figures) for _ in range(frames)]
                working.cancel()
                await coming
    _save(pictures, into)


def _without_motion(driver):
    features = [{"name": "prefers-reduced-motion", "value": "reduce"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


async def _frame(board, figures):
    above, below = await asyncio.gather(
        asyncio.to_thread(shot, board), asyncio.to_thread(shot, figures, "#status .figures")
    )
    frame = Image.new("RGB", (WIDTH, HEIGHT + below.height + PAD), WALL)
    frame.paste(above, (0, 0))
    frame.paste(below, ((WIDTH - below.width) // 2, HEIGHT + PAD))
    size = frame.width * 5 // 6, frame.height * 5 // 6
    return frame.resize(size, Image.Resampling.LANCZOS)


def _save(frames, into):
    """Write the film, and its last frame for those who want no motion."""
    first, *rest = frames
    first.save(
        into / "rush.webp",
        save_all=True,
        append_images=rest,
        duration=[FRAME] * len(rest) + [2000],
        loop=0,
        quality=62,
        method=4,
    )
    frames[-1].save(into / "rush-still.webp", quality=80, method=6)
