"""Debian's Chromium, without a screen, for tests of pages that people read."""

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

PICTURES = Path(os.environ.get("TAVLAD_TEST_ARTIFACTS", Path(__file__).parents[1] / ".pytest_cache" / "pictures"))
"""Where tests leave what the browser showed."""

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_SIZE = {"width": 1680, "height": 1000}
_MILLISECONDS = 60_000


def chromium() -> str | None:
    """The browser of this machine."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


@contextmanager
def opened_page() -> Generator[Page]:
    """A page of a browser that has no account, no extensions and no memory; skips where there is no Chromium."""
    path = chromium()
    if path is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # its sandbox refuses root
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        page = browser.new_page(viewport=_SIZE)
        page.set_default_timeout(_MILLISECONDS)
        yield page
        browser.close()


def picture_of(page: Page, path: Path) -> None:
    """What the page shows now, with its animations at their end, without the panel of MLflow's assistant."""
    path.parent.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(1500)  # charts draw themselves in
    panel = page.locator("xpath=//*[text()='MLflow Assistant']/ancestor::*[count(.//button) >= 3][1]//button")
    if panel.count():
        panel.last.click()
        page.wait_for_timeout(1500)
    page.screenshot(path=path)
