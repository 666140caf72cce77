"""Open a page of ours in headless Chromium, as a reader would, and say what is wrong with it."""

from __future__ import annotations

import base64
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

WIDTHS = (360, 1280)
SCHEMES = ("light", "dark")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)
_INSPECT = (Path(__file__).parent / "inspect_page.js").read_text()


@dataclass(frozen=True)
class View:
    """What one width and colour scheme showed."""

    width: int
    scheme: str
    num_figures: int  # plotly figures with at least one drawn line or bar
    background: str
    screenshot: Path


def skip_reason() -> str | None:
    """Why no browser can be driven here, or None."""
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            return f"{program} is absent: apt-get install chromium chromium-driver"
    if find_spec("selenium") is None:
        return "selenium is absent: pip install 'm3i-fast[dev]'"
    return None


def check_page(page: Path, screenshots: Path, *, num_figures: int) -> list[View]:
    """Open `page` at two widths and in both colour schemes; returns a view for each of the four.

    Fails on a console message of level warning or worse, an uncaught exception, a request to
    anything but the file itself and data it holds, a missing figure or picture, text outside the
    width or with too little contrast, and a picture without alternative text.
    """
    screenshots.mkdir(parents=True, exist_ok=True)
    views = []
    with open_browser() as driver:
        for scheme in SCHEMES:
            for width in WIDTHS:
                views.append(_view(driver, page, screenshots, width, scheme))
                assert views[-1].num_figures == num_figures, views[-1]
        emulate(driver, 360, "light")  # without loading again: figures must follow the scheme
        wait(driver, "return document.documentElement.dataset.scheme === 'light'")
        no_complaints(driver, "after the scheme changed")
    assert len({view.background for view in views}) == 2, "dark mode changes nothing"
    return views


def _view(driver: Any, page: Path, screenshots: Path, width: int, scheme: str) -> View:
    where = f"{page.name} at {width} px, {scheme}"
    _open(driver, page, width, scheme)
    state = driver.execute_script("return document.documentElement.dataset.figures")
    messages = [entry["message"] for entry in driver.get_log("browser")]
    assert not messages, f"{where}: the console says {messages}"
    assert state == "drawn", f"{where}: figures are {state}"
    requested = [url for url in requested_by(driver) if not url.startswith(("data:", "blob:"))]
    assert requested == [page.resolve().as_uri()], f"{where}: requests {requested}"
    no_complaints(driver, where)
    screenshot = screenshots / f"{page.stem}-{width}-{scheme}.png"
    capture(driver, screenshot, width)
    return View(
        width,
        scheme,
        driver.execute_script("return inspectPage.numFigures()"),
        driver.execute_script("return getComputedStyle(document.body).backgroundColor"),
        screenshot,
    )


def _open(driver: Any, page: Path, width: int, scheme: str) -> None:
    emulate(driver, width, scheme)
    driver.get_log("performance")  # forget the last page
    driver.get(page.resolve().as_uri())
    wait(driver, "return document.documentElement.dataset.figures !== undefined")


def wait(driver: Any, condition: str) -> None:
    """Wait until JavaScript returns what is true; fails after half a minute."""
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver.support.ui import WebDriverWait

    try:
        WebDriverWait(driver, 30, poll_frequency=0.05).until(lambda d: d.execute_script(condition))
    except TimeoutException as error:
        messages = [entry["message"] for entry in driver.get_log("browser")]
        raise AssertionError(f"never true: {condition}; the console says {messages}") from error


def emulate(driver: Any, width: int, scheme: str) -> None:
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def no_complaints(driver: Any, where: str) -> None:
    """Fail on text that is too pale or too wide, and on pictures that are broken or unnamed."""
    driver.execute_script(_INSPECT)
    complaints = driver.execute_async_script("inspectPage.complaints().then(arguments[0])")
    assert not complaints, f"{where}: " + "; ".join(complaints)


def requested_by(driver: Any) -> Iterator[str]:
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            yield message["params"]["request"]["url"]


def capture(driver: Any, path: Path, width: int) -> None:
    height = driver.execute_script("return document.documentElement.scrollHeight")
    picture = driver.execute_cdp_cmd(
        "Page.captureScreenshot",
        {
            "captureBeyondViewport": True,
            "clip": {"x": 0, "y": 0, "width": width, "height": height, "scale": 1},
        },
    )
    path.write_bytes(base64.b64decode(picture["data"]))


@contextmanager
def open_browser() -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for flag in FLAGS:
        options.add_argument(flag)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options.add_argument(f"--user-data-dir={profile}")
        service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
        driver = webdriver.Chrome(options=options, service=service)
        try:
            yield driver
        finally:
            driver.quit()
