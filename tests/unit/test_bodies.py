"""Bytes of bodies under way, of several processes that answer HTTP."""

from typing import Any

import pytest
from pydantic import ByteSize

from latentwire.bridge.errors import Overloaded
from latentwire.service.api.bodies import Bodies
from latentwire.service.inference.parts import Sum
from latentwire.service.settings import Settings

MOST, TOGETHER = 1024, 2048


async def test_the_bound_is_common_to_all_processes_that_answer_http() -> None:
    settings, parts = Settings(max_body=ByteSize(MOST), max_bodies=ByteSize(TOGETHER)), memoryview(bytearray(16))
    one, other = (Bodies(settings, Sum(parts.cast("q"), own)) for own in (0, 1))

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": bytes(MOST), "more_body": False}

    def receiving(bodies: Bodies) -> Any:
        return bodies.receiving({"type": "http", "headers": []}, receive)

    with receiving(one) as first, receiving(one) as second, receiving(other) as third:
        await first.receive()
        await second.receive()
        with pytest.raises(Overloaded):
            await third.receive()
    assert not any(parts)
