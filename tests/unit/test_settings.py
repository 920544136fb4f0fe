"""What an operator may rely on when setting ``LW_*`` variables."""

import pytest
import torch
from pydantic import ValidationError

from latentwire.service.settings import Settings, Sizes, service_links


def test_the_defaults_are_valid_and_local() -> None:
    settings = Settings()
    assert settings.host == "127.0.0.1"
    assert settings.memory_budget is None


@pytest.mark.parametrize(("said", "meant"), [("24MB", 24 * 10**6), ("2GiB", 2 << 30), ("1000", 1000)])
def test_sizes_are_said_the_way_people_say_them(monkeypatch: pytest.MonkeyPatch, said: str, meant: int) -> None:
    monkeypatch.setenv("LW_MAX_BODY", said)
    assert Settings().max_body == meant


def test_a_flag_wins_over_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LW_PORT", "1")
    assert Settings(port=2).port == 2
    assert Settings().port == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "65536"),
        ("PORT", "http"),
        ("MEMORY_BUDGET", "a lot"),
        ("MEMORY_BUDGET", "0"),
        ("MAX_BATCH", "0"),
        ("MAX_QUEUE", "-1"),
        ("REQUEST_TIMEOUT", "0"),
        ("STALL_TIMEOUT", "-1"),
        ("MAX_INPUTS", "none"),
        ("STORE_TTL", "0"),
        ("STORE_TTL", "inf"),
        ("REQUEST_TIMEOUT", "nan"),
        ("REDIS_URL", "localhost:6379"),
        ("MAX_BODY", "32 MBB"),
    ],
)
def test_a_wrong_value_stops_the_start_and_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"LW_{name}", value)
    with pytest.raises(ValidationError) as caught:
        Settings()
    (error,) = caught.value.errors()
    assert error["loc"] == (name.lower(),)
    assert error["input"] == value


def test_how_much_is_done_at_once_follows_the_device_where_the_operator_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert Settings().sizes(torch.device("cpu")) == Sizes(32, 16_384, 512, "paged", None, 0.0)
    for device in ("cuda:1", "xpu", "mps"):
        assert Settings().sizes(torch.device(device)) == Sizes(256, 32_768, 2_048, "async", "0.9", 0.8)
    monkeypatch.setenv("LW_MAX_BATCH", "7")
    monkeypatch.setenv("LW_BATCH_TOKENS", "1000")
    monkeypatch.setenv("LW_STEP_TOKENS", "99")
    monkeypatch.setenv("LW_MEMORY_BUDGET", "24GB")
    for device in ("cpu", "cuda"):
        said = Settings().sizes(torch.device(device))
        assert (said.max_batch, said.batch_tokens, said.step_tokens, said.memory_budget) == (7, 1000, 99, "24GB")


def test_misspelt_variables_stop_the_start_and_all_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LW_MEMORY_BUGDET", "24GB")
    monkeypatch.setenv("LW_PROT", "80")
    with pytest.raises(ValidationError, match="LW_MEMORY_BUGDET, LW_PROT"):
        Settings()


# Kubernetes makes these for a Service called ``lw``, ``lw-admin`` or ``lw-service``.
LINKS = {
    "{}_SERVICE_HOST": "10.0.0.1",
    "{}_SERVICE_PORT": "80",
    "{}_SERVICE_PORT_HTTP": "80",
    "{}_PORT": "tcp://10.0.0.1:80",
    "{}_PORT_80_TCP": "tcp://10.0.0.1:80",
    "{}_PORT_80_TCP_PROTO": "tcp",
    "{}_PORT_80_TCP_PORT": "80",
    "{}_PORT_80_TCP_ADDR": "10.0.0.1",
    "{}_PORT_53_UDP": "udp://[fd00::1]:53",
}


@pytest.fixture(params=["LW", "LW_ADMIN", "LW_SERVICE"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    links = {name.format(request.param): value for name, value in LINKS.items()}
    for name, value in links.items():
        monkeypatch.setenv(name, value)
    return sorted(links)


def test_links_that_kubernetes_makes_for_a_service_under_our_name_stop_nothing(links: list[str]) -> None:
    assert service_links() == links
    assert (Settings().port, Settings().admin_port) == (8000, None)


@pytest.mark.usefixtures("links")
def test_beside_links_what_the_operator_says_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings(port=9000).port == 9000
    monkeypatch.setenv("LW_PORT", "9001")  # the pod's own variables come before links
    monkeypatch.setenv("LW_ADMIN_PORT", "9002")
    assert (Settings().port, Settings().admin_port) == (9001, 9002)


@pytest.mark.usefixtures("links")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LW_PROT", "80"),
        ("LW_SERVICE_PORTS", "80"),
        ("LW_OTHER_SERVICE_PORT", "80"),  # of a Service that has no link to itself
        ("LW_PORT_80_TCP_PORT", "eighty"),
        ("LW_PORT_80_TCP_NAME", "tcp://10.0.0.1:80"),
        ("LW_SERVICE_HOST", "gpu-7"),
    ],
)
def test_beside_links_a_misspelt_variable_still_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError, match=f"unknown settings: {name}"):
        Settings()


@pytest.mark.parametrize(
    ("name", "value"), [("PORT", "http://10.0.0.1:80"), ("PORT", "tcp://lw:80"), ("REDIS_URL", "tcp://10.0.0.1:6379")]
)
def test_what_has_not_exactly_the_shape_of_a_link_is_the_operators(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"LW_{name}", value)
    with pytest.raises(ValidationError, match=name.lower()):
        Settings()


@pytest.mark.parametrize(
    ("said", "meant"), [("/lw", "/lw"), ("/lw/", "/lw"), ("/", ""), ("", ""), ("/a/b-c", "/a/b-c")]
)
def test_a_path_before_every_address_is_said_with_or_without_its_last_slash(said: str, meant: str) -> None:
    assert Settings(root_path=said).root_path == meant


@pytest.mark.parametrize("said", ["lw", "/lw//x", "//lw", "/l w", "/lw?x", "http://lw/"])
def test_a_path_that_is_none_stops_the_start(said: str) -> None:
    with pytest.raises(ValidationError, match="expected a path such as /lw"):
        Settings(root_path=said)


def test_settings_cannot_change_after_the_start() -> None:
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]
