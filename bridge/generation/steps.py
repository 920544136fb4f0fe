"""How the steps of a continuous batch are made on the device: in which mode, in which order, and what they choose.

The library makes steps one late where it may (``async``): while the device computes one, the host prepares the next,
and reads the tokens of the one before. So nothing here asks what a request has said until now: where its next token
stands says the library's own count, and what a step has found is kept until its tokens are read.

Dimensions used in this file:
    B rows of a step, padding included    V vocabulary
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingAsyncIOs
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState
from transformers.generation.continuous_batching.utils import stream_context

from latentwire.bridge.config import Mode
from latentwire.bridge.generation import attention
from latentwire.bridge.generation.output import IdLogprob, Report, entropies_of
from latentwire.bridge.generation.rows import Rows
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.sampling import Draws, SamplingParams

MODES: tuple[Mode, ...] = get_args(Mode)
IN_FLIGHT = 2  # steps whose tokens are not read yet, at most
Next = tuple[SamplingParams, int]
"""How a row's next token is chosen, and which one of its answer it is."""


@dataclass(frozen=True)
class Way:
    """What a mode comes to for a model on its device: as much of it as there is there.

    Attributes:
        kernel: Attention over each row's own keys; None is the model's own, over all rows' under a mask.
        graphs: Steps of one token a row are replayed as CUDA graphs: their kernels start without the host.
        overlapped: The host prepares a step while the device computes the one before.
    """

    kernel: attention.Kernel | None = None
    graphs: bool = False
    overlapped: bool = False

    @classmethod
    def of(cls, mode: Mode, lm: FrozenLM) -> "Way":
        """Each mode does what those before it do; a graph needs a kernel that reads tables, whose shapes are fixed.

        On a CPU there is nothing to overlap: the host is the device.
        """
        level = MODES.index(mode)
        kernel = attention.kernel_for(lm) if level else None
        return cls(kernel, kernel == "reading tables" and level >= 2, kernel not in (None, "by rows") and level >= 3)


def ways(mode: Mode, lm: FrozenLM) -> dict[Mode, Way]:
    """What may be tried for a mode, in this order: it, and those before it, down to ``plain``."""
    found: dict[Mode, Way] = {}
    for less in MODES[MODES.index(mode) :: -1]:
        way = Way.of(less, lm)
        found = {name: other for name, other in found.items() if other != way} | {less: way}
    return found


class Runner(ModelRunner):
    """The library's, with what comes before and after a pass; both are on the stream of the pass."""

    logit_processor: "Choices"

    def __init__(self, kernel: attention.Kernel | None, **library: Any) -> None:
        super().__init__(**library)
        self._kernel = kernel

    @classmethod
    def take_over(cls, processor: ContinuousBatchProcessor, kernel: attention.Kernel | None) -> None:
        """Run the steps of a batch here, on a stream that comes before all others of its device."""
        device = processor.model_device
        if device.type == "cuda":
            processor.inputs_and_outputs.compute_stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        names = ("logit_processor", "cb_config", "inputs_and_outputs", "cache", "do_sample", "return_logprobs")
        processor.model_runner = cls(kernel, **{name: getattr(processor, name) for name in names})

    def compute_batch(self, model: nn.Module, batch_data: dict[str, Any]) -> None:
        """A pass, and the tokens it chooses."""
        current = self.inputs_and_outputs
        stream: Any = current.compute_stream
        if stream is not None:
            # The library writes its inputs, and we soft tokens, on this one, and runs the pass without waiting for it.
            stream.wait_stream(torch.accelerator.current_stream(stream.device))
        with stream_context(stream):
            batch_data |= self._over_blocks(batch_data)
        super().compute_batch(model, batch_data)
        with stream_context(stream):
            self.logit_processor.choose(batch_data["logits_processor_args"], current.output_ids)

    def _over_blocks(self, batch_data: dict[str, Any]) -> dict[str, Any]:
        """What the library's inputs lack for attention over blocks."""
        if self._kernel is None:
            return {}
        if self._kernel == "by rows":
            return {"attention_mask": attention.MASK, "rows": Rows.of(batch_data, self.cb_config.page_size)}
        more: dict[str, Any] = {"attention_mask": attention.MASK}
        if batch_data["block_table"] is not None and self._kernel == "gathering":
            io: Any = self.inputs_and_outputs
            io = io.io_pairs[io.current_pair].device_io if isinstance(io, ContinuousBatchingAsyncIOs) else io
            total, longest = (next(iter(of.values())) for of in (io.total_seqlen_k, io.max_length_k))
            more |= attention.gathered(batch_data, total, longest, self.cb_config.page_size)
        return more


