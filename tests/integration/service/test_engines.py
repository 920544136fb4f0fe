"""Lending engines: one for a model whatever its names, and a loan that lasts until the engine is open."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from latentwire.bridge.errors import InferenceFailed
from latentwire.bridge.generation.base import Engine
from latentwire.bridge.models import BUILTIN, FrozenLM
from latentwire.bridge.residency import Residency
from latentwire.service.inference import engines as module
from latentwire.service.inference.engines import Engines

NAMES = "builtin:llama", str(BUILTIN / "llama")


@pytest.fixture
def engines() -> Iterator[Engines]:
    residency = Residency(None, device=torch.device("cpu"))
    yield Engines(
        residency, max_rows=4, kv_tokens=512, step_tokens=64, load_wait=30.0,
        on_death=lambda: None, on_step=lambda rows, seconds: None,
    )  # fmt: skip


async def borrow(engines: Engines, name: str) -> Engine:
    async with engines.lend(name, lambda lm: None) as engine:
        return engine


async def test_two_names_of_one_model_asked_for_at_once_share_its_engine(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, real = list[str](), module.open_engine

    def counted(lm: FrozenLM, **options: Any) -> Engine:
        opened.append(lm.name)
        return real(lm, **options)

    monkeypatch.setattr(module, "open_engine", counted)
    for name in NAMES:  # in memory, so that both reach the engine at once
        await engines.acquire(name)
    one, other = await asyncio.gather(*(borrow(engines, name) for name in NAMES))
    assert one is other
    for name in NAMES:
        engines.residency.release(name)
    await engines.close()
    assert len(opened) == 1


async def test_a_model_stays_lent_until_its_engine_is_open_also_when_who_asked_has_left(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on, real = threading.Event(), threading.Event(), module.open_engine

    def slow(lm: FrozenLM, **options: Any) -> Engine:
        began.set()
        go_on.wait(30)
        return real(lm, **options)

    def users() -> int:
        state = engines.residency.find(NAMES[0])
        assert state is not None
        return state.users

    monkeypatch.setattr(module, "open_engine", slow)
    asking = asyncio.create_task(borrow(engines, NAMES[0]))
    await asyncio.to_thread(began.wait, 30)
    await asyncio.sleep(2 * module.LINGER_SECONDS)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert users() == 1
    go_on.set()
    while users():
        await asyncio.sleep(0.01)
    assert len(engines.all()) == 1
    await engines.close()


async def test_an_engine_that_cannot_be_opened_leaves_nothing_in_the_books(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(lm: FrozenLM, **options: Any) -> Engine:
        raise InferenceFailed("no")

    monkeypatch.setattr(module, "open_engine", fails)
    with pytest.raises(InferenceFailed):
        await borrow(engines, NAMES[0])
    state = engines.residency.find(NAMES[0])
    assert state is not None and state.attached_bytes == 0
    await engines.close()
