"""A real Chromium that looks at the page, and the few things that tests do with it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from contextlib import contextmanager, suppress

import pytest

from tests.serving.page.server import PATIENCE_S

MISSING = [
    name
    for name, is_there in (
        ("chromium", shutil.which("chromium")),
        ("chromedriver", shutil.which("chromedriver")),
        ("selenium", importlib.util.find_spec("selenium")),
    )
    if not is_there
]
needs_browser = pytest.mark.skipif(
    bool(MISSING), reason=f"needs a browser: {', '.join(MISSING)} not installed"
)
ENTER, ESCAPE, TAB = "\ue007", "\ue00c", "\ue004"
SHIFT_ENTER = "\ue008\ue007\ue000"
MODEL = ".message.assistant"  # what the model said
BEFORE, AFTER = "\u2039", "\u203a"  # what stands on the buttons between versions
# What a browser writes to its console for every answer that is not a 2xx, whatever a page does.
REFUSALS = "Failed to load resource: the server responded with a status of "


@contextmanager
def chromium():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The page of one server in the browser."""

    def __init__(self, driver, stub):
        self.driver, self.stub = driver, stub
        self.is_lost = False  # whether connections are meant to fail

    def open(self, *, is_empty: bool = True) -> Page:
        """Opens it anew; `is_empty`: in a browser that has never seen it."""
        if is_empty:
            self.cdp("Storage.clearDataForOrigin", origin=self.stub.url, storageTypes="all")
        self.driver.get(self.stub.url)
        return self

    def cdp(self, command: str, **arguments):
        return self.driver.execute_cdp_cmd(command, arguments)

    def size(self, width: int, height: int) -> Page:
        found = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.cdp("Emulation.setDeviceMetricsOverride", **found)
        return self

    def media(self, **features: str) -> None:
        found = [{"name": f"prefers-{name}", "value": value} for name, value in features.items()]
        self.cdp("Emulation.setEmulatedMedia", features=found)

    def run(self, code: str, *arguments):
        return self.driver.execute_script(code, *arguments)

    def find(self, css: str):
        return self.driver.find_element("css selector", css)

    def all(self, css: str) -> list:
        return self.driver.find_elements("css selector", css)

    def text(self, css: str) -> str | None:
        """What is seen of the last such element."""
        return self.run(
            "const all = document.querySelectorAll(arguments[0]);"
            "return all.length ? all[all.length - 1].innerText : null",
            css,
        )

    def wait(self, condition, message=""):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, PATIENCE_S, poll_frequency=0.03).until(
            lambda _: condition(), message
        )

    def wait_text(self, css: str, words: str) -> None:
        try:
            self.wait(lambda: words in (self.text(css) or ""))
        except Exception as error:
            raise AssertionError(f"{css}: {self.text(css)!r}, not {words!r}") from error

    def write(self, words: str, *keys: str) -> None:
        self.find("#draft").send_keys(words, *keys)

    def send(self, words: str) -> None:
        self.write(words, ENTER)

    def press(self, words: str, within: str = "body") -> None:
        """The last button that is seen and says so."""

        def found():
            return self.run(
                "return [...document.querySelectorAll(`${arguments[0]} button`)]"
                ".filter((each) => each.checkVisibility() && each.innerText === arguments[1]"
                " && !each.disabled).at(-1)",
                within,
                words,
            )

        def pressed():
            with suppress(StaleElementReferenceException):  # drawn anew meanwhile
                found().click()
                return True
            return False

        from selenium.common.exceptions import StaleElementReferenceException

        self.wait(found, f"no button {words!r} in {within}")
        self.wait(pressed)

    def stored(self) -> list[dict]:
        """The conversations that the browser keeps."""
        found = self.run("return Object.entries(localStorage)")
        return [
            json.loads(value) for name, value in found if name.startswith("jlayer:conversation:")
        ]

    def complaints(self) -> list[str]:
        """What stands in the console and was not to be expected: errors, violated policies."""
        found = [entry["message"] for entry in self.driver.get_log("browser")]
        if self.is_lost:
            found = [each for each in found if "net::ERR_" not in each]
        return [each for each in found if REFUSALS not in each]

    def addresses(self) -> set[str]:
        """Where the page has asked for something."""
        return set(
            self.run(
                "return performance.getEntriesByType('resource').map((each) => each.name)"
                ".concat(location.href)"
            )
        )
