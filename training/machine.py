"""What a run runs on: devices, processes, memory, and the signals that end it.

The trained weights are a small part of the models around them, so several processes each hold all of them and add
up one flat gradient per step: exact for Muon, for any micro-batch, and the same for two processes as for one.
"""

import os
import resource
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.models import FrozenLM, blocks_of

STOPPING = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Ranks:
    """The processes of a run; one alone needs no launcher."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, rows: Sequence[int]) -> list[int]:
        """This process's rows of a step; every row belongs to exactly one process."""
        return list(rows[self.rank :: self.count])

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in one exchange."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, summed in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether any process says yes; all get the same answer."""
        if self.count == 1:
            return flag
        asked = torch.tensor(float(flag), device=device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return bool(asked)

    def leave(self) -> None:
        """End the exchange; this process alone goes on."""
        if self.count > 1:
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()


def processes() -> int:
    """How many processes the launcher started, this one included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_ranks(device: torch.device) -> Ranks:
    """The processes that ``torchrun`` or ``accelerate launch`` started, or this one alone, on devices of this kind.

    Raises:
        InvalidRequest: Others are missing, or all were told to share one GPU.
    """
    if processes() == 1:
        return Ranks()
    from accelerate import PartialState

    if device.type == "cuda" and device.index is not None:
        raise InvalidRequest(f"--device {device}: each process takes a GPU of its own; expected cuda", param="device")
    state = PartialState(cpu=device.type == "cpu")
    if state.num_processes != processes():
        met = f"WORLD_SIZE is {processes()}, but {state.num_processes} met"
        raise InvalidRequest(f"{met}; start them with torchrun")
    return Ranks(state.process_index, state.num_processes)


def shard(lm: FrozenLM) -> FrozenLM:
    """A model whose blocks are spread over all processes and gathered one at a time as they run.

    Only the blocks: they are nearly all of a large model, and embedding and head stay whole for the composer.
    """
    from torch.distributed.fsdp import fully_shard

    for block in blocks_of(lm):
        fully_shard(block)
    return lm


def gradient_checkpointing(lm: FrozenLM) -> FrozenLM:
    """A model whose blocks keep only their inputs for the backward pass and run again in it.

    Around the blocks and not through the library's own switch, which needs training mode and, in some families,
    turns dropout on with it.
    """
    from torch.utils.checkpoint import checkpoint

    for block in blocks_of(lm):
        inner = block.forward
        block.forward = lambda *a, inner=inner, **k: checkpoint(inner, *a, use_reentrant=False, **k)
    return lm


BACKEND = "inductor"
GRAPHS = 16  # compiled graphs of one function; what comes later runs as it is


def compile_model(lm: FrozenLM) -> FrozenLM:
    """A model that is compiled up to its output layer, for at most ``GRAPHS`` shapes."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = GRAPHS
    lm.model.base_model.compile(backend=BACKEND, dynamic=False)
    return lm


def graphs() -> int:
    """Graphs compiled so far in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes: of tensors, of what the allocator holds, of what it holds unused in splits, the most so far, and the
    device's. On a CPU the resident set stands for the first two."""

    allocated_bytes: int
    reserved_bytes: int
    inactive_bytes: int
    peak_bytes: int
    device_bytes: int


def memory_of(device: torch.device) -> Memory:
    """What this process holds now."""
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        return Memory(
            stats["allocated_bytes.all.current"],
            stats["reserved_bytes.all.current"],
            stats["inactive_split_bytes.all.current"],
            stats["reserved_bytes.all.peak"],
            torch.cuda.get_device_properties(device).total_memory,
        )
    resident = psutil.Process().memory_info().rss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Memory(resident, resident, 0, max(peak, resident), psutil.virtual_memory().total)


@dataclass
class StopRequest:
    """The signal that asked the run to end, if one has."""

    name: str | None = None

    def note(self, number: int, _frame: FrameType | None) -> None:
        """Remember it: the step in hand is finished first."""
        self.name = signal.Signals(number).name


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While open, SIGTERM and SIGUSR1 do not end the process but are noted: schedulers send them before the end."""
    request, before = StopRequest(), {}
    try:
        for number in STOPPING:
            before[number] = signal.signal(number, request.note)
    except ValueError:  # not the main thread, which alone receives signals
        pass
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def clear_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Drop what was accumulated and hand freed blocks back, so that a smaller try starts clean."""
    for parameter in parameters:
        parameter.grad = None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
