"""Encode, then generate, in a budget for one of the two models: what the process holds at most, measured.

And what a latent owes to its batch-mates: nothing beyond the last bits.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from latentwire.bridge import engine
from latentwire.bridge.checkpoint import BridgeModel, load_bridge, make_bridge
from latentwire.bridge.engine import Encoded
from latentwire.bridge.evaluation.tasks import world_task
from latentwire.bridge.memory import free_caches
from latentwire.bridge.models import FrozenLM, load_model, predicted_bytes
from latentwire.bridge.prompt import compose, place
from latentwire.bridge.reader import SourceTokens, tokenize_source
from latentwire.bridge.residency import Residency
from latentwire.bridge.sampling import SamplingParams
from tests.conftest import bridge_config, byte_tokenizer

CPU = torch.device("cpu")
WIDE = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048, "max_position_embeddings": 256}
TEXTS = ["Mara wants a cup of tea.", "Tom sings.", "The harbour is closed until noon; nobody knows why."]
ROUNDING = 1e-5  # of a latent, whose slots have an RMS of 1


def write_wide(folder: Path, model: Callable[[int], PreTrainedModel]) -> str:
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A sender of 39 MB and a receiver of 52 MB: enough to stand out from what a process holds anyway."""
    root = tmp_path_factory.mktemp("wide")
    return (
        write_wide(
            root / "sender", lambda v: GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=v, num_hidden_layers=3, **WIDE))
        ),
        write_wide(
            root / "receiver", lambda v: LlamaForCausalLM(LlamaConfig(vocab_size=v, num_hidden_layers=3, **WIDE))
        ),
    )


@pytest.fixture(scope="module")
def bridge(wide: tuple[str, str]) -> BridgeModel:
    return make_bridge(bridge_config(load_model(wide[0]), load_model(wide[1])))


def encode(bridge: BridgeModel, sender: FrozenLM, texts: list[str]) -> list[Encoded]:
    return engine.encode(
        bridge, sender, [tokenize_source(sender, text, sender.source_layout, max_tokens=128) for text in texts]
    )


def answer(bridge: BridgeModel, receiver: FrozenLM, encoded: list[Encoded]) -> list[str]:
    layout = bridge.config.heads[receiver.name].layout
    asked = []
    for row in encoded:
        composed = compose(receiver, layout, place(layout, "Who?"), latent=len(row.latent), max_tokens=200)
        asked.append(engine.LatentPrompt(composed, row.latent, SamplingParams(max_tokens=4)))
    return [said.text for said in engine.generate_from_latents(bridge, receiver.name, receiver, asked)[0]]


def ask_in_turns(residency: Residency, bridge: BridgeModel, wide: tuple[str, str]) -> list[str]:
    with residency.use(wide[0]) as sender:
        encoded = encode(bridge, sender, TEXTS)
    del sender
    with residency.use(wide[1]) as receiver:
        return answer(bridge, receiver, encoded)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that was resident during a call, over what was before."""
    free_caches()
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark so far
    run()
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) - before


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's high-water mark")
def test_in_a_budget_for_the_larger_model_the_process_never_holds_both(
    wide: tuple[str, str], bridge: BridgeModel
) -> None:
    sizes = [predicted_bytes(name, torch.float32) for name in wide]
    larger = max(sizes)
    both = Residency(None, device=CPU)
    expected = ask_in_turns(both, bridge, wide)
    with both.use(wide[0]) as sender, both.use(wide[1]) as receiver:
        encoded = encode(bridge, sender, TEXTS)
        activations = max(
            peak_bytes(lambda: encode(bridge, sender, TEXTS)), peak_bytes(lambda: answer(bridge, receiver, encoded))
        )
    del sender, receiver
    for name in wide:
        both.unload(name)

    together = peak_bytes(lambda: ask_in_turns(Residency(None, device=CPU), bridge, wide))
    assert together > 0.9 * sum(sizes)  # the measure sees two models
    tight = Residency(larger, device=CPU)
    peak = peak_bytes(lambda: [ask_in_turns(tight, bridge, wide) for _ in range(3)])
    assert 0.9 * larger < peak <= 1.10 * larger + activations
    assert ask_in_turns(tight, bridge, wide) == expected
    assert [event[0] for event in tight.history[:5]] == ["load", "drop", "load", "drop", "load"]


@pytest.fixture(scope="module")
def builtin() -> tuple[BridgeModel, FrozenLM]:
    manifest, bridge = load_bridge("builtin", device=CPU)
    return bridge, load_model(manifest.bridge.sender.name, device=CPU)


@pytest.fixture(scope="module")
def sources(builtin: tuple[BridgeModel, FrozenLM]) -> list[SourceTokens]:
    texts = [example.source for example in world_task().test[:24]]
    read = [tokenize_source(builtin[1], text, builtin[1].source_layout, max_tokens=512) for text in texts]
    return [*read, *(SourceTokens(source.ids[:n], n) for source, n in zip(read, (1, 2, 5, 8, 13, 21), strict=False))]


def test_a_latent_differs_from_the_one_alone_by_rounding_only_whatever_its_batch_mates(
    builtin: tuple[BridgeModel, FrozenLM], sources: list[SourceTokens]
) -> None:
    bridge, sender = builtin
    alone = [engine.encode(bridge, sender, [source])[0].latent for source in sources]
    for rows in (2, 3, 8, len(sources)):
        batch = engine.encode(bridge, sender, sources[-rows:])
        for expected, row in zip(alone[-rows:], batch, strict=True):
            assert np.abs(row.latent - expected).max() < ROUNDING


def test_the_same_batch_gives_the_same_bits_each_time(
    builtin: tuple[BridgeModel, FrozenLM], sources: list[SourceTokens]
) -> None:
    one, other = (engine.encode(*builtin, sources) for _ in range(2))
    assert all(np.array_equal(a.latent, b.latent) for a, b in zip(one, other, strict=True))
