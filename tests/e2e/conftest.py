"""A real Chromium, and a page of ours in it over a real service that asks for a key."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect, sync_playwright

from latentwire.service.auth.keys import hash_of, key_line
from latentwire.service.cli.demo import running
from tests.ports import free_port

KEY = "a key for the page"
WAIT_SECONDS = 30.0
HTTP_REFUSAL = re.compile(r"Failed to load resource: the server responded with a status of 4\d\d")
expect.set_options(timeout=WAIT_SECONDS * 1000)

Open = Callable[..., Page]


def chromium() -> str | None:
    """Where a Chromium is, if there is one."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def opened_browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@contextmanager
def running_service(folder: Path, **environment: str) -> Iterator[str]:
    """A service of the built-in bridge: its address."""
    port = free_port()
    with running("builtin", port, folder / "log", **environment):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium for the file."""
    if chromium() is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    with opened_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One service for the file, which asks for a key."""
    keys = key_line("page", hash_of(KEY.encode()), ["infer"])
    with running_service(tmp_path_factory.mktemp("page"), LW_API_KEYS=keys) as address:
        yield address


def with_key(browser: Browser, **options: Any) -> BrowserContext:
    """A window whose tabs have been given the key already."""
    context = browser.new_context(**options)
    context.add_init_script(f"sessionStorage.setItem('latentwire-key', {json.dumps(KEY)})")
    return context


@pytest.fixture
def open_page(browser: Browser, service: str) -> Iterator[Open]:
    """Open the page. At the end, whatever was tested: no error in the console, no request to anybody else."""
    wrong: list[str] = []
    contexts: list[BrowserContext] = []

    def heard(message: ConsoleMessage) -> None:
        if message.type == "error" and not HTTP_REFUSAL.match(message.text):
            wrong.append(message.text)

    def opened(*, key: bool = True, **options: Any) -> Page:
        contexts.append(with_key(browser, **options) if key else browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", heard)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: None if asked.url.startswith(f"{service}/") else wrong.append(asked.url))
        page.goto(f"{service}/")
        if key:
            expect(page.locator("#source")).not_to_have_value("")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def run(page: Page) -> None:
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_contain_text("Done in")


def said(page: Page, condition: str) -> Any:
    return page.locator(f"[data-condition={condition}] .said")


def number(page: Page, condition: str, name: str) -> Any:
    return page.locator(f"[data-condition={condition}] [data-number={name}]")


def sideways(page: Page) -> int:
    """By how many pixels the page is wider than the window."""
    width: int = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    return width
