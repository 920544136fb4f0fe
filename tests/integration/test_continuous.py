"""The generation engines: requests come and go at every step, and each gets what it would get alone."""

import json
import random
import resource
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.generation.continuous_batching.cache import PagedAttentionMemoryHandler
from transformers.generation.continuous_batching.requests import logger

from latentwire.bridge import detokenise
from latentwire.bridge.detokenise import decode
from latentwire.bridge.engine import generate
from latentwire.bridge.errors import (
    InferenceFailed,
    InsufficientMemory,
    InvalidRequest,
    LatentWireError,
    ModelUnavailable,
    NotReady,
    Overloaded,
)
from latentwire.bridge.generation import continuous, room, softids
from latentwire.bridge.generation import output as answer
from latentwire.bridge.generation.base import Engine, Running, Soft
from latentwire.bridge.generation.continuous import PAGE_TOKENS, ContinuousEngine
from latentwire.bridge.generation.output import Generation, OutputText
from latentwire.bridge.generation.padded import PaddedEngine
from latentwire.bridge.generation.select import open_engine
from latentwire.bridge.generation.steps import ways
from latentwire.bridge.models import FrozenLM, load_model
from latentwire.bridge.prompt import IGNORE, TEXT, Row
from latentwire.bridge.sampling import Draws, SamplingParams
from tests.integration.test_engine import rows_of, soft_of, stop_within

PATIENCE = 60.0
MIXED = [
    SamplingParams(12),
    SamplingParams(20, 1.0, seed=3, logprobs=2),
    SamplingParams(7, stop=("e",)),
    SamplingParams(16, 0.7, 0.9, 20, seed=5),
]


class Asked:
    """A request in an engine, and what came of it."""

    def __init__(self, made: Engine, row: Row, params: SamplingParams, soft: Soft | None) -> None:
        self.ended, self.pieces, self.ends = threading.Event(), list[str](), 0
        self.running: Running = made.submit(row, params, soft, self._end, self._hear)

    def _hear(self, piece: str, _: object) -> None:
        self.pieces.append(piece)

    def _end(self, result: Generation | LatentWireError) -> None:
        self.result, self.ends = result, self.ends + 1
        self.ended.set()

    def answer(self) -> Generation:
        assert self.ended.wait(PATIENCE), "nobody was told how the request ended"
        if isinstance(self.result, LatentWireError):
            raise self.result
        return self.result


@pytest.fixture
def opened() -> Iterator[Callable[..., Any]]:
    """Opens engines, and closes them."""
    made: list[Engine] = []

    def open_(kind: type[Engine], lm: FrozenLM, **options: Any) -> Engine:
        if kind is ContinuousEngine and "way" not in options:
            options["way"] = next(iter(ways("paged", lm).values()))  # as it is served here
        made.append(kind(lm, **options))
        return made[-1]

    yield open_
    for one in made:
        one.close()


def soft(lm: FrozenLM, number: int, count: int | None = None) -> Soft:
    """The soft tokens of one of the four rows."""
    return Soft(("row", number), lambda: soft_of(lm)[number][:count])


def ask(made: Engine, numbers: Sequence[int], params: Sequence[SamplingParams]) -> list[Asked]:
    rows = rows_of(made.lm)
    return [Asked(made, rows[n], p, soft(made.lm, n)) for n, p in zip(numbers, params, strict=True)]


def told(generation: Generation) -> tuple[str, str, int]:
    return generation.text, generation.finish_reason, generation.token_count


def alone(lm: FrozenLM, number: int, params: SamplingParams) -> Generation:
    """The reference: one row through the library's own ``generate(inputs_embeds=…)``."""
    return generate(lm, [rows_of(lm)[number]], soft_of(lm)[number : number + 1], [params])[0][0]


@pytest.mark.parametrize("kind", [ContinuousEngine, PaddedEngine])
def test_every_request_gets_the_references_answer_whoever_runs_beside_it(
    lm: FrozenLM, opened: Callable[..., Engine], kind: type[Engine]
) -> None:
    made = opened(kind, lm, max_rows=3)
    order = [(i, replace(p, seed=p.seed + i)) for p in MIXED for i in range(4)]
    random.Random(0).shuffle(order)
    asked = ask(made, [i for i, _ in order], [p for _, p in order])
    for (i, p), one in zip(order, asked, strict=True):
        said, wanted = one.answer(), alone(lm, i, p)
        assert told(said) == told(wanted)
        assert "".join(one.pieces) == said.text and one.ends == 1
        assert said.entropy_nats == pytest.approx(wanted.entropy_nats, abs=1e-4)
        if wanted.logprobs is not None and said.logprobs is not None:
            assert [t.token for t in said.logprobs] == [t.token for t in wanted.logprobs]
            assert [t.logprob for t in said.logprobs] == pytest.approx([t.logprob for t in wanted.logprobs], abs=1e-4)
    assert made.running == 0


