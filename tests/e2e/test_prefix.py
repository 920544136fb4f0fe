"""Below a path of a real nginx: ``/lw/``, which it leaves in the requests, and ``/other/lw/``, which it takes off."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from latentwire.service.cli.demo import running
from latentwire.service.client.client import Client
from tests.e2e.conftest import run, said
from tests.ports import free_port

PLACES = ["lw", "other/lw"]
TOOLS = Path(sys.executable).parent.parent / "proxies"  # where the Makefile unpacks what is not installed
WAIT_SECONDS = 30.0
CONFIGURATION = """
daemon off; pid {folder}/pid; error_log {folder}/error.log; {user}
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        location /lw {{ proxy_pass http://127.0.0.1:{service}; }}
        location /other/lw/ {{ proxy_pass http://127.0.0.1:{service}/; }}
    }}
}}
"""


FORGIVEN = ("csp", "net::ERR_ABORTED")  # what the page may not ask for; and what was still coming when it was left


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """nginx before a service of the built-in bridge; the address of nginx."""
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:{TOOLS}/usr/sbin")
    if nginx is None:
        pytest.skip("nginx is not installed: apt-get install nginx-light")
    folder, service, port = tmp_path_factory.mktemp("nginx"), free_port(), free_port()
    user = "user root;" if os.getuid() == 0 else ""  # who may write to the folder
    file = folder / "nginx.conf"
    file.write_text(CONFIGURATION.format(folder=folder, user=user, port=port, service=service))
    with running("builtin", service, folder / "log", LW_ROOT_PATH="/lw"):
        proxy = subprocess.Popen([nginx, "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(file)])
        try:
            wait_for(port)
            yield f"http://127.0.0.1:{port}"
        finally:
            proxy.terminate()
            proxy.wait(timeout=30)


def wait_for(port: int) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def page(browser: Browser, site: str) -> Iterator[Page]:
    """A tab; whatever was tested, nothing that it asked for was missing, and it asked nobody else."""
    wrong: list[str] = []
    ours = (site, "data:", f"blob:{site}")
    context = browser.new_context()
    page = context.new_page()
    page.on("response", lambda got: wrong.append(f"{got.status} {got.url}") if got.status >= 400 else None)
    page.on("requestfinished", lambda asked: None if asked.url.startswith(ours) else wrong.append(asked.url))
    page.on(
        "requestfailed",
        lambda asked: None if asked.failure in FORGIVEN else wrong.append(f"{asked.failure} {asked.url}"),
    )
    page.on("pageerror", lambda error: wrong.append(str(error)))
    yield page
    context.close()
    assert wrong == []


@pytest.mark.parametrize("place", PLACES)
def test_the_page_asks_and_shows_answers_below_a_path(page: Page, site: str, place: str) -> None:
    page.goto(f"{site}/{place}/")
    expect(page.locator("#source")).not_to_have_value("")
    run(page)
    expect(said(page, "bridge")).to_have_text("Mara lives in Rome.")
    page.get_by_role("link", name="HTTP reference").click()
    expect(page.get_by_role("heading", name="LatentWire")).to_be_visible()


@pytest.mark.parametrize("place", PLACES)
def test_the_reference_tries_out_the_service_below_a_path(page: Page, site: str, place: str) -> None:
    page.goto(f"{site}/{place}/docs")
    page.locator("#operations-status-bridges_bridges_get").click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()
    expect(page.locator(".live-responses-table .response-col_status").last).to_contain_text("200")
    expect(page.locator(".request-url")).to_contain_text(f"{site}/{place}/bridges")
    page.goto(f"{site}/{place}/redoc")
    expect(page.get_by_role("heading", name="LatentWire").first).to_be_visible()


def test_without_its_last_slash_the_path_leads_to_the_page(page: Page, site: str) -> None:
    for place in PLACES:
        page.goto(f"{site}/{place}")
        expect(page).to_have_url(f"{site}/{place}/")


@pytest.mark.parametrize("place", PLACES)
def test_the_client_takes_an_address_with_a_path(site: str, place: str) -> None:
    with Client(f"{site}/{place}", trust_env=False) as client:
        latent = client.encode("Mara wants a cup of tea. Ben lives in Rome.").latents[0]
        assert client.generate(latent, "Question: Where does Ben live?\nAnswer:").texts == [" Ben lives in Rome."]
