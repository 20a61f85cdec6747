"""Opens local pages in a headless Chromium, for tests that look at what a reader would see."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
HEIGHT = 900
# Elements that stick out of the window and lie in no box that scrolls or clips.
STICKING_OUT = """
const wide = document.documentElement.clientWidth + 0.5;
const held = element => {
  for (let at = element.parentElement; at; at = at.parentElement)
    if (getComputedStyle(at).overflowX !== 'visible' && at !== document.body) return true;
  return false;
};
return [...document.body.querySelectorAll('*')]
  .filter(one => one.getBoundingClientRect().right > wide && !held(one))
  .map(one => one.tagName + ' ' + (one.textContent || '').trim().slice(0, 60));
"""


@dataclass
class Page:
    """A page as it was shown.

    Attributes:
        driver: the browser, for what a test wants to ask besides.
        console: what it complained of.
        requests: the addresses that were asked for, those of ``file:`` and ``data:`` included.
        overflow: what sticks out of the window to the right.
    """

    driver: Any
    console: list[str]
    requests: list[str]
    overflow: list[str]

    @property
    def foreign(self) -> list[str]:
        """The requests that left this machine's files."""
        return [address for address in self.requests if not address.startswith(("file:", "data:"))]

    def colour(self, selector: str, what: str) -> str:
        """A computed colour of the first element that a selector finds."""
        script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
        return str(self.driver.execute_script(script, selector, what))

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        height = self.driver.execute_script("return document.documentElement.scrollHeight")
        width = self.driver.execute_script("return document.documentElement.clientWidth")
        _resize(self.driver, width, min(height, 16000))
        self.driver.get_screenshot_as_file(str(path))


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Any]:
    """A browser with a fresh profile below ``folder``; the test is skipped where there is none."""
    selenium = pytest.importorskip("selenium", reason="selenium is not installed")
    del selenium
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium or chromedriver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in (*OPTIONS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    running = webdriver.Chrome(options=options, service=Service(driver))
    try:
        running.get("about:blank")  # instead of the browser's own start page, and its requests
        yield running
    finally:
        running.quit()


def open_page(driver: Any, path: Path, width: int = 1200, dark: bool = False) -> Page:
    """Show a local page.

    Args:
        driver: from :func:`browser`.
        path: the HTML file.
        width: of the window, CSS pixels.
        dark: whether the reader prefers dark colours.
    """
    for log in ("performance", "browser"):  # what earlier pages left
        driver.get_log(log)
    theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": theme})
    _resize(driver, width, HEIGHT)
    driver.get(path.resolve().as_uri())
    overflow = driver.execute_script(STICKING_OUT)
    wide = driver.execute_script("return document.documentElement.scrollWidth")
    if wide > width and not overflow:
        overflow = [f"the page is {wide} pixels wide"]
    console = [entry["message"] for entry in driver.get_log("browser")]
    return Page(driver, console, _requests(driver.get_log("performance")), overflow)


def _resize(driver: Any, width: int, height: int) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def _requests(log: list[dict[str, Any]]) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in log]
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
