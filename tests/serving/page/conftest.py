"""One browser for all tests of the page, and a page that nothing may be complained of."""

import pytest

from tests.serving.page.browser import Page, chromium
from tests.serving.page.server import serving


@pytest.fixture(scope="session")
def driver():
    with chromium() as driver:
        yield driver


@pytest.fixture
def open_page(driver):
    """Opens the page of a stub; at the end nothing may have been complained of, or asked of
    another host."""
    pages, servers = [], []

    def opened(**options):
        servers.append(serving(**options))
        made = Page(driver, servers[-1].__enter__())
        pages.append(made.size(1280, 800))
        made.media()
        return made.open()

    yield opened
    for made, server in zip(pages, servers, strict=True):
        try:
            assert made.complaints() == []
            assert {
                each for each in made.addresses() if not each.startswith(made.stub.url)
            } == set()
        finally:
            driver.get("about:blank")
            server.__exit__(None, None, None)
