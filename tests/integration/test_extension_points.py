"""What others may add without touching a file of ours, added here and used from end to end."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentwire.bridge.checkpoint import load_bridge, read_manifest
from latentwire.bridge.config import EncoderConfig
from latentwire.bridge.encoder import KINDS, Encoder, Pooling, slots_of
from latentwire.bridge.errors import CorruptCheckpoint, InvalidRequest
from latentwire.bridge.evaluation.conditions import open_context
from latentwire.bridge.evaluation.report import evaluate
from latentwire.training.config import read_config
from latentwire.training.loop import train
from tests.integration.conftest import MakeConfig
from tests.integration.runs import log_of, quiet


@pytest.fixture
def own_kind() -> Iterator[type[Encoder]]:
    class Last(Encoder):
        """The sender's last token, in as many slots as are asked for."""

        kind = "last"

        def __init__(self, config: EncoderConfig) -> None:
            super().__init__(config)
            self.read = nn.Linear(config.sender_width, config.num_latents * config.hidden_dim)

        def slots(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            last = states[torch.arange(len(states)), mask.sum(dim=1) - 1]
            K = self.config.num_latents
            return self.read(last).reshape(len(last), K, -1), mask.any(dim=1, keepdim=True).expand(-1, K)

    yield Last
    del KINDS["last"]


def test_an_encoder_kind_is_a_class_that_is_trained_saved_loaded_and_measured(
    own_kind: type[Encoder], make: MakeConfig
) -> None:
    config = make(encoder="last", num_latents=3, max_steps=2, alignment_steps=None)
    manifest = train(config, quiet())
    _, bridge = load_bridge(config.out)
    assert type(bridge.encoder) is own_kind and manifest.bridge.encoder.kind == "last"
    assert slots_of(manifest.bridge.encoder, 40) == 3 and [r["phase"] for r in log_of(config.out)] == ["answer"] * 2
    context = open_context(config.out, "world", limit=2, dtype="float16", receiver=None)
    assert [latent.shape for latent in context.latents(range(2))] == [(3, 16)] * 2
    assert evaluate(context, conditions=["bridge"])["conditions"].keys() == {"bridge"}


def test_a_windowed_kind_of_ones_own_is_aligned_with_the_words_it_covers(make: MakeConfig) -> None:
    class Wide(Pooling):
        kind = "wide"

    try:
        config = make(encoder="wide", ratio=8, max_steps=3)
        train(config, quiet())
        assert [record["phase"] for record in log_of(config.out)] == ["align", "align", "answer"]
        assert slots_of(read_manifest(config.out).bridge.encoder, 17) == 3
    finally:
        del KINDS["wide"]


def test_a_kind_that_nobody_defined_is_refused_with_those_there_are(make: MakeConfig, own_kind: type[Encoder]) -> None:
    known = "Input should be 'pooling', 'perceiver', 'mean', 'linear', 'prompt' or 'last'"
    keys: dict[str, Any] = {"sender": "a", "receiver": "b", "task": "world", "out": "c"}
    with pytest.raises(InvalidRequest, match=rf"^encoder: {known}, got 'vq'$"):
        read_config(None, {**keys, "encoder": "vq"})
    config = make(max_steps=1)
    train(config, quiet())
    file = config.out / "config.json"
    document = json.loads(file.read_text())
    document["bridge"]["encoder"]["kind"] = "vq"
    file.write_text(json.dumps(document))
    for load in (read_manifest, load_bridge):
        with pytest.raises(CorruptCheckpoint, match=rf"config\.json: bridge\.encoder\.kind: {known}$"):
            load(config.out)
