"""Which names a service answers to, and which web pages may have it do things."""

import socket
from typing import Any

import pytest
from pydantic import ValidationError

from latentwire.bridge.errors import Forbidden
from latentwire.service.auth.pages import Pages
from latentwire.service.settings import Settings

OWN = "127.0.0.1:8000"
ANYWHERE: dict[str, Any] = {"host": "0.0.0.0", "insecure": True}


def passes(settings: Settings, *, has_keys: bool = False, method: str = "POST", **headers: str | None) -> bool:
    """Whether a request gets through; underscores in the names of headers are hyphens."""
    given = {"host": OWN, **headers}
    raw = [
        (name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in given.items() if value is not None
    ]
    try:
        Pages(settings, has_keys=has_keys).check({"type": "http", "method": method, "headers": raw})
    except Forbidden:
        return False
    return True


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", OWN, "localhost", "LOCALHOST:8000", "localhost.", "a.localhost:8000", "[::1]", "[::1]:8000",
        "10.1.2.3:8000", "[fe80::1]:80", socket.gethostname(), None,
    ],
)  # fmt: skip
@pytest.mark.parametrize("settings", [Settings(), Settings(**ANYWHERE)], ids=["here", "anywhere"])
def test_addresses_and_the_machines_own_names_are_answered_without_keys(settings: Settings, host: str | None) -> None:
    """An address: probes of a cluster ask by it. No Host at all: HTTP/1.0, which no browser speaks any more."""
    for method in ("GET", "POST"):
        assert passes(settings, host=host, method=method)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "evillocalhost", "",
        ":8000", "[::1", "\xfc", "1.2.3", "lw.example.com.evil.example", "0.0.0.0.nip.io",
        "evil.example:8000:127.0.0.1",
    ],
)  # fmt: skip
@pytest.mark.parametrize("settings", [Settings(), Settings(**ANYWHERE), Settings(allowed_hosts=("lw.example.com",))])
def test_any_other_name_is_refused_without_keys(settings: Settings, host: str) -> None:
    for method in ("GET", "POST", "OPTIONS"):
        assert not passes(settings, host=host, method=method)


def test_names_can_be_listed_and_whole_domains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LW_ALLOWED_HOSTS", "LW.example.com, *.inner.example")
    settings = Settings()
    for host in ("lw.example.com", "lw.Example.com:443", "a.inner.example", "a.b.inner.example:80", "localhost"):
        assert passes(settings, host=host)
    for host in ("example.com", "a.lw.example.com", "inner.example", "evilinner.example"):
        assert not passes(settings, host=host)
    assert passes(Settings(allowed_hosts=("*",)), host="evil.example")


def test_the_name_it_listens_on_is_its_own() -> None:
    assert passes(Settings(host="LW.inner", insecure=True), host="lw.inner:8000")


def test_with_keys_any_name_is_answered_unless_some_are_listed() -> None:
    assert passes(Settings(), has_keys=True, host="evil.example")
    assert not passes(Settings(allowed_hosts=("lw.example.com",)), has_keys=True, host="evil.example")
    assert passes(Settings(allowed_hosts=("lw.example.com",)), has_keys=True, host="10.1.2.3")


FOREIGN = [
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": "http://127.0.0.1:3000"},
    {"origin": "http://127.0.0.1.evil.example:8000"},
    {"origin": "https://evil.example", "sec_fetch_site": "cross-site"},
    {"origin": f"http://{OWN}", "sec_fetch_site": "cross-site"},
    {"origin": "http://localhost:3000", "sec_fetch_site": "same-site"},
    {"sec_fetch_site": "cross-site"},
]


@pytest.mark.parametrize("headers", FOREIGN)
def test_a_page_from_elsewhere_may_look_but_not_act(headers: dict[str, str]) -> None:
    for method in ("POST", "DELETE", "PUT"):
        assert not passes(Settings(), method=method, **headers)
        assert passes(Settings(), has_keys=True, method=method, **headers)  # it has none
    for method in ("GET", "HEAD", "OPTIONS"):
        assert passes(Settings(), method=method, **headers)


@pytest.mark.parametrize(
    "headers",
    [
        {},  # no browser
        {"sec_fetch_mode": "cors"},  # Node's fetch
        {"origin": f"http://{OWN}"},
        {"origin": f"http://{OWN}", "sec_fetch_site": "same-origin"},
        {"origin": "https://lw.example.com", "sec_fetch_site": "same-origin"},  # behind a proxy with a name of its own
        {"sec_fetch_site": "none"},
    ],
)
def test_its_own_page_and_other_programs_may_act(headers: dict[str, str]) -> None:
    assert passes(Settings(), **headers)


def test_pages_of_listed_origins_may_act(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LW_CORS_ORIGINS", "https://App.example, http://localhost:3000")
    listed = Settings()
    assert passes(listed, origin="https://app.example", sec_fetch_site="cross-site")
    assert passes(listed, origin="http://localhost:3000", sec_fetch_site="same-site")
    for origin in ("http://app.example", "https://app.example:444", "https://a.app.example", "null"):
        assert not passes(listed, origin=origin, sec_fetch_site="cross-site")
    assert passes(Settings(cors_origins=("*",)), origin="https://evil.example", sec_fetch_site="cross-site")


def test_a_refusal_says_what_was_met_and_which_setting_would_allow_it() -> None:
    with pytest.raises(Forbidden, match=r"'evil\.example' is no name of this service; LW_ALLOWED_HOSTS"):
        Pages(Settings(), has_keys=False).check({"method": "GET", "headers": [(b"host", b"evil.example")]})
    with pytest.raises(Forbidden, match=r"https://evil\.example asks; LW_CORS_ORIGINS"):
        Pages(Settings(), has_keys=False).check({"method": "POST", "headers": [(b"origin", b"https://evil.example")]})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALLOWED_HOSTS", "https://lw.example.com"),
        ("ALLOWED_HOSTS", "lw.example.com:8000"),
        ("ALLOWED_HOSTS", "lw.example.com/v1"),
        ("ALLOWED_HOSTS", "*lw"),
        ("ALLOWED_HOSTS", "lw.*.com"),
        ("CORS_ORIGINS", "app.example"),
        ("CORS_ORIGINS", "https://app.example/"),
        ("CORS_ORIGINS", "https://*.app.example"),
    ],
)
def test_what_is_no_host_or_origin_stops_the_start_and_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"LW_{name}", f"good.example,{value}" if name == "ALLOWED_HOSTS" else value)
    with pytest.raises(ValidationError, match=r"expected an? (name|origin) such as") as caught:
        Settings()
    assert caught.value.errors()[0]["input"] == value
