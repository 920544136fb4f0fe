"""The engine on a GPU: what holds on a CPU holds there, where streams could come between."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_decode import Encoding, ask, question
from benchmarks.gpu_models import SCALES, TINY, bridge_between, drawn_on, write_configurations
from latentwire.bridge import engine
from latentwire.bridge.devices import in_background
from latentwire.bridge.errors import InsufficientMemory
from latentwire.bridge.generation.continuous import ContinuousEngine, token_bytes
from latentwire.bridge.generation.output import OutputTokens
from latentwire.bridge.generation.select import open_engine
from latentwire.bridge.generation.softids import SoftIds
from latentwire.bridge.generation.steps import MODES, ways
from latentwire.bridge.memory import device_bytes, free_caches
from latentwire.bridge.models import FrozenLM, load_model
from latentwire.bridge.parking import HostCopies
from latentwire.bridge.residency import Residency
from latentwire.bridge.sampling import SamplingParams

pytestmark = pytest.mark.gpu

TOKENS, SOFT = 40, 20  # of an input, and of them soft ones: more than a page
PARAMS = SamplingParams(24)
FAMILIES = ("llama", "qwen", "mistral", "neox", "gpt2")


@contextmanager
def opened(lm: FrozenLM, rows: int = 16, **options: Any) -> Iterator[ContinuousEngine]:
    made = ContinuousEngine(lm, max_rows=rows, **options)
    try:
        yield made
    finally:
        made.close()


def answers(made: ContinuousEngine, numbers: range, params: SamplingParams = PARAMS) -> list[list[int]]:
    """Tokens of the answers to random inputs, each with a seed of its own."""
    asked = [question(made.lm, n, TOKENS, SOFT) for n in numbers]
    return [output.ids for output in ask(made, asked, [replace(params, seed=n) for n in numbers])]


def references(lm: FrozenLM, numbers: range) -> list[list[int]]:
    """The same of left-padded ``generate(inputs_embeds=…)``."""
    asked = [question(lm, n, TOKENS - n, SOFT) for n in numbers]
    outputs = [OutputTokens(lm, PARAMS) for _ in numbers]
    engine.run(lm, [row for row, _ in asked], torch.stack([soft.make() for _, soft in asked]), outputs)
    return [output.ids for output in outputs]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_padded_batches(on_device: Callable[[str], FrozenLM], family: str) -> None:
    lm = on_device(family)
    with opened(lm) as made:
        asked = [question(lm, n, TOKENS - n, SOFT) for n in range(8)]
        assert [output.ids for output in ask(made, asked, [PARAMS] * 8)] == references(lm, range(8))


def test_sampled_answers_are_the_same_alone_and_in_company(llama: FrozenLM) -> None:
    sampled = SamplingParams(24, 1.0, 0.9, 50)
    with opened(llama) as made:
        together = answers(made, range(16), sampled)
    with opened(llama) as made:
        alone = [answers(made, range(n, n + 1), sampled)[0] for n in range(16)]
    assert together == alone and len({tuple(ids) for ids in alone}) > 1


def test_encoding_beside_changes_no_answer_and_no_latent_over_many_rounds(
    llama: FrozenLM, on_device: Callable[[str], FrozenLM], device: torch.device
) -> None:
    sender = on_device("qwen")
    encoding = Encoding(sender, bridge_between(sender, llama, device), 16, 200)
    with opened(llama, 8) as made:
        wanted = [answers(made, range(8 * n, 8 * n + 8)) for n in range(8)]
    for _ in range(5):  # each in an empty cache: what is read from it was not written before the encoding began
        with encoding.on_and_on() as counted, opened(llama, 8) as made:
            for _ in range(2):
                assert [answers(made, range(8 * n, 8 * n + 8)) for n in range(8)] == wanted
        assert counted.count > 0 and counted.largest_difference < 1e-3


def test_soft_tokens_are_in_a_table_on_the_device_and_embedded_as_they_are(llama: FrozenLM) -> None:
    embedding = llama.model.get_input_embeddings()
    drawn = torch.randn(4, llama.width)
    soft_ids = SoftIds(embedding, rows=8)
    try:
        assert soft_ids.hold("latent", lambda: drawn)
        ids = torch.tensor([5, *soft_ids.ids("latent"), 6], device=llama.device)
        found = llama.embed(ids)
    finally:
        soft_ids.close()
    assert found.device.type == "cuda"
    assert torch.equal(found[1:5].cpu(), drawn) and torch.equal(found[[0, 5]], llama.embed(ids[[0, 5]]))


def test_memory_is_given_back_when_an_engine_closes_and_a_model_is_unloaded(
    model_folders: dict[str, Path], device: torch.device
) -> None:
    name = str(model_folders["llama"])
    free_caches()
    before = torch.cuda.memory_allocated(device)
    residency = Residency(None, device, torch.float32)
    with residency.use(name) as lm:
        loaded = torch.cuda.memory_allocated(device)
        with opened(lm, kv_tokens=1 << 16) as made:
            answers(made, range(8))
            running = torch.cuda.memory_allocated(device)
        del made
        free_caches()
        closed = torch.cuda.memory_allocated(device)
    del lm
    residency.unload(name)
    gc.collect()
    assert before < loaded < running
    assert closed - loaded < (running - loaded) // 100
    assert torch.cuda.memory_allocated(device) - before < (loaded - before) // 100 + (closed - loaded)


def test_a_cache_that_cannot_fit_is_refused_by_name_or_made_smaller_and_the_next_engine_answers(
    device: torch.device, tmp_path: Path
) -> None:
    wide = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": 8}
    write_configurations(replace(SCALES["tiny"], receiver={**TINY, **wide}), tmp_path)
    with drawn_on(device):
        lm = load_model(f"random:{tmp_path / 'receiver'}", device=device, dtype=torch.float32)
    tokens = 2 * device_bytes(device) // token_bytes(lm)
    try:
        made = open_engine(lm, kv_tokens=tokens, required="continuous")
    except InsufficientMemory as error:
        assert "memory" in str(error)
    else:
        assert made.capacity_tokens < tokens
        made.close()
    free_caches()
    asked = [question(lm, n, TOKENS - n, SOFT) for n in range(2)]
    with opened(lm, kv_tokens=1024) as small:
        assert [output.ids for output in ask(small, asked, [PARAMS] * 2)] == references(lm, range(2))


def test_a_second_engine_of_the_same_shape_gives_the_same_answers(llama: FrozenLM) -> None:
    with opened(llama) as first:
        said = answers(first, range(8))
    with opened(llama, step_tokens=64) as second:
        assert answers(second, range(8)) == said


@pytest.fixture(scope="module")
def half(device: torch.device, model_folders: dict[str, Path]) -> FrozenLM:
    """A receiver in a dtype that attention over blocks takes."""
    return load_model(str(model_folders["llama"]), device=device, dtype=torch.float16)


def test_the_fastest_mode_is_taken_and_every_mode_gives_the_plain_ones_answers_but_for_rounding(
    half: FrozenLM, caplog: pytest.LogCaptureFixture
) -> None:
    found = ways(MODES[-1], half)
    assert next(iter(found)) == "async" and found["async"].overlapped and found["async"].kernel is not None
    made = open_engine(half, mode="async", required="continuous")
    assert isinstance(made, ContinuousEngine) and made._way == found["async"], caplog.text
    made.close()
    asked, params = [question(half, n, TOKENS - n, SOFT) for n in range(8)], SamplingParams(24, logprobs=0)
    said = {}
    for mode, way in found.items():
        with opened(half, way=way) as made:
            said[mode] = ask(made, asked, [params] * 8)
    for mode, outputs in said.items():
        for one, plain in zip(outputs, said["plain"], strict=True):
            assert abs(one.logprobs[0].logprob - plain.logprobs[0].logprob) < 0.05, mode
            for a, b in zip(one.logprobs, plain.logprobs, strict=False):
                if a.token != b.token:
                    break
                assert abs(a.logprob - b.logprob) < 0.05, mode


def test_the_same_requests_get_the_same_answers_again_in_every_mode(half: FrozenLM) -> None:
    sampled = SamplingParams(24, 1.0, 0.9, 50)
    for way in ways(MODES[-1], half).values():
        with opened(half, way=way) as made:
            first = answers(made, range(8), sampled)
        with opened(half, way=way) as made:
            assert answers(made, range(8), sampled) == first, way


def test_steps_and_encoding_have_streams_of_their_own_and_steps_come_first(
    half: FrozenLM, device: torch.device
) -> None:
    with opened(half, way=ways("async", half)["async"]) as made:
        steps = made._manager.batch_processor.inputs_and_outputs.compute_stream  # type: ignore[union-attr]
        with in_background(device):
            encoding = torch.cuda.current_stream(device)
    every = [torch.cuda.default_stream(device), encoding, steps]
    assert len({stream.cuda_stream for stream in every}) == 3 and steps.priority < encoding.priority


def test_weights_that_leave_are_pinned_on_the_host_and_come_back_as_they_were(
    device: torch.device, model_folders: dict[str, Path]
) -> None:
    lm, copies = load_model(str(model_folders["llama"]), device=device, dtype=torch.float32), HostCopies()
    before, held = [tensor.clone() for tensor in lm.model.parameters()], torch.cuda.memory_allocated(device)
    assert copies.park(lm)
    assert all(tensor.is_pinned() for tensor in lm.model.parameters())
    assert torch.cuda.memory_allocated(device) < held
    back = copies.bring(lm.name, lm.fingerprint, device)
    assert back is not None and back.device.type == "cuda"
    assert all(torch.equal(a, b) for a, b in zip(before, back.model.parameters(), strict=True))
