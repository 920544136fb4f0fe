"""What an operator may rely on when setting ``LW_*`` variables."""

import pytest
from pydantic import ValidationError

from service.settings import Settings


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


def test_misspelt_variables_stop_the_start_and_all_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LW_MEMORY_BUGDET", "24GB")
    monkeypatch.setenv("LW_PROT", "80")
    with pytest.raises(ValidationError, match="LW_MEMORY_BUGDET, LW_PROT"):
        Settings()


def test_what_kubernetes_injects_for_a_service_called_latentwire_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTWIRE_PORT", "tcp://10.0.0.1:8000")
    assert Settings().port == 8000


def test_settings_cannot_change_after_the_start() -> None:
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]
