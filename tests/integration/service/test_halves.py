"""Half of the models in a process, as a replica on Ray holds it; no Ray is needed to try it."""

import asyncio
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.encoder import slots_of
from latentwire.bridge.errors import IncompatibleBridge
from latentwire.bridge.families import Role
from latentwire.bridge.sampling import SamplingParams
from latentwire.service.inference.models import InMemory
from latentwire.service.inference.request import Asked, GenerationResult
from latentwire.service.inference.runtime import Runtime
from latentwire.service.processes.frames import Answer, Encode, Failure, Generate, Manage, encoded, unframed, unpack
from latentwire.service.ray import replicas
from latentwire.service.ray.replicas import Encoder, EngineDied, Generator, Replica, identity, shifted
from latentwire.service.settings import Settings


@pytest.fixture
def bridge(checkpoint: Path) -> Bridge:
    """To compare with."""
    return Bridge.load(checkpoint)


async def made(kind: type[Replica], checkpoint: Path, **settings: Any) -> Any:
    """A replica, as Ray makes one."""
    replica = object.__new__(kind)
    await replica.__init__({"tiny": str(checkpoint)}, {"max_batch": 4, **settings})  # type: ignore[misc]
    return replica


async def test_half_of_the_models_is_loaded_and_the_other_never(checkpoint: Path, bridge: Bridge) -> None:
    halves: dict[Role, list[str]] = {"sender": [bridge.sender], "receiver": bridge.receivers}
    for role, names in halves.items():
        runtime = Runtime(Settings(), {"tiny": str(checkpoint)}, roles=(role,))
        await runtime.start()
        await runtime.warmed()
        assert runtime.models.ready and list((await runtime.models.in_memory()).bytes) == names
        await runtime.models.load(runtime.find("tiny"))
        assert list((await runtime.models.in_memory()).bytes) == names
        await runtime.stop()


async def test_a_replica_answers_its_question_in_bytes(checkpoint: Path, bridge: Bridge) -> None:
    encoder = await made(Encoder, checkpoint)
    question = encoded(Manage(3, "in_memory"))
    (answer,) = unframed(await encoder.ask(question, ""))
    assert isinstance(answer, Answer) and answer.id == 3
    assert list(unpack(answer.result, InMemory).bytes) == [bridge.sender]
    await encoder._runtime.stop()


async def test_a_replica_counts_what_it_does_and_no_evaluations(checkpoint: Path) -> None:
    encoder = await made(Encoder, checkpoint)
    told = (await encoder._runtime.models.metrics()).decode()
    assert "latentwire_model_loads_total{" in told and "latentwire_evaluation" not in told
    await encoder._runtime.stop()


async def test_a_replica_computes_with_as_many_threads_as_it_is_told(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    encoder = await made(Encoder, checkpoint, threads=7)
    assert used == [7]
    await encoder._runtime.stop()


async def test_a_replica_with_another_checkpoint_refuses(checkpoint: Path, bridge: Bridge) -> None:
    encoder = await made(Encoder, checkpoint)
    question = encoded(Encode(4, "tiny", [bridge.tokenize("Mara lives in Rome.")]))
    (answer,) = unframed(await encoder.ask(question, identity(bridge)))
    assert isinstance(answer, Answer) and answer.cost
    (refusal,) = unframed(await encoder.ask(question, "another"))
    assert isinstance(refusal, Failure) and isinstance(refusal.error(), IncompatibleBridge)
    assert "it was replaced; deploy again" in refusal.message
    await encoder._runtime.stop()


def test_bridges_of_one_id_with_other_heads_are_not_the_same(bridge: Bridge) -> None:
    manifest = bridge.manifest
    heads = {name: replace(head, sha256=head.sha256[::-1]) for name, head in manifest.heads.items()}
    before, bridge.manifest = identity(bridge), replace(manifest, heads=heads)
    assert identity(bridge) != before


def asking(bridge: Bridge) -> bytes:
    """To generate from a latent that says nothing."""
    (receiver, *_) = bridge.receivers
    params = SamplingParams(max_tokens=4)
    encoder = bridge.manifest.bridge.encoder
    latent = np.ones((slots_of(encoder, 1), encoder.latent_dim), np.float32)
    row = bridge.compose(receiver, latent, "Question:", params)
    return encoded(Generate(5, "tiny", receiver, [Asked(row, latent, params)], False))


async def test_times_count_from_the_question_as_nodes_have_clocks_of_their_own(
    checkpoint: Path, bridge: Bridge
) -> None:
    generator = await made(Generator, checkpoint)
    began = time.monotonic()
    (answer,) = unframed(await generator.ask(asking(bridge), identity(bridge)))
    seconds = time.monotonic() - began
    assert isinstance(answer, Answer)
    result = unpack(answer.result, GenerationResult)
    assert result.generations[0].entropy_nats  # which is compared with nothing where answers are
    (times,) = result.times
    assert times is not None and 0 <= times.submitted <= times.begun <= times.first <= times.last <= seconds
    assert shifted(result, began).times == [tuple(at + began for at in times)]
    await generator._runtime.stop()


async def test_a_replica_whose_engine_dies_says_so_to_all_who_wait_and_ends(
    checkpoint: Path, bridge: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = asyncio.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    monkeypatch.setattr(replicas, "TELLING_SECONDS", 0.0)
    generator = await made(Generator, checkpoint)
    (engine,) = generator._runtime.models.engines.all()

    def crash(**_: Any) -> Any:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(engine.lm.model, "forward", crash)
    asked = [generator.ask(asking(bridge), identity(bridge)) for _ in range(2)]
    assert [type(said) for said in await asyncio.gather(*asked, return_exceptions=True)] == [EngineDied] * 2
    async with asyncio.timeout(20):
        await ended.wait()
    with pytest.raises(EngineDied):
        await generator.ask(asking(bridge), identity(bridge))
    with pytest.raises(EngineDied):
        generator.check_health()
    await generator._runtime.stop()
