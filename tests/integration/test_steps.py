"""Modes in which steps are made on a GPU, as far as a CPU can tell: attention over blocks, graphs, steps one late.

Only the device is a stand-in: the kernel of ``varlen_attn``, which torch has for CUDA alone; streams and events, which
have nothing to order here; and graphs, of which a tape plays the operations again, and no Python.
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.generation.continuous_batching import initialization, input_outputs, model_runner
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING

from latentwire.bridge.generation import attention, continuous, steps
from latentwire.bridge.generation.base import Soft
from latentwire.bridge.generation.continuous import PAGE_TOKENS, ContinuousEngine
from latentwire.bridge.generation.output import Generation
from latentwire.bridge.generation.select import open_engine
from latentwire.bridge.generation.steps import Way, ways
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.prompt import IGNORE, TEXT, Row
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

GATHERING, TABLES = Way("gathering"), Way("reading tables")
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
    for row, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
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


@pytest.mark.parametrize("way", [GATHERING, TABLES, GRAPHS, LATE, ALL], ids=str)
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
    assert made.failure is None and made.out_of_memory == 0
    assert bool(device) == way.graphs