def test_greedy_output_is_the_references_token_for_token(lm: FrozenLM, opened: Callable[..., Engine]) -> None:
    made = opened(ContinuousEngine, lm)
    params = SamplingParams(24)
    for i, one in enumerate(ask(made, range(4), [params] * 4)):
        one.answer()
        reference = alone(lm, i, params)
        assert told(one.answer()) == told(reference)
        assert one.running.text.text == reference.text and len(one.running.tokens.ids) >= reference.token_count - 1


def test_a_request_joins_while_others_run_and_leaves_before_them(
    lms: dict[str, FrozenLM], opened: Callable[..., Engine]
) -> None:
    made = opened(ContinuousEngine, lms["llama"])
    (long,) = ask(made, [0], [SamplingParams(200, 1.0, seed=1, stop_ids=())])
    while not long.pieces:
        pass
    (short,) = ask(made, [1], [SamplingParams(2)])
    short.answer()
    assert not long.ended.is_set()
    made.cancel(long.running)


def test_a_stop_id_ends_an_answer_and_is_no_part_of_it(lms: dict[str, FrozenLM], opened: Callable[..., Engine]) -> None:
    lm = lms["llama"]
    made = opened(ContinuousEngine, lm)
    (free,) = ask(made, [0], [SamplingParams(12)])
    said = free.answer()
    ids = free.running.tokens.ids
    at = next(i for i in range(3, len(ids)) if ids[i] not in ids[:i])
    params = SamplingParams(12, stop_ids=(ids[at],))
    (cut,) = ask(opened(PaddedEngine, lm), [0], [params])
    (also,) = ask(made, [0], [params])
    assert told(cut.answer()) == told(also.answer()) == told(alone(lm, 0, params))
    assert cut.running.tokens.ids == also.running.tokens.ids == ids[:at] and said.text.startswith(cut.answer().text)
    assert (cut.answer().finish_reason, cut.answer().token_count) == ("stop", at + 1)


def test_a_long_prompt_is_read_over_several_steps(lms: dict[str, FrozenLM], opened: Callable[..., Engine]) -> None:
    lm = lms["gpt2"]
    made = opened(ContinuousEngine, lm, step_tokens=8, max_rows=2)
    row = Row([65 + i % 20 for i in range(100)], [TEXT] * 100, [IGNORE] * 100)
    wanted = generate(lm, [row], None, [SamplingParams(8)])[0][0]
    assert told(Asked(made, row, SamplingParams(8), None).answer()) == told(wanted)


def shared_prefix(lm: FrozenLM, seed: int = 0) -> tuple[Row, Tensor]:
    """A row whose soft tokens fill two pages of the cache."""
    K = 2 * PAGE_TOKENS
    drawn = torch.randn(K, lm.width, generator=torch.Generator().manual_seed(seed)) * lm.embedding_rms()
    return Row([0] * K + [70, 71, 72], [*range(K), *[TEXT] * 3], [IGNORE] * (K + 3)), drawn


