"""Modes in which steps are made on a GPU, as far as a CPU can tell: attention over blocks, graphs, steps one late.

Only the device is a stand-in: the kernel of ``varlen_attn``, which torch has for CUDA alone; streams and events, which
have nothing to order here; and graphs, of which a tape plays the operations again, and no Python.
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.generation.continuous_batching import initialization, input_outputs, model_runner

from latentwire.bridge.generation import attention, steps
from latentwire.bridge.generation.base import Soft
from latentwire.bridge.generation.continuous import PAGE_TOKENS, ContinuousEngine
from latentwire.bridge.generation.output import Generation
from latentwire.bridge.generation.select import open_engine
from latentwire.bridge.generation.steps import Way, ways
from latentwire.bridge.models import FrozenLM, load_model
from latentwire.bridge.sampling import SamplingParams
from tests.integration.test_continuous import (
    MIXED,
    PATIENCE,
    Asked,
    alone,
    ask,
    fails,
    opened,  # noqa: F401
    shared_prefix,
    told,
)
from tests.integration.test_engine import stop_within

ROWS, GATHERING, TABLES = Way("by rows"), Way("gathering"), Way("reading tables")
GRAPHS, LATE = Way("reading tables", graphs=True), Way("gathering", overlapped=True)
ALL = Way("reading tables", graphs=True, overlapped=True)


@varlen._varlen_attn.register_kernel("cpu")
def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As Flash Attention: causal from the end of the keys; rows of no keys give zeros; nothing is said of the rest."""
    assert (cu_seq_k is None) == (block_table is not None) == (seqused_k is not None)
    assert window_size == ([-1, 0] if is_causal else [-1, -1])
    out = torch.full_like(query, math.nan)
    starts = cu_seq_q.tolist()
    for row, (start, end) in enumerate(pairwise(starts)):
        if block_table is not None and seqused_k is not None:
            assert block_table.dtype == seqused_k.dtype == torch.int32 and int(block_table.min()) >= 0
            keys, values = (pool[block_table[row]].flatten(0, 1)[: int(seqused_k[row])] for pool in (key, value))
        else:
            assert cu_seq_k is not None
            keys, values = (states[int(cu_seq_k[row]) : int(cu_seq_k[row + 1])] for states in (key, value))
        assert end - start <= max_q and len(keys) <= max_k
        if end > start:
            seen = torch.ones(end - start, len(keys), dtype=torch.bool)
            seen = seen.tril(len(keys) - (end - start)) if is_causal else seen
            q, k, v = (states.transpose(0, 1)[None] for states in (query[start:end], keys, values))
            made = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
            out[start:end] = made[0].transpose(0, 1) if len(keys) else 0
    return out, query.new_empty(0, dtype=torch.float32), torch.empty(2, dtype=torch.uint64)


class Stream:
    """Nothing waits for anything here; what is asked to is written down."""

    device = torch.device("cpu")
    waited: list[str] = []  # noqa: RUF012

    def wait_stream(self, stream: object) -> None:
        self.waited.append(f"wait for {stream}")

    def record_event(self, event: object) -> None: ...
    def wait_event(self, event: object) -> None: ...
    def synchronize(self) -> None: ...


class Tape(TorchDispatchMode):
    """A graph: the operations of a pass on the same tensors again. What the host would have to wait for is refused."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func) and "nonzero" not in str(func), f"{func} waits for the device"
        made = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        for func, args, kwargs, before in self.operations:
            made = func(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(made), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)

    def reset(self) -> None:
        self.operations.clear()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tape]]:
    """A CPU that passes for a GPU where the library asks; the graphs that it made."""
    tapes: list[Tape] = []

    def new_tape() -> Tape:
        tapes.append(Tape())
        return tapes[-1]

    def capture(graph: Tape, **_: Any) -> AbstractContextManager[Any]:
        return graph

    monkeypatch.setattr(input_outputs.ContinuousBatchingAsyncIOs, "_supported_device_types", ("cpu",))
    monkeypatch.setattr(input_outputs, "create_device_stream", lambda device: Stream())
    monkeypatch.setattr(torch, "Event", lambda *_, **__: Stream())
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: "the default one")
    for module in (input_outputs, model_runner, steps):
        monkeypatch.setattr(module, "stream_context", lambda stream: nullcontext())
    monkeypatch.setattr(initialization, "get_accelerator_graph_name", lambda: "CUDAGraph")
    monkeypatch.setattr(model_runner, "get_memory_pools", lambda: (None, 0))
    monkeypatch.setattr(model_runner, "memory_pool_context", lambda pool: nullcontext())
    monkeypatch.setattr(model_runner, "create_accelerator_graph", new_tape)
    monkeypatch.setattr(model_runner, "accelerator_graph_capture_context", capture)
    Stream.waited.clear()
    yield tapes


def logprobs_of(said: Generation) -> list[float]:
    assert said.logprobs is not None
    return [one.logprob for one in said.logprobs] + ([] if said.end_logprob is None else [said.end_logprob])


PARAMS = [replace(p, seed=10 * n + i, logprobs=3) for n, p in enumerate(MIXED) for i in range(3)]
ORDER = [i % 4 for i in range(len(PARAMS))]


@pytest.fixture(scope="module")
def wanted(lms: dict[str, FrozenLM]) -> Callable[[str], list[Generation]]:
    """What the plain mode answers to requests of all kinds."""
    known: dict[str, list[Generation]] = {}

    def answers(family: str) -> list[Generation]:
        if family not in known:
            made = ContinuousEngine(lms[family], max_rows=3, step_tokens=16)
            known[family] = [one.answer() for one in ask(made, ORDER, PARAMS)]
            made.close()
        return known[family]

    return answers


@pytest.mark.parametrize("way", [ROWS, GATHERING, TABLES, GRAPHS, LATE, ALL], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_mode_gives_the_answers_of_the_plain_one_to_requests_that_come_and_go(
    lms: dict[str, FrozenLM],
    opened: Callable[..., Any],  # noqa: F811
    device: list[Tape],
    wanted: Callable[[str], list[Generation]],
    family: str,
    way: Way,
) -> None:
    answers = wanted(family)
    made = opened(ContinuousEngine, lms[family], max_rows=3, step_tokens=16, way=way)
    for one, plain in zip(ask(made, ORDER, PARAMS), answers, strict=True):
        said = one.answer()
        assert told(said) == told(plain) and "".join(one.pieces) == said.text
        assert logprobs_of(said) == pytest.approx(logprobs_of(plain), abs=1e-5)
        assert said.entropy_nats == pytest.approx(plain.entropy_nats, abs=1e-5)
    assert made.failure is None and made.out_of_memory == 0
    assert bool(device) == way.graphs


def forwards(lm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each pass of the model that runs Python from now on: whether it reads a table of blocks."""
    seen: list[bool] = []
    real = lm.model.forward

    def watching(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("block_table") is not None)
        return real(*args, **kwargs)

    monkeypatch.setattr(lm.model, "forward", watching)
    return seen


@pytest.mark.parametrize("way", [GRAPHS, ALL], ids=str)
def test_graphs_are_made_before_the_first_request_and_replayed_without_python(
    lms: dict[str, FrozenLM],
    opened: Callable[..., Any],  # noqa: F811
    device: list[Tape],
    monkeypatch: pytest.MonkeyPatch,
    way: Way,
) -> None:
    lm = lms["llama"]
    made = opened(ContinuousEngine, lm, max_rows=3, way=way)
    assert len(device) == 3 * (1 + way.overlapped)  # of 1, 2 and 3 rows, for each set of inputs
    seen = forwards(lm, monkeypatch)
    (one,) = ask(made, [0], [SamplingParams(24, 1.0, seed=2)])
    assert one.answer().token_count == 24 and seen == [False] and len(device) == 3 * (1 + way.overlapped)


@pytest.mark.parametrize("way, reads", [(GATHERING, False), (TABLES, True)], ids=str)
def test_tables_reach_the_kernel_that_reads_them_and_are_indices_for_the_other(
    lms: dict[str, FrozenLM],
    opened: Callable[..., Any],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    way: Way,
    reads: bool,
) -> None:
    lm = lms["llama"]
    made = opened(ContinuousEngine, lm, way=way)
    seen = forwards(lm, monkeypatch)
    prepare = made._manager.batch_processor.inputs_and_outputs.prepare_batch_tensors
    tables: list[bool] = []

    def preparing(*args: Any, **kwargs: Any) -> None:
        prepare(*args, **kwargs)
        tables.append(made._manager.batch_processor.inputs_and_outputs.use_block_table)

    monkeypatch.setattr(made._manager.batch_processor.inputs_and_outputs, "prepare_batch_tensors", preparing)
    (one,) = ask(made, [0], [SamplingParams(3 * PAGE_TOKENS, 1.0, seed=4)])
    one.answer()
    assert tables == [False] + [True] * (len(tables) - 1) and len(tables) > 2 * PAGE_TOKENS
    assert seen == [table and reads for table in tables]


