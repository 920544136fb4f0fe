"""Other people's pages in a real Chromium, beside a keyless service on this machine: they get nothing out of it."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.e2e.conftest import chromium, running_service

NAME = "pages.example"  # which the browser, and nobody else, is told to find on this machine
ASK: dict[str, Any] = {"inputs": [{"text": "Mara lives in Rome."}], "prompt": "Where does Mara live?"}
FETCH = """async ([url, options]) => {
    try {
        const answer = await fetch(url, {method: "POST", ...options});
        return answer.type === "opaque" ? "sent unseen" : answer.status + " " + (await answer.text());
    } catch (error) {
        return "failed";
    }
}"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *given: Any) -> None:
        """Say nothing."""


@contextmanager
def site(folder: Path) -> Iterator[int]:
    """Somebody's web site: its port."""
    (folder / "index.html").write_text("<title>a page</title>")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if chromium() is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    found = f"--host-resolver-rules=MAP {NAME} 127.0.0.1"
    with sync_playwright() as playwright:
        args = ["--no-sandbox", "--disable-gpu", "--no-proxy-server", found]
        browser = playwright.chromium.launch(executable_path=chromium(), args=args)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """One site under two names, which are two origins: one that the service lists, and one that it does not."""
    with site(tmp_path_factory.mktemp("site")) as port:
        yield f"http://localhost:{port}", f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, sites: tuple[str, str]) -> Iterator[str]:
    """A service without keys."""
    with running_service(tmp_path_factory.mktemp("service"), LW_CORS_ORIGINS=sites[0]) as address:
        yield address


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with browser.new_context() as context:
        yield context.new_page()


def counted(service: str, start: str) -> float:
    lines = httpx.get(f"{service}/metrics", trust_env=False).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(start))


def json_of(**body: Any) -> dict[str, Any]:
    return {"body": json.dumps(body), "headers": {"content-type": "application/json"}}


def test_a_page_of_another_origin_can_neither_read_an_answer_nor_have_anything_done(
    page: Page, service: str, sites: tuple[str, str]
) -> None:
    worked = 'latentwire_tokens_total{kind="generated"}'
    refused = 'latentwire_requests_total{route="/generate",status="403"}'
    before = counted(service, worked)
    page.goto(sites[1])
    assert page.evaluate(FETCH, [f"{service}/generate", json_of(**ASK)]) == "failed"  # its preflight was
    simple = {"body": json_of(**ASK)["body"], "mode": "no-cors"}  # text/plain, which needs no preflight
    assert page.evaluate(FETCH, [f"{service}/generate", simple]) == "sent unseen"
    assert page.evaluate(FETCH, [f"{service}/admin/bridges/demo/unload", {"mode": "no-cors"}]) == "sent unseen"
    assert counted(service, refused) == 1 and counted(service, worked) == before
    assert httpx.get(f"{service}/bridges", trust_env=False).json()["bridges"][0]["loaded"]


def test_a_page_whose_name_is_made_to_lead_here_is_refused_like_any_stranger(page: Page, service: str) -> None:
    answer = page.goto(f"{service.replace('127.0.0.1', NAME)}/health/live")
    assert answer is not None and answer.status == 403 and "no name of this service" in answer.text()
    said = page.evaluate(FETCH, ["/generate", json_of(**ASK)])
    assert said.startswith("403 ") and "no name of this service" in said


def test_a_page_of_a_listed_origin_is_answered(page: Page, service: str, sites: tuple[str, str]) -> None:
    page.goto(sites[0])
    said = page.evaluate(FETCH, [f"{service}/generate", json_of(**ASK)])
    assert said.startswith("200 ") and '"finish_reason"' in said