def prefilled(made: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each step from now on."""
    seen: list[int] = []
    forward = made.lm.model.forward

    def watching(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["input_ids"].numel())
        return forward(*args, **kwargs)

    monkeypatch.setattr(made.lm.model, "forward", watching)
    return seen


def test_a_latent_asked_again_shares_its_blocks(
    lms: dict[str, FrozenLM], opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = lms["llama"]
    made = opened(ContinuousEngine, lm)
    row, drawn = shared_prefix(lm)
    steps = prefilled(made, monkeypatch)
    first = Asked(made, row, SamplingParams(4), Soft("latent", lambda: drawn)).answer()
    assert max(steps) == len(row)
    steps.clear()
    again = Asked(made, row, SamplingParams(4), Soft("latent", lambda: drawn)).answer()
    assert max(steps) == len(row) - 2 * PAGE_TOKENS and again == first


def test_a_request_never_reads_the_blocks_of_another_latent(
    lms: dict[str, FrozenLM], opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same prompt, the same number of soft tokens, hundreds of latents that come and go: ids are never re-used."""
    lm = lms["llama"]
    monkeypatch.setattr(continuous, "SOFT_ROWS", 40 / 1024)  # the table forgets at once; the cache does not
    made = opened(ContinuousEngine, lm, kv_tokens=1024)
    for seed in range(40):
        row, drawn = shared_prefix(lm, seed)
        said = Asked(made, row, SamplingParams(6), Soft(("latent", seed), lambda drawn=drawn: drawn)).answer()
        assert told(said) == told(generate(lm, [row], drawn[None], [SamplingParams(6)])[0][0])
    assert made.soft_ids.tokens <= 40


def test_a_request_never_reads_the_blocks_of_a_cancelled_one(
    lms: dict[str, FrozenLM], opened: Callable[..., Engine]
) -> None:
    lm = lms["llama"]
    made = opened(ContinuousEngine, lm, kv_tokens=256, max_rows=4)
    for seed in range(20):
        row, drawn = shared_prefix(lm, 100 + seed)
        given_up = Asked(made, row, SamplingParams(100), Soft(("gone", seed), lambda drawn=drawn: drawn))
        if seed % 2:
            while not given_up.pieces and not given_up.ended.is_set():
                pass
        made.cancel(given_up.running)
        row, drawn = shared_prefix(lm, seed)
        said = Asked(made, row, SamplingParams(6), Soft(("latent", seed), lambda drawn=drawn: drawn)).answer()
        assert told(said) == told(generate(lm, [row], drawn[None], [SamplingParams(6)])[0][0])
        assert not given_up.ended.is_set()
    assert made.blocks_in_use == 0


def test_a_cancelled_request_frees_its_blocks_and_calls_nobody(
    lms: dict[str, FrozenLM], opened: Callable[..., Engine]
) -> None:
    made = opened(ContinuousEngine, lms["llama"])
    (long,) = ask(made, [0], [SamplingParams(240, 1.0, seed=1)])
    while not long.pieces:
        pass
    assert made.blocks_in_use > 0
    made.cancel(long.running)
    ask(made, [1], [SamplingParams(2)])[0].answer()  # a step later
    assert made.blocks_in_use == 0 and long.ends == 0 and made.running == 0


def test_the_use_of_the_cache_is_what_running_requests_take_and_shared_blocks_count_once(
    lms: dict[str, FrozenLM], opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = lms["llama"]
    made = opened(ContinuousEngine, lm, kv_tokens=1024)
    assert (made.kv_tokens, made.kv_tokens_used) == (1024, 0)
    row, drawn = shared_prefix(lm)
    same = Soft("latent", lambda: drawn)
    Asked(made, row, SamplingParams(4), same).answer()
    real, both, go_on = lm.model.forward, threading.Event(), threading.Event()

    def held(*args: Any, **kwargs: Any) -> Any:
        if made.running == 2 and made.blocks_in_use == 6:
            both.set()
            go_on.wait(PATIENCE)
        return real(*args, **kwargs)

    monkeypatch.setattr(lm.model, "forward", held)
    asked = [Asked(made, row, SamplingParams(12, 1.0, seed=seed), same) for seed in range(2)]
    assert both.wait(PATIENCE)
    used = made.kv_tokens_used
    go_on.set()
    for one in asked:
        one.answer()
    assert used == 4 * PAGE_TOKENS  # two pages of soft tokens for both, and for each one of its own
    Asked(made, row, SamplingParams(2), same).answer()  # a step later
    assert made.kv_tokens_used == 0


def test_more_requests_than_the_cache_holds_all_get_their_answer(
    lms: dict[str, FrozenLM], opened: Callable[..., Any]
) -> None:
    lm = lms["neox"]
    made = opened(ContinuousEngine, lm, kv_tokens=256, max_rows=16)
    params = [SamplingParams(60, 1.0, seed=i) for i in range(16)]
    asked = ask(made, [i % 4 for i in range(16)], params)
    for i, one in enumerate(asked):
        said, wanted = one.answer(), alone(lm, i % 4, params[i])
        assert told(said) == told(wanted)
        assert said.entropy_nats == pytest.approx(wanted.entropy_nats, abs=1e-4)
    before, manager = made.preemptions, made._manager
    made._trouble.set()  # it begins again
    while made._manager is manager:
        assert made.failure is None
        time.sleep(0.01)
    assert made.preemptions == before > 0


@pytest.mark.parametrize("kind", [ContinuousEngine, PaddedEngine])
def test_a_request_that_could_never_fit_is_refused_at_once(
    lms: dict[str, FrozenLM], opened: Callable[..., Engine], kind: type[Engine]
) -> None:
    made = opened(kind, lms["llama"])
    with pytest.raises(InvalidRequest, match=r"the answer up to 256; this receiver has room for 256"):
        ask(made, [0], [SamplingParams(256)])
    assert made.running == 0


def test_soft_tokens_without_room_wait_while_their_caller_does_and_never_on_the_thread_that_makes_room(
    lms: dict[str, FrozenLM], opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = lms["llama"]
    monkeypatch.setattr(continuous, "SOFT_ROWS", 40 / 8192)  # one latent fills the table
    made = opened(ContinuousEngine, lm)
    row, drawn = shared_prefix(lm)
    assert made.soft_ids.hold("another", lambda: drawn)
    with pytest.raises(Overloaded, match="room for 40 soft tokens"):
        Asked(made, row, SamplingParams(2), Soft("left", lambda: drawn, wanted=lambda: False))
    refused: Future[BaseException] = Future()

    def ask_again() -> None:
        try:
            Asked(made, row, SamplingParams(2), Soft("again", lambda: drawn))
        except Overloaded as error:
            refused.set_result(error)

    made._callbacks.submit(ask_again)
    assert "room for 40 soft tokens" in str(refused.result(PATIENCE))
    assert made.running == 0
    threading.Timer(0.2, made.soft_ids.release, ["another"]).start()
    said = Asked(made, row, SamplingParams(6), Soft("waits", lambda: drawn)).answer()
    assert told(said) == told(generate(lm, [row], drawn[None], [SamplingParams(6)])[0][0])


def test_used_up_ids_begin_again_with_an_empty_cache(
    lms: dict[str, FrozenLM],
    opened: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    lm = lms["llama"]
    monkeypatch.setattr(continuous, "SOFT_ROWS", 100 / 8192)
    monkeypatch.setattr(softids, "IDS", 100)  # one for each row
    made = opened(ContinuousEngine, lm)
    (running,) = ask(made, [0], [SamplingParams(120, 1.0, seed=9)])
    for seed in range(8):
        row, drawn = shared_prefix(lm, seed)
        said = Asked(made, row, SamplingParams(6), Soft(("latent", seed), lambda drawn=drawn: drawn)).answer()
        assert told(said) == told(generate(lm, [row], drawn[None], [SamplingParams(6)])[0][0])
    assert told(running.answer()) == told(alone(lm, 0, SamplingParams(120, 1.0, seed=9)))
    assert "soft ids are used up" in caplog.text


def fails(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception, times: int, after: int = 2) -> None:
    """Let a method raise a few times, after working a few times."""
    real, calls = getattr(owner, name), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if after < calls <= after + times:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def holds_out(made: Engine, lm: FrozenLM) -> None:
    """Four different requests get their own answers, in whole and in pieces."""
    params = [replace(p, seed=i) for i, p in enumerate(MIXED)]
    wanted = [alone(lm, i, p) for i, p in enumerate(params)]
    asked = ask(made, range(4), params)
    assert [told(one.answer()) for one in asked] == [told(one) for one in wanted]
    for one, same in zip(asked, wanted, strict=True):
        assert one.answer().entropy_nats == pytest.approx(same.entropy_nats, abs=1e-4)
    assert ["".join(one.pieces) for one in asked] == [one.text for one in wanted]
    assert made.failure is None


def test_out_of_memory_halves_the_steps_and_every_request_goes_on_where_it_was(
    lms: dict[str, FrozenLM], model_folders: dict[str, Path], opened: Callable[..., Engine]
) -> None:
    lm = load_model(str(model_folders["llama"]))
    made = opened(ContinuousEngine, lm, max_rows=4)
    with pytest.MonkeyPatch.context() as patch:
        fails(patch, lm.model, "forward", OUT, times=2, after=3)
        holds_out(made, lms["llama"])
    assert made.out_of_memory == 2 and made.max_rows == 1


def test_while_an_engine_begins_again_requests_are_taken_and_cancelled_without_waiting_for_it(
    lms: dict[str, FrozenLM], model_folders: dict[str, Path], opened: Callable[..., Any]
) -> None:
    lm = load_model(str(model_folders["llama"]))
    made = opened(ContinuousEngine, lm, max_rows=4)
    begins, may = threading.Event(), threading.Event()
    begin_again = lm.model.init_continuous_batching

    def held_up(**named: Any) -> Any:
        begins.set()
        assert may.wait(PATIENCE)
        return begin_again(**named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm.model, "init_continuous_batching", held_up)
        fails(patch, lm.model, "forward", OUT, times=1, after=2)
        before, dropped = ask(made, range(2), [SamplingParams(6)] * 2)
        assert begins.wait(PATIENCE)
        late: list[Asked] = []
        asking = threading.Thread(target=lambda: late.extend(ask(made, [2], [SamplingParams(6)])), daemon=True)
        asking.start()
        asking.join(PATIENCE)
        made.cancel(dropped.running)
        assert late and not may.is_set()
        may.set()
        said = [one.answer() for one in (before, *late)]
    assert [told(one) for one in said] == [told(alone(lms["llama"], i, SamplingParams(6))) for i in (0, 2)]
    assert made.running == 0


@contextmanager
def memory_of(more_bytes: int) -> Iterator[None]:
    """This process may take so much more memory, and what would take it beyond fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + more_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on memory")
def test_a_cache_that_memory_is_too_small_for_gives_way_and_the_rows_do_not(
    lms: dict[str, FrozenLM], opened: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    lm, asked = lms["llama"], 1 << 20
    with memory_of(200 << 20):
        made = opened(ContinuousEngine, lm, max_rows=4, kv_tokens=asked)
    holds_out(made, lm)
    held = made._manager.batch_processor.cache.num_blocks * PAGE_TOKENS
    assert 10_000 < held < asked and made.soft_ids._table.shape[0] == int(made._kv_tokens * continuous.SOFT_ROWS)
    assert made.max_rows == 4 and made.out_of_memory == 0
    assert f"a key/value cache of {made._kv_tokens} tokens, not of {asked} (" in caplog.text


def test_a_cache_that_memory_would_never_hold_is_refused_by_the_library_and_gives_way_too(
    lms: dict[str, FrozenLM], opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = lms["llama"]
    monkeypatch.setattr(PagedAttentionMemoryHandler, "get_available_memory", lambda self: lm.kv_bytes(4096))
    made = opened(ContinuousEngine, lm, max_rows=4, kv_tokens=1 << 20, step_tokens=32)
    assert made.max_rows == 4 and 256 <= made._kv_tokens < 4096
    holds_out(made, lm)


def test_a_model_keeps_its_attention_where_no_cache_could_be_made(
    lms: dict[str, FrozenLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = lms["llama"]
    found = lm.model.config._attn_implementation
    lm.model.set_attn_implementation("eager")
    try:
        monkeypatch.setattr(PagedAttentionMemoryHandler, "get_available_memory", lambda self: 0)
        with pytest.raises(MemoryError):
            ContinuousEngine(lm)
        assert lm.model.config._attn_implementation == "eager"
        assert alone(lm, 0, SamplingParams(4)).token_count == 4
    finally:
        lm.model.set_attn_implementation(found)


def test_a_request_for_which_the_cache_has_become_too_small_is_told_so(
    lms: dict[str, FrozenLM], opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = lms["llama"]
    made = opened(ContinuousEngine, lm, max_rows=4, kv_tokens=512)
    real = PagedAttentionMemoryHandler._check_footprint

    def small(self: Any, step_tokens: int, sectors: int) -> Any:
        if sectors * self.tokens_per_sector > 100:
            raise MemoryError("another process took it")
        return real(self, step_tokens, sectors)

    monkeypatch.setattr(room, "SMALLEST_KV_TOKENS", 64)
    monkeypatch.setattr(PagedAttentionMemoryHandler, "_check_footprint", small)
    fails(monkeypatch, lm.model, "forward", OUT, times=1, after=1)
    long, short = ask(made, [0, 1], [SamplingParams(200), SamplingParams(4)])
    with pytest.raises(InsufficientMemory, match="the key/value cache has become too small for it"):
        long.answer()
    assert told(short.answer()) == told(alone(lm, 1, SamplingParams(4)))


def test_out_of_memory_splits_a_padded_batch(
    lms: dict[str, FrozenLM], model_folders: dict[str, Path], opened: Callable[..., Engine]
) -> None:
    lm = load_model(str(model_folders["llama"]))
    made = opened(PaddedEngine, lm, max_rows=8)
    real, refused = lm.model.forward, []

    def small(*args: Any, **kwargs: Any) -> Any:
        """A device that holds one row, once all four are there."""
        rows = len(kwargs["attention_mask"])
        if rows > 1:
            refused.append(rows)
            raise OUT
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm.model, "forward", small)
        holds_out(made, lms["llama"])
    assert made.out_of_memory == len(refused) > 0


def test_out_of_memory_the_old_cache_is_gone_before_the_new_one_is_made(
    lms: dict[str, FrozenLM], opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = lms["llama"]
    made = opened(ContinuousEngine, lm, max_rows=4)
    real, begin_again, left = lm.model.forward, lm.model.init_continuous_batching, list[int]()
    old: list[weakref.ref[Tensor]] = []

    def too_large(*args: Any, **kwargs: Any) -> Any:
        if not old:
            old.append(weakref.ref(kwargs["cache"].cache_tensor))
            raise torch.OutOfMemoryError("out of memory")  # one that no test holds
        return real(*args, **kwargs)

    def new_manager(**named: Any) -> Any:
        left.append(sum(cache() is not None for cache in old))
        return begin_again(**named)

    monkeypatch.setattr(lm.model, "forward", too_large)
    monkeypatch.setattr(lm.model, "init_continuous_batching", new_manager)
    monkeypatch.setattr(logger, "disabled", True)  # pytest would keep the record, and with it the error's frames
    (one,) = ask(made, [0], [SamplingParams(4)])
    assert told(one.answer()) == told(alone(lm, 0, SamplingParams(4)))
    assert old and left == [0]


def test_out_of_memory_what_a_padded_batch_held_is_gone_before_a_part_of_it_is_tried(
    lms: dict[str, FrozenLM], opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = lms["llama"]
    made = opened(PaddedEngine, lm)
    real, left = lm.model.forward, list[int]()
    old: list[weakref.ref[Tensor]] = []
    entered, ready = threading.Event(), threading.Event()

    def too_large(*args: Any, **kwargs: Any) -> Any:
        if not entered.is_set():  # the request before, until both are there
            entered.set()
            assert ready.wait(PATIENCE)
            return real(*args, **kwargs)
        if not old:
            activation = torch.zeros(8)
            old.append(weakref.ref(activation))
            raise torch.OutOfMemoryError("out of memory")
        left.append(sum(held() is not None for held in old))
        return real(*args, **kwargs)

    monkeypatch.setattr(lm.model, "forward", too_large)
    ask(made, [2], [SamplingParams(1)])
    assert entered.wait(PATIENCE)
    asked = ask(made, [0, 1], [SamplingParams(4)] * 2)
    ready.set()
    for number, one in enumerate(asked):
        assert told(one.answer()) == told(alone(lm, number, SamplingParams(4)))
    assert old and left and not any(left)


@pytest.mark.parametrize("kind", [ContinuousEngine, PaddedEngine])
def test_a_single_request_that_cannot_fit_is_refused_and_the_engine_lives(
    lms: dict[str, FrozenLM], opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, kind: type[Engine]
) -> None:
    lm = lms["llama"]
    options = {"step_tokens": 32} if kind is ContinuousEngine else {}
    made = opened(kind, lm, max_rows=1, **options)
    fails(monkeypatch, lm.model, "forward", OUT, times=1, after=0)
    (one,) = ask(made, [0], [SamplingParams(4)])
    with pytest.raises(InsufficientMemory):
        one.answer()
    (two,) = ask(made, [1], [SamplingParams(4)])
    assert told(two.answer()) == told(alone(lm, 1, SamplingParams(4)))


STAGES = {
    "forward": lambda made: (made.lm.model, "forward"),
    "choosing": lambda made: (Draws, "draw"),
    "scheduling": lambda made: (made._manager.batch_processor.scheduler, "schedule_batch"),
    "preparing": lambda made: (made._manager.batch_processor.inputs_and_outputs, "prepare_batch_tensors"),
    "reading": lambda made: (made._manager.batch_processor.inputs_and_outputs, "prepare_batch_update"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_an_error_at_any_stage_fails_all_requests_and_says_so(
    lms: dict[str, FrozenLM], opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    died = threading.Event()
    made = opened(ContinuousEngine, lms["llama"], on_death=died.set)
    ask(made, [0], [SamplingParams(2)])[0].answer()
    owner, name = STAGES[stage](made)
    fails(monkeypatch, owner, name, ValueError("a broken part"), times=10_000, after=0)
    asked: list[Asked] = []
    for number in range(4):
        with suppress(InferenceFailed):  # it may be dead before the fourth
            asked += ask(made, [number], [SamplingParams(50, 1.0, seed=2)])
    assert asked
    for one in asked:
        with pytest.raises(InferenceFailed, match="ValueError"):
            one.answer()
        assert one.ends == 1
    assert died.wait(PATIENCE) and made.running == 0 and made.blocks_in_use == 0
    with pytest.raises(InferenceFailed, match="ValueError"):
        ask(made, [0], [SamplingParams(2)])


@pytest.mark.parametrize("kind", [ContinuousEngine, PaddedEngine])
def test_an_error_while_one_answer_is_read_fails_that_one_alone(
    lms: dict[str, FrozenLM], opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, kind: type[Engine]
) -> None:
    lm = lms["llama"]
    made = opened(kind, lm)
    held = threading.Event()
    read_when(held, monkeypatch)
    bad, good = ask(made, [0, 1], [SamplingParams(30), SamplingParams(30)])
    monkeypatch.setattr(bad.running, "on_text", lambda *_: 1 / 0)
    held.set()
    with pytest.raises(InferenceFailed, match="ZeroDivisionError"):
        bad.answer()
    assert told(good.answer()) == told(alone(lm, 1, SamplingParams(30))) and made.failure is None


@pytest.mark.parametrize("kind", [ContinuousEngine, PaddedEngine])
def test_the_thread_that_steps_makes_no_text(
    lms: dict[str, FrozenLM], opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, kind: type[Engine]
) -> None:
    """Whatever is asked for: streams, stop strings, log-probabilities; the library's own decoding included."""
    made = opened(kind, lms["llama"])
    stepping, decoding = set[str](), set[str]()

    def noting(owner: Any, name: str, seen: set[str]) -> None:
        real = getattr(owner, name)

        def wrapped(*given: Any, **named: Any) -> Any:
            seen.add(threading.current_thread().name)
            return real(*given, **named)

        monkeypatch.setattr(owner, name, wrapped)

    noting(made.lm.model, "forward", stepping)
    noting(detokenise, "decode", decoding)
    noting(answer, "decode", decoding)
    noting(PreTrainedTokenizerFast, "_decode", decoding)
    for one in ask(made, range(4), MIXED):
        one.answer()
    assert decoding == {"callbacks"} and stepping and "callbacks" not in stepping


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def read_when(event: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold the thread that makes text."""
    read = OutputText.read

    def late(text: OutputText) -> str:
        assert event.wait(PATIENCE)
        return read(text)

    monkeypatch.setattr(OutputText, "read", late)


@pytest.mark.parametrize("kind", [ContinuousEngine, PaddedEngine])
def test_tokens_made_before_anybody_read_are_cut_behind_the_stop_string(
    lms: dict[str, FrozenLM], opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, kind: type[Engine]
) -> None:
    lm, made, held = lms["llama"], opened(kind, lms["llama"]), threading.Event()
    params = SamplingParams(30, stop=(stop_within(alone(lm, 0, SamplingParams(30)).text),), logprobs=1)
    wanted = alone(lm, 0, params)
    read_when(held, monkeypatch)
    (one,) = ask(made, [0], [params])
    until(lambda: one.running.tokens.over)
    assert len(one.running.tokens.ids) == 30 and not one.pieces
    held.set()
    said = one.answer()
    assert told(said) == told(wanted) and wanted.token_count < 30 and "".join(one.pieces) == said.text
    assert said.logprobs is not None and len(said.logprobs) == said.token_count == one.running.tokens.token_count
    assert one.ends == 1 and made.running == 0


def test_a_stop_string_frees_the_cache_at_the_next_step(
    lms: dict[str, FrozenLM], opened: Callable[..., Engine]
) -> None:
    lm = lms["llama"]
    made, params = opened(ContinuousEngine, lm), SamplingParams(200, 1.0, seed=1)
    (one,) = ask(made, [0], [replace(params, stop=(stop_within(alone(lm, 0, params).text),))])
    assert one.answer().finish_reason == "stop"
    ask(made, [1], [SamplingParams(2)])[0].answer()  # a step later
    assert made.blocks_in_use == 0 and len(one.running.tokens.ids) < 200


@pytest.mark.parametrize("kind", [ContinuousEngine, PaddedEngine])
def test_an_answer_that_is_there_is_told_though_the_engine_ends_first(
    lms: dict[str, FrozenLM], monkeypatch: pytest.MonkeyPatch, kind: type[Engine]
) -> None:
    """And one that is not there fails: nobody is told twice, and nobody is left waiting."""
    lm, held, step = lms["llama"], threading.Event(), threading.Event()
    wanted, forward = alone(lm, 0, SamplingParams(2)), lm.model.forward
    made: Any = kind(lm)
    read_when(held, monkeypatch)
    short, long = ask(made, [0, 1], [SamplingParams(2), SamplingParams(200, 1.0, seed=1)])

    def waiting(*given: Any, **named: Any) -> Any:
        assert not short.running.tokens.over or step.wait(PATIENCE)
        return forward(*given, **named)

    monkeypatch.setattr(lm.model, "forward", waiting)
    until(lambda: short.running.tokens.over)
    closing = threading.Thread(target=made.close)
    closing.start()
    until(lambda: made._closed)
    step.set()
    until(lambda: made.failure)
    assert not short.ended.is_set()
    held.set()
    closing.join(PATIENCE)
    assert told(short.answer()) == told(wanted)
    with pytest.raises(NotReady, match="stopping"):
        long.answer()
    assert short.ends == long.ends == 1 and made.running == 0


@pytest.mark.parametrize("kind", [ContinuousEngine, PaddedEngine])
def test_a_stop_string_that_is_a_special_token_ends_the_answer(
    lms: dict[str, FrozenLM], opened: Callable[..., Engine], kind: type[Engine]
) -> None:
    """It is in no text: the decoder leaves it out."""
    lm = lms["llama"]
    said = alone(lm, 0, params := SamplingParams(12, stop=("<mark>",)))
    (free,) = ask(opened(PaddedEngine, lm), [0], [params])
    ids = (free.answer(), free.running.tokens.ids)[1]
    at = next(i for i in range(3, len(ids)) if ids[i] not in ids[:i])
    marked = replace(lm, tokenizer=with_special(lm, ids[at], "<mark>"))
    assert "<mark>" not in said.text
    (cut,) = ask(opened(kind, marked), [0], [params])
    assert told(cut.answer()) == told(alone(marked, 0, params)) == (decode(lm, ids[:at]), "stop", at + 1)
    assert cut.running.tokens.ids == ids[:at]


def with_special(lm: FrozenLM, token: int, written: str) -> PreTrainedTokenizerFast:
    """The model's tokenizer, in which one id is a special token."""
    described = json.loads(lm.tokenizer.backend_tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    described["model"]["vocab"] = {written if i == token else piece: i for piece, i in vocabulary.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(described)), eos_token="</s>")
    tokenizer.add_tokens([AddedToken(written, special=True)])
    return tokenizer


def test_a_failed_padded_batch_fails_its_requests_and_no_others(
    lms: dict[str, FrozenLM], opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = lms["llama"]
    made = opened(PaddedEngine, lm)
    fails(monkeypatch, lm.model, "forward", ValueError("broken"), times=1, after=0)
    (one,) = ask(made, [0], [SamplingParams(4)])
    with pytest.raises(InferenceFailed, match="ValueError"):
        one.answer()
    assert ask(made, [1], [SamplingParams(4)])[0].answer().token_count > 0


@pytest.mark.parametrize("kind", [ContinuousEngine, PaddedEngine])
def test_closing_fails_what_runs_and_leaves_the_model_as_it_was(lms: dict[str, FrozenLM], kind: type[Engine]) -> None:
    lm = lms["llama"]
    threads = threading.active_count()
    made = kind(lm)
    asked = ask(made, range(4), [SamplingParams(200, 1.0, seed=2)] * 4)
    made.close()
    for one in asked:
        with pytest.raises(NotReady, match="stopping"):
            one.answer()
    with pytest.raises(NotReady, match="stopping"):
        ask(made, [0], [SamplingParams(2)])
    assert threading.active_count() == threads and "forward" not in vars(lm.model.get_input_embeddings())


def test_models_that_continuous_batching_answers_otherwise_get_padded_batches(
    lms: dict[str, FrozenLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = lms["llama"]
    made = open_engine(lm)
    assert made.kind == "continuous"
    made.close()
    held = softids.SoftIds.hold
    monkeypatch.setattr(softids.SoftIds, "hold", lambda self, key, make, waits: held(self, key, lambda: make() * 3))
    made = open_engine(lm)
    assert made.kind == "padded"
    made.close()


def test_models_that_continuous_batching_refuses_get_padded_batches(
    model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load_model(str(model_folders["gpt2"]))
    lm.model.config._attn_implementation = "flex_attention"  # none that the library's manager knows
    with pytest.raises(ModelUnavailable, match=r"'.*' would run on padded batches, and continuous ones are required: "):
        open_engine(lm, required="continuous")
    made = open_engine(lm)
    lm.model.config._attn_implementation = "sdpa"
    try:
        assert made.kind == "padded"
        assert told(ask(made, [0], [SamplingParams(4)])[0].answer()) == told(alone(lm, 0, SamplingParams(4)))
    finally:
        made.close()


def test_an_engine_that_cannot_begin_again_fails_its_requests_and_says_so(
    lms: dict[str, FrozenLM], opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    died: list[int] = []
    before = threading.enumerate()
    made = opened(ContinuousEngine, lms["llama"], on_death=lambda: died.append(1))
    (supervisor,) = (t for t in threading.enumerate() if t.name == "engine-supervisor" and t not in before)
    ask(made, [0], [SamplingParams(2)])[0].answer()
    fails(monkeypatch, lms["llama"].model, "init_continuous_batching", ValueError("no room"), times=10, after=0)
    fails(monkeypatch, lms["llama"].model, "forward", OUT, times=1, after=0)
    (one,) = ask(made, [0], [SamplingParams(4)])
    with pytest.raises(InferenceFailed, match="ValueError"):
        one.answer()
    supervisor.join(PATIENCE)
    assert died == [1] and not supervisor.is_alive()


# Passes of a model that an engine runs, one after the other


class Turns:
    """A model whose passes, each on a thread of its own, end when they may."""

    def __init__(self, lm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lm, self.within, self.most_within = lm, 0, 0
        self.may_end = threading.Event()
        self.real = lm.model.base_model.forward
        monkeypatch.setattr(lm.model.base_model, "forward", self.forward)
        self.threads: list[threading.Thread] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.within += 1
        self.most_within = max(self.most_within, self.within)
        assert self.may_end.wait(PATIENCE)
        said = self.real(*args, **kwargs)
        self.within -= 1
        return said

    def begin(self, work: Callable[[], object] | None = None) -> threading.Thread:
        ids = torch.tensor([[1, 2, 3]])
        thread = threading.Thread(target=work or (lambda: self.lm.model(ids)), daemon=True)
        thread.start()
        self.threads.append(thread)
        return thread

    def wait(self, thread: threading.Thread, function: str) -> None:
        """Until a thread has come to a function that it cannot leave by itself."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            frame = sys._current_frames().get(thread.ident or 0)
            if frame is not None and function in _names(frame):
                return
            time.sleep(0.001)
        raise AssertionError(f"no thread came to {function}")

    def all_end(self, seconds: float = 10.0) -> bool:
        for thread in self.threads:
            thread.join(seconds)
        return not any(thread.is_alive() for thread in self.threads)


def _names(frame: FrameType | None) -> list[str]:
    return [] if frame is None else [frame.f_code.co_name, *_names(frame.f_back)]


def test_passes_of_a_model_with_an_engine_come_one_after_the_other(
    lms: dict[str, FrozenLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = lms["llama"]
    made, turns = ContinuousEngine(lm), Turns(lm, monkeypatch)
    first = turns.begin()
    turns.wait(first, "forward")
    for _ in range(3):
        turns.wait(turns.begin(), "begin")
    turns.may_end.set()
    assert turns.all_end() and turns.most_within == 1
    made.close()


def test_a_pass_that_waits_while_the_engine_closes_gets_its_turn_and_nobody_waits_for_ever(
    lms: dict[str, FrozenLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = lms["llama"]
    made, turns = ContinuousEngine(lm), Turns(lm, monkeypatch)
    turns.wait(turns.begin(), "wait")
    turns.wait(turns.begin(made.close), "let_go")  # the first that waits, so it is next
    for _ in range(3):
        turns.wait(turns.begin(), "begin")
    turns.may_end.set()
    assert turns.all_end(), "a pass has waited for a turn that nobody ends"
    assert turns.within == 0
    assert not lm.model.base_model._forward_pre_hooks and not lm.model.base_model._forward_hooks
