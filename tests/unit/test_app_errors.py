"""Every error has a status, and reaches the caller in the one body."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from latentwire.bridge import errors
from latentwire.service.api.errors import RETRY_LATER, STATUS
from latentwire.service.app import create_app
from latentwire.service.settings import Settings


def subclasses(kind: type[errors.LatentWireError]) -> Iterator[type[errors.LatentWireError]]:
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


EVERY = sorted(set(subclasses(errors.LatentWireError)), key=lambda kind: kind.__name__)


@pytest.fixture(scope="module")
def app(checkpoint: Path) -> FastAPI:
    return create_app(Settings(), {"tiny": str(checkpoint)})


@pytest.fixture
def raising(app: FastAPI) -> Iterator[Callable[[Exception], TestClient]]:
    """A client whose ``GET /raise`` raises the error given. Nothing is loaded: the app is never started."""
    routes = list(app.router.routes)

    def install(error: Exception) -> TestClient:
        @app.get("/raise")
        async def handler() -> None:
            raise error

        return TestClient(app, "http://127.0.0.1", raise_server_exceptions=False)

    yield install
    app.router.routes[:] = routes


def test_every_deliberate_error_has_a_status_and_nothing_else_does() -> None:
    assert set(STATUS) == set(EVERY)
    assert len(EVERY) == 21


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    said = {line.split()[1]: int(line.split()[-1]) for line in (errors.__doc__ or "").splitlines() if "── " in line}
    assert said == {kind.__name__: status for kind, status in STATUS.items()}


@pytest.mark.parametrize("kind", EVERY)
def test_every_deliberate_error_reaches_the_caller_in_the_one_body(
    kind: type[errors.LatentWireError], raising: Callable[[Exception], TestClient]
) -> None:
    response = raising(kind("seven is not eight", param="number")).get("/raise", headers={"x-request-id": "r-1"})
    assert response.status_code == STATUS[kind]
    assert response.json() == {
        "error": {"type": kind.__name__, "message": "seven is not eight", "param": "number", "request_id": "r-1"}
    }
    assert response.headers["x-request-id"] == "r-1"
    assert ("retry-after" in response.headers) == (response.status_code in RETRY_LATER)


def test_only_a_refusal_that_may_pass_says_when_to_come_back() -> None:
    again = {kind.__name__ for kind, status in STATUS.items() if status in RETRY_LATER}
    assert again == {"Overloaded", "RateLimited", "NotReady", "StoreUnavailable", "InsufficientMemory"}


def test_an_error_without_a_field_at_fault_says_null(raising: Callable[[Exception], TestClient]) -> None:
    assert raising(errors.Overloaded("full")).get("/raise").json()["error"]["param"] is None


def test_a_crash_is_a_500_in_the_same_body_and_tells_nothing_of_the_inside(
    raising: Callable[[Exception], TestClient],
) -> None:
    response = raising(ZeroDivisionError("secret")).get("/raise", headers={"x-request-id": "r-2"})
    assert response.status_code == 500
    assert response.headers["x-request-id"] == "r-2"
    error = response.json()["error"]
    assert (error["type"], error["param"], error["request_id"]) == ("InternalError", None, "r-2")
    assert "secret" not in response.text and "Traceback" not in response.text


@pytest.mark.parametrize("given", ["", "x" * 129, "tab\tinside", "ümlaut".encode().decode("latin-1")])
def test_an_unusable_request_id_is_replaced(given: str, raising: Callable[[Exception], TestClient]) -> None:
    response = raising(errors.NotReady("later")).get("/raise", headers={"x-request-id": given.encode("latin-1")})
    used = response.headers["x-request-id"]
    assert used == response.json()["error"]["request_id"]
    assert used != given and len(used) == 32


def test_a_name_nobody_serves_is_a_clear_404(app: FastAPI) -> None:
    error = TestClient(app, "http://127.0.0.1").get("/bridges/other").json()["error"]
    assert error["type"] == "UnknownBridge"
    assert "'other'" in error["message"] and "tiny" in error["message"]


def test_every_status_an_error_has_is_documented(app: FastAPI) -> None:
    responses = app.openapi()["paths"]["/generate"]["post"]["responses"]
    assert {str(status) for status in STATUS.values()} <= set(responses)