@dataclass(eq=False)
class _Step:
    """What a step chooses beside the likeliest tokens, and what it finds.

    Attributes:
        rows: By request and place in its answer: the row of the step.
        draws: For rows that are drawn; None where none is.
        reported: Of rows that report log-probabilities: which of them it is, and how many are asked for.
        entropies: Of the rows up to the last in ``rows``, on the host once the device has done what it was asked until
            then.
        report: Of the rows in ``reported``.
    """

    rows: dict[tuple[str, int], int]
    draws: Draws | None
    reported: dict[int, tuple[int, int]]
    entropies: Float[Tensor, " _"] = field(default_factory=lambda: torch.empty(0))
    report: Report | None = None

    @cached_property
    def nats(self) -> list[float]:
        """``entropies``, read once for all rows."""
        return self.entropies.tolist()

    def logprob(self, row: int, token: int) -> IdLogprob | None:
        """Of the token of a row; None where nobody asked."""
        if self.report is None or row not in self.reported:
            return None
        which, count = self.reported[row]
        return self.report.row(which, token, count)


class Choices(ContinuousBatchingLogitsProcessorList):
    """Chooses each row's token by its own parameters, seed and position, in place of the library's processors.

    Those have no seed, and leave log-probabilities after sampling. What a step needs travels to the device among the
    library's own arguments. The choice is made after the pass, and not in it: a graph would do for every step what any
    may need, and a sort of the vocabulary takes longer than reading the weights does.
    """

    ROWS = len(Draws.FIELDS) + 2  # and which rows are drawn, and which report

    def __init__(
        self, asked: Callable[[Sequence[RequestState]], Sequence[Next | None]], logits: Float[Tensor, "_ V"] | None
    ) -> None:
        """``asked`` tells of the rows of the next step; ``logits`` is where those of a graph are left."""
        super().__init__(LogitsProcessorList())
        self.tensors_required, self.do_processing = self.ROWS, True
        self._asked, self._logits = asked, logits
        self._scores: Tensor | None = None
        self._step = _Step({}, None, {})
        self._made: deque[_Step] = deque(maxlen=IN_FLIGHT)

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Nothing is read that was not written."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_in_batch: list[FutureRequestState], arg_storage: Tensor) -> Tensor:
        """On the host, for the step that is prepared: its draws and reports, written to the library's inputs."""
        states = [future.state for future in requests_in_batch if future.has_new_token]
        rows = {row: one for row, one in enumerate(self._asked(states)) if one is not None}
        drawn = {row: one for row, one in rows.items() if one[0].temperature > 0}
        told = {row: one for row, one in rows.items() if one[0].logprobs is not None}
        draws = Draws.of(*zip(*drawn.values(), strict=True)) if drawn else None
        if draws is not None:
            arg_storage[0, : len(drawn)] = torch.tensor(list(drawn), dtype=torch.int32)
            arg_storage[2:, : len(drawn)] = draws.numbers
        if told:
            arg_storage[1, : len(told)] = torch.tensor(list(told), dtype=torch.int32)
        places = {(states[row].request_id, place): row for row, (_, place) in rows.items()}
        reported = {row: (i, params.logprobs or 0) for i, (row, (params, _)) in enumerate(told.items())}
        self._step = _Step(places, draws, reported)
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        """Within the pass: keep the logits. A graph makes this copy again each time, and runs no Python for it."""
        if self._logits is None:
            self._scores = scores
        else:
            self._logits[: len(scores)].copy_(scores)
        return scores

    def choose(self, arguments: Int[Tensor, "_ B"], output_ids: Int[Tensor, "_ _"]) -> None:
        """After the pass: put what is drawn in the place of the likeliest tokens; find what is told of them."""
        step, scores = self._step, self._scores if self._logits is None else self._logits
        self._scores = None
        assert scores is not None
        tokens = output_ids[0]
        if step.draws is not None:
            count = step.draws.numbers.shape[1]
            rows = arguments[0, :count].long()
            made = step.draws.draw(scores.index_select(0, rows), arguments[2:, :count])
            tokens.index_copy_(0, rows, made.argmax(dim=1).to(tokens.dtype))
        if step.reported:
            rows = arguments[1, : len(step.reported)].long()
            most = max(count for _, count in step.reported.values())
            step.report = Report.of(scores.index_select(0, rows), tokens.index_select(0, rows).long(), most)
        last = max(step.rows.values(), default=-1)
        step.entropies = entropies_of(scores[: last + 1]).to("cpu", non_blocking=True)  # into pinned memory
        self._made.append(step)

    def found(self, request: str, place: int, token: int) -> tuple[IdLogprob | None, float | None]:
        """Of the token of a request at a place in its answer, once the library has read it: its log-probability, None
        where nobody asked, and the entropy of what it was chosen from."""
        for step in self._made:
            if (row := step.rows.get((request, place))) is not None:
                return step.logprob(row, token), step.nats[row]
        return None, None
