"""A long text is read beside the others, not before them."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
from fastapi.testclient import TestClient

from latentwire.bridge import opened, reader
from latentwire.service.inference.lanes import LONG_CHARACTERS, Lanes
from tests.integration.service.conftest import HELD_SECONDS, Gate, Start, until

LONG = "_" * (LONG_CHARACTERS + 1)
ASKED = {"prompt": "Who?", "max_tokens": 2}
LONG_REQUESTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "source": ("/encode", {"inputs": ["short", LONG], "truncate": True}, 200),
    "source of an answer": ("/generate", {"inputs": [{"text": LONG}], **ASKED, "truncate": True}, 200),
    "prompt": ("/generate", {"inputs": [{"text": "short"}], **ASKED, "prompt": LONG}, 422),
    "text read directly": ("/generate", {"inputs": [{"text": LONG}], **ASKED, "condition": "direct"}, 422),
}


class Long:
    """Equal to a long text."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and len(other) >= len(LONG)

    __hash__ = None  # type: ignore[assignment]


def answered(client: TestClient) -> bool:
    """Whether a short request of each kind is."""
    asked = [("/encode", {"inputs": ["short"]}), ("/generate", {"inputs": [{"text": "another"}], **ASKED})]
    return all(client.post(path, json=body).status_code == 200 for path, body in asked)


@pytest.mark.parametrize("kind", LONG_REQUESTS)
def test_a_short_request_is_answered_while_a_long_text_is_read(
    start: Start, hold: Callable[..., Gate], kind: str
) -> None:
    client, (path, body, status) = start(), LONG_REQUESTS[kind]
    gate = hold(reader, "check_unicode", Long())
    with ThreadPoolExecutor() as threads:
        asking = threads.submit(client.post, path, json=body)
        assert gate.entered.wait(HELD_SECONDS)
        assert answered(client) and not asking.done()
        gate.opened.set()
        assert asking.result().status_code == status


def test_texts_are_read_while_a_request_waits_for_its_engine(
    start: Start, hold: Callable[..., Gate], client: TestClient
) -> None:
    client = start()
    gate = hold(opened, "soften")
    with ThreadPoolExecutor() as threads:
        asking = threads.submit(client.post, "/generate", json={"inputs": [{"text": "another"}], **ASKED})
        assert gate.entered.wait(HELD_SECONDS)
        assert client.post("/encode", json={"inputs": ["short"]}).status_code == 200 and not asking.done()
        gate.opened.set()
        assert asking.result().status_code == 200


async def test_others_come_between_the_texts_of_one_request_that_are_long_together() -> None:
    lanes, began, go_on, order = Lanes(), Event(), Event(), list[str]()

    def read(text: str) -> str:
        order.append(text[:2])
        if text.startswith("a1"):
            began.set()
            assert go_on.wait(HELD_SECONDS)
        return text[:2]

    many = asyncio.create_task(lanes.each(read, [name + LONG[5000:] for name in ("a1", "a2", "a3")], len))
    await asyncio.to_thread(until, began.is_set)
    one = asyncio.create_task(lanes.each(read, ["b1", "b2"], len))
    await asyncio.sleep(0)
    go_on.set()
    assert await asyncio.gather(many, one) == [["a1", "a2", "a3"], ["b1", "b2"]]
    assert order == ["a1", "b1", "b2", "a2", "a3"]
    lanes.close()