def test_every_pass_waits_for_what_was_written_before_it(
    lms: dict[str, FrozenLM],
    opened: Callable[..., Any],  # noqa: F811
    device: list[Tape],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = lms["llama"]
    made = opened(ContinuousEngine, lm, way=LATE)
    seen = forwards(lm, monkeypatch)
    Stream.waited.clear()
    (one,) = ask(made, [0], [SamplingParams(6)])
    one.answer()
    assert len(Stream.waited) >= len(seen) > 4 and set(Stream.waited) == {"wait for the default one"}


def test_other_passes_of_a_model_with_an_engine_over_blocks_are_what_they_were(
    lms: dict[str, FrozenLM],
    opened: Callable[..., Any],  # noqa: F811
) -> None:
    lm = lms["llama"]
    params = SamplingParams(8, logprobs=0)
    before, found = alone(lm, 1, params), lm.model.config._attn_implementation
    made = ContinuousEngine(lm, way=TABLES)
    try:
        assert lm.model.config._attn_implementation == attention.NAME
        assert alone(lm, 1, params) == before
    finally:
        made.close()
    assert lm.model.config._attn_implementation == found


def test_what_attention_over_blocks_does_not_know_is_refused_by_name(
    lms: dict[str, FrozenLM],
    opened: Callable[..., Any],  # noqa: F811
) -> None:
    made, states = opened(ContinuousEngine, lms["llama"]), torch.zeros(1, 1, 1, 8)
    cache = made._manager.batch_processor.cache
    with pytest.raises(ValueError, match="attention with softcap"):
        attention.attention(torch.nn.Identity(), states, states, states, None, cache, softcap=30.0)


@pytest.mark.parametrize("way", [LATE, ALL], ids=str)
def test_stops_that_are_heard_of_a_step_late_change_nothing(
    lms: dict[str, FrozenLM],
    opened: Callable[..., Any],  # noqa: F811
    device: list[Tape],
    way: Way,
) -> None:
    lm = lms["llama"]
    free = alone(lm, 0, SamplingParams(24))
    stop = stop_within(free.text)
    params = [SamplingParams(24, stop=(stop,), logprobs=1), SamplingParams(1), SamplingParams(5)]
    wanted = [alone(lm, 0, one) for one in params]
    made = opened(ContinuousEngine, lm, max_rows=3, way=way)
    for said, reference in zip([one.answer() for one in ask(made, [0, 0, 0], params)], wanted, strict=True):
        assert told(said) == told(reference)
    ask(made, [1], [SamplingParams(2)])[0].answer()  # steps later
    assert made.blocks_in_use <= 2 and made.running == 0  # at most those of the step that is still under way


def test_requests_that_are_cancelled_while_a_step_runs_for_them_harm_no_other(
    lms: dict[str, FrozenLM],
    opened: Callable[..., Any],  # noqa: F811
    device: list[Tape],
) -> None:
    """At every length, so that some end when the step has just filled a block."""
    lm = lms["llama"]
    made = opened(ContinuousEngine, lm, kv_tokens=512, max_rows=4, way=LATE)
    for seed in range(2 * PAGE_TOKENS):
        row, drawn = shared_prefix(lm, 100 + seed)
        came, count = threading.Event(), seed % PAGE_TOKENS + 1
        gone = Asked(made, row, SamplingParams(100, 1.0, seed=seed), Soft(("gone", seed), lambda drawn=drawn: drawn))
        gone.running.on_text = lambda piece, _, gone=gone, count=count, came=came: (
            came.set() if len(gone.running.tokens.ids) >= count else None
        )
        assert came.wait(PATIENCE)
        made.cancel(gone.running)
    row, drawn = shared_prefix(lm, 1)
    said = Asked(made, row, SamplingParams(6), Soft("stays", lambda: drawn)).answer()
    assert made.failure is None and said.token_count > 0


@pytest.mark.parametrize("way", [LATE, ALL], ids=str)
def test_out_of_memory_every_request_goes_on_where_it_was_also_a_step_late(
    lms: dict[str, FrozenLM],
    opened: Callable[..., Any],  # noqa: F811
    device: list[Tape],
    monkeypatch: pytest.MonkeyPatch,
    way: Way,
) -> None:
    lm = lms["llama"]
    params = [replace(p, seed=i) for i, p in enumerate(MIXED)]
    wanted = [alone(lm, i, p) for i, p in enumerate(params)]
    made = opened(ContinuousEngine, lm, max_rows=4, way=way)
    with monkeypatch.context() as patch:
        fails(patch, steps.Choices, "choose", torch.OutOfMemoryError("CUDA out of memory"), times=1, after=3)
        asked = ask(made, range(4), params)
        assert [told(one.answer()) for one in asked] == [told(one) for one in wanted]
    assert made.out_of_memory == 1 and made.max_rows == 2 and made.failure is None


def test_more_requests_than_the_cache_holds_all_get_their_answer_also_a_step_late(
    lms: dict[str, FrozenLM],
    opened: Callable[..., Any],  # noqa: F811
    device: list[Tape],
) -> None:
    lm = lms["llama"]
    params = [SamplingParams(60, 1.0, seed=i) for i in range(8)]
    wanted = [alone(lm, i % 4, one) for i, one in enumerate(params)]
    made = opened(ContinuousEngine, lm, kv_tokens=256, max_rows=8, way=ALL)
    asked = ask(made, [i % 4 for i in range(8)], params)
    assert [told(one.answer()) for one in asked] == [told(one) for one in wanted]


def test_on_a_cpu_every_mode_but_the_plain_one_attends_row_by_row(lms: dict[str, FrozenLM]) -> None:
    for mode in steps.MODES[1:]:
        assert ways(mode, lms["llama"]) == {"paged": ROWS, "plain": Way()}
    assert ways("plain", lms["llama"]) == ways("async", lms["mistral"]) == {"plain": Way()}  # a window slides


def test_a_mode_comes_to_what_the_device_has(lms: dict[str, FrozenLM], monkeypatch: pytest.MonkeyPatch) -> None:
    lm = lms["llama"]
    monkeypatch.setattr(attention, "kernel_for", lambda lm: "gathering")
    assert ways("async", lm) == {"async": LATE, "paged": GATHERING, "plain": Way()}
    monkeypatch.setattr(attention, "kernel_for", lambda lm: "reading tables")
    assert ways("async", lm) == {"async": ALL, "graphs": GRAPHS, "paged": TABLES, "plain": Way()}
    assert ways("paged", lm) == {"paged": TABLES, "plain": Way()}


def test_a_mode_that_fails_or_answers_otherwise_gives_way_to_the_next_and_a_warning_says_so(
    lms: dict[str, FrozenLM],
    device: list[Tape],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lm = lms["llama"]
    monkeypatch.setattr(attention, "kernel_for", lambda lm: "reading tables")
    broken: list[str] = ["graphs"]

    def stored(*args: Any) -> Any:
        lengths = real(*args)
        return lengths if "tables" not in broken else lengths * 0

    real = attention._stored
    monkeypatch.setattr(attention, "_stored", stored)
    monkeypatch.setattr(Tape, "replay", lambda self: None)
    made = open_engine(lm, mode="async", required="continuous")
    assert isinstance(made, ContinuousEngine) and made._way == TABLES
    made.close()
    assert "does not run in mode 'async'" in caplog.text and "does not run in mode 'graphs'" in caplog.text
    broken.append("tables")
    caplog.clear()
    made = open_engine(lm, mode="paged", required="continuous")
    assert isinstance(made, ContinuousEngine) and made._way == Way()
    made.close()
    assert "does not run in mode 'paged': the log-probability of token" in caplog.text
    assert lm.model.config._attn_implementation == "sdpa"


def test_attention_over_blocks_is_for_full_attention_in_half_precision_and_tables_for_a_newer_kernel(
    lms: dict[str, FrozenLM], model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    half = load_model(str(model_folders["llama"]), dtype=torch.float16)
    assert attention.kernel_for(half) == "by rows"  # on a CPU
    monkeypatch.setattr(FrozenLM, "device", torch.device("cuda"))
    asked: list[str] = []

    def found(capability: int, *, installed: bool, works: bool = True) -> str | None:
        def activate(name: str) -> None:
            asked.append(name)
            if not works:
                raise ImportError("built for another torch")

        attention._has_newer.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
        monkeypatch.setattr(attention, "find_spec", lambda name: name if installed else None)
        monkeypatch.setattr(attention, "activate_flash_attention_impl", activate)
        return attention.kernel_for(half)

    assert found(9, installed=False) == found(8, installed=True) == "gathering" and asked == []
    assert found(9, installed=True, works=False) == "gathering"
    assert found(9, installed=True) == found(10, installed=True) == "reading tables"
    assert asked == ["FA3", "FA3", "FA4"]
    attention._has_newer.cache_clear()
    assert attention.kernel_for(lms["llama"]) is None  # float32
    monkeypatch.setattr(half.model.config, "sliding_window", 8, raising=False)
    assert attention.kernel_for(half) is None
