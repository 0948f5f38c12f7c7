"""Fixtures of the tests that open the pages in a browser."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import urljoin

import pytest
from tests.support.web_page import CHROMIUM, Open


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Open]:
    """Opens pages that may neither throw nor ask anybody but their own server."""
    contexts, troubles = [], []

    def open_page(url: str, **options: Any) -> Any:
        own = (urljoin(url, "/"), "blob:")
        contexts.append(context := browser.new_context(**options))
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda line: "Policy" in line.text and troubles.append(line.text))
        page.on(
            "request",
            lambda r: r.url.startswith(own) or troubles.append(f"asked {r.url}"),
        )
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []
