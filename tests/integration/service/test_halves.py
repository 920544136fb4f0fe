"""Half of the models in a process, as a replica on Ray holds it; no Ray is needed to try it."""

from pathlib import Path
from typing import Any

import pytest

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.errors import IncompatibleBridge
from latentwire.bridge.families import Role
from latentwire.service.inference.models import InMemory
from latentwire.service.inference.runtime import Runtime
from latentwire.service.processes.frames import Answer, Encode, Failure, Manage, encoded, unframed, unpack
from latentwire.service.ray.replicas import Encoder, Replica
from latentwire.service.settings import Settings


@pytest.fixture
def bridge(checkpoint: Path) -> Bridge:
    """To compare with."""
    return Bridge.load(checkpoint)


async def made(kind: type[Replica], checkpoint: Path) -> Any:
    """A replica, as Ray makes one."""
    replica = object.__new__(kind)
    await replica.__init__({"tiny": str(checkpoint)}, {"max_batch": 4})  # type: ignore[misc]
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


async def test_a_replica_with_another_checkpoint_refuses(checkpoint: Path, bridge: Bridge) -> None:
    encoder = await made(Encoder, checkpoint)
    question = encoded(Encode(4, "tiny", [bridge.tokenize("Mara lives in Rome.")]))
    (answer,) = unframed(await encoder.ask(question, bridge.manifest.bridge_id))
    assert isinstance(answer, Answer) and answer.cost
    (refusal,) = unframed(await encoder.ask(question, "another"))
    assert isinstance(refusal, Failure) and isinstance(refusal.error(), IncompatibleBridge)
    assert "it was replaced; deploy again" in refusal.message
    await encoder._runtime.stop()
