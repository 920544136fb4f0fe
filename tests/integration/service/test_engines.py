"""Lending engines: one for a model whatever its names, and a loan that lasts until the engine is open."""

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from latentwire.bridge.errors import InferenceFailed, InsufficientMemory
from latentwire.bridge.generation.base import Engine
from latentwire.bridge.generation.continuous import ContinuousEngine, token_bytes
from latentwire.bridge.memory import weights_bytes
from latentwire.bridge.models import BUILTIN, FrozenLM, load_model, pass_bytes
from latentwire.bridge.residency import Residency
from latentwire.service import settings
from latentwire.service.inference import engines as module
from latentwire.service.inference.engines import Engines
from latentwire.service.inference.runtime import Runtime
from latentwire.service.settings import Settings

NAMES = "builtin:llama", str(BUILTIN / "llama")


CPU = torch.device("cpu")


def opening(budget: int | None = None, **options: Any) -> Engines:
    return Engines(
        Residency(budget, device=CPU),
        on_death=lambda: None,
        on_step=lambda rows, tokens, seconds: None,
        **{"max_rows": 4, "kv_tokens": 512, "step_tokens": 64, "load_wait": 30.0, **options},
    )


@pytest.fixture
def engines() -> Engines:
    return opening()


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


@pytest.fixture(scope="module")
def sizes() -> tuple[int, int]:
    """Bytes of the weights, and of one token of a cache."""
    lm = load_model(NAMES[0], device=CPU)
    return weights_bytes(lm.model), token_bytes(lm)


@pytest.mark.parametrize(
    ("wanted", "cache_tokens", "room_tokens", "made"),
    [
        (None, 0, None, 8192),
        (None, 0, 600, 600),
        (None, 9000, 20_000, 9000),
        (None, 9000, 8500, 8500),
        (None, 100, None, 8192),
        (700, 9000, None, 700),
        (700, 0, 600, 600),
    ],
)
async def test_a_cache_holds_what_is_asked_for_or_the_usual_or_its_part_of_the_rest_but_no_more_than_there_is_room_for(
    sizes: tuple[int, int],
    caplog: pytest.LogCaptureFixture,
    wanted: int | None,
    cache_tokens: int,
    room_tokens: int | None,
    made: int,
) -> None:
    weights, each = sizes
    budget = None if room_tokens is None else weights + room_tokens * each
    engines = opening(budget, kv_tokens=wanted, cache_bytes=cache_tokens * each)
    with caplog.at_level("WARNING"):
        engine = await borrow(engines, NAMES[0])
    assert isinstance(engine, ContinuousEngine) and engine._kv_tokens == made
    state = engines.residency.find(NAMES[0])
    assert state is not None and state.attached_bytes == made * each
    await engines.close()
    said = "room for a cache of 600 tokens, not of LW_KV_TOKENS=700"
    assert (said in caplog.text) == (wanted is not None and made < wanted)


async def test_a_cache_that_would_be_too_small_for_any_use_is_refused(sizes: tuple[int, int]) -> None:
    weights, each = sizes
    engines = opening(weights + 255 * each, kv_tokens=None)
    with pytest.raises(InsufficientMemory, match=f"has {255 * each} bytes left for its key/value cache; 256 tokens"):
        await borrow(engines, NAMES[0])
    await engines.close()


def test_receivers_share_what_all_models_leave_of_an_accelerators_budget(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridges = {"tiny": str(checkpoint), "again": str(checkpoint), "other": "builtin"}
    monkeypatch.setattr(settings, "ON_CPU", replace(settings.ON_ACCELERATOR, memory_budget="900MB"))
    runtime = Runtime(Settings(device="cpu"), bridges)
    models = {name for bridge in runtime.bridges.values() for name in bridge.model_names}
    receivers = {name for bridge in runtime.bridges.values() for name in bridge.receivers}
    largest = max(pass_bytes(name, 32_768, torch.float32) for name in models)
    left = 900_000_000 - largest - sum(runtime.residency.predict(name) for name in models)
    assert len(receivers) > 1 and left > 0 and runtime.models.engines._cache_bytes == int(0.8 * left) // len(receivers)
    monkeypatch.setattr(settings, "ON_CPU", replace(settings.ON_ACCELERATOR, memory_budget="6MB"))
    assert Runtime(Settings(device="cpu"), bridges).models.engines._cache_bytes == 0  # they take turns


def test_on_a_cpu_a_cache_is_as_large_as_ever(checkpoint: Path) -> None:
    runtime = Runtime(Settings(device="cpu", memory_budget="100MB"), {"tiny": str(checkpoint)})
    assert runtime.models.engines._cache_bytes == 0
