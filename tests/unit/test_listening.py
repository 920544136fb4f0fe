"""Where the service listens: what a host name stands for, and what is said where it cannot be had."""

import errno
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from latentwire.bridge.errors import InvalidRequest
from latentwire.service.cli.server import listen, url

Listen = Callable[[str, int], list[socket.socket]]


@pytest.fixture
def open_() -> Iterator[Listen]:
    """``listen``; everything is closed after the test."""
    with ExitStack() as stack:
        yield lambda host, port: [stack.enter_context(listener) for listener in listen(host, port)]


@pytest.fixture
def ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 of its own (::1)")


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Give a name addresses, as a hosts file would."""

    def given(*addresses: str) -> str:
        real = socket.getaddrinfo

        def look_up(host: str, *args: Any, **named: Any) -> list[Any]:
            asked = addresses if host == "both.example" else (host,)
            return [found for address in asked for found in real(address, *args, **named)]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        return "both.example"

    return given


def reached(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def ports(listeners: list[socket.socket]) -> set[int]:
    return {listener.getsockname()[1] for listener in listeners}


def test_an_answer_is_sent_without_waiting_for_an_acknowledgement(open_: Listen) -> None:
    """Where it waits, every request takes 40 ms more."""
    (listener,) = open_("127.0.0.1", 0)
    with socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


@pytest.mark.usefixtures("ipv6")
def test_two_colons_are_all_addresses_of_both_families(open_: Listen) -> None:
    (port,) = ports(open_("::", 0))
    assert reached("127.0.0.1", port) and reached("::1", port)


@pytest.mark.usefixtures("ipv6")
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_an_address_of_one_family_is_no_other(open_: Listen, host: str) -> None:
    (port,) = ports(open_(host, 0))
    assert reached("::1", port) and not reached("127.0.0.1", port)


@pytest.mark.usefixtures("ipv6")
@pytest.mark.parametrize("addresses", [("127.0.0.1", "::1"), ("::1", "127.0.0.1"), ("0.0.0.0", "::")])
def test_a_name_is_listened_on_at_each_of_its_addresses_and_on_one_port(
    open_: Listen, name: Callable[..., str], addresses: tuple[str, ...]
) -> None:
    listeners = open_(name(*addresses, addresses[0]), 0)
    assert len(listeners) == 2
    (port,) = ports(listeners)
    assert reached("127.0.0.1", port) and reached("::1", port)


@pytest.mark.usefixtures("ipv6")
def test_a_free_port_is_free_at_every_address(
    open_: Listen, name: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, met = socket.create_server, []

    def taken_once(address: tuple[str, int], **more: Any) -> socket.socket:
        if address[0] == "::1" and not met:
            met.append(address[1])
            raise OSError(errno.EADDRINUSE, "taken")
        return real(address, **more)

    monkeypatch.setattr(socket, "create_server", taken_once)
    (port,) = ports(open_(name("127.0.0.1", "::1"), 0))
    assert met and reached("::1", port)


def test_a_family_that_this_machine_lacks_does_not_keep_a_name_from_being_listened_on(
    open_: Listen, name: Callable[..., str]
) -> None:
    (listener,) = open_(name("2001:db8::1", "127.0.0.1"), 0)  # an address that nobody has
    assert listener.getsockname()[0] == "127.0.0.1"


@pytest.mark.usefixtures("ipv6")
def test_a_name_is_refused_whole_when_one_of_its_addresses_is_taken(name: Callable[..., str]) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidRequest, match=f"both.example:{port} .*in use; give another --port"):
            listen(name("127.0.0.1", "::1"), port)
        assert not reached("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("2001:db8::1", r"\[2001:db8::1\]:0 cannot be listened on: .*; give another --host"),
        ("192.0.2.1", r"192.0.2.1:0 cannot be listened on: Cannot assign requested address; give another --host"),
        ("no such name", "cannot be listened on: .*; give another --host"),
        ("a" * 70, "this is no name; give another --host"),
        ("", "cannot be listened on: .*; give another --host"),
    ],
)
def test_an_address_that_cannot_be_had_is_refused_with_the_reason(host: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as caught:
        listen(host, 0)
    assert "while attempting" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("::", "http://[::]:80"),
        ("[::1]", "http://[::1]:80"),
        ("lw", "http://lw:80"),
    ],
)
def test_an_address_is_printed_as_a_browser_takes_it(host: str, address: str) -> None:
    assert url(host, 80) == address
