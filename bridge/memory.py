"""How much memory there is, how much is held, and how to get freed memory back for real."""

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from pydantic import ByteSize, TypeAdapter, ValidationError
from torch import nn
from torch.distributed.tensor import DTensor

from latentwire.bridge.errors import InvalidRequest

Row = TypeVar("Row")

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's mallopt
MAPPED_APART_BYTES = 64 << 10
_peaks: dict[torch.device, int] = {}
GLIBC_BYTES = {MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20}  # where glibc's own adjustment ends


def budget_bytes(text: str | int | None, device: torch.device) -> int | None:
    """A memory budget in bytes from what an operator writes: ``24GB``, a share of the device like ``0.8``, or None.

    A number with a decimal point and no unit is a share; on a CPU, of what the container or the machine has.

    Raises:
        InvalidRequest: Neither, or a share outside 0 to 1, or no bytes at all.
    """
    if text is None:
        return None
    written = str(text).strip()
    share, size = None, 0
    with suppress(ValueError):  # 1.5GB
        share = float(written) if "." in written else None
    if share is not None:
        if not 0 < share <= 1:
            raise InvalidRequest(f"a memory budget of {written}: expected a share above 0, up to 1.0", param="memory")
        return int(share * device_bytes(device))
    with suppress(ValidationError):
        size = int(TypeAdapter(ByteSize).validate_python(written))
    if size < 1:
        raise InvalidRequest(f"a memory budget of {written!r}: expected 24GB, or a share like 0.8", param="memory")
    return size


def device_bytes(device: torch.device) -> int:
    """All memory of a device; on a CPU the machine's, or the container's limit where that is lower."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [Path(path).read_text().strip() for path in CGROUP_LIMITS if Path(path).is_file()]
    return min([psutil.virtual_memory().total, *(int(limit) for limit in limits if limit.isdigit())])


def held_bytes(device: torch.device) -> int:
    """Memory this process holds: allocated on the accelerator, or resident on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def free_bytes(device: torch.device) -> int:
    """Memory of a device that could be allocated now; on a CPU the machine's, or what the container's limit leaves."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return max(min(psutil.virtual_memory().available, device_bytes(device) - held_bytes(device)), 0)


def largest_bytes(device: torch.device) -> int:
    """Most bytes ever allocated on an accelerator: ``peak_bytes`` begins the library's own count again."""
    return max(_peaks.get(device, 0), int(torch.cuda.max_memory_allocated(device)))


def weights_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights in this process: tied weights count once, of a shard only what is here."""
    held = [t.to_local() if isinstance(t, DTensor) else t for t in model.parameters()]
    return sum(t.nbytes for t in {t.data_ptr(): t for t in held}.values())


def free_caches() -> None:
    """Give back what is held unused: by cycles of objects, by the accelerator's allocator, by the C library.

    Untold, glibc keeps blocks of freed activations: 50 to 90 MB after a batch of a model of 58 M weights (measured).
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def halves(rows: list[Row]) -> list[list[Row]]:
    """Two halves of a batch that memory was too small for, the first one last, to be popped next; none of one row."""
    middle = len(rows) // 2
    return [rows[middle:], rows[:middle]] if middle else []


@contextmanager
def mapped_apart() -> Iterator[None]:
    """Blocks allocated inside, by any thread, are mapped one by one, so that each returns as soon as it is freed.

    Weights that are converted while they are read otherwise land in the heaps of the threads that read them, and up to
    the whole model stays with the process after it was freed (measured: 0 to 106 MB of 138 MB came back; mapped apart,
    132 MB in six of six loads). An operator who tunes glibc by environment is left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        yield
        return
    mallopt(MMAP_THRESHOLD, MAPPED_APART_BYTES)
    try:
        yield
    finally:
        for threshold, size in GLIBC_BYTES.items():
            mallopt(threshold, size)


@dataclass
class Peak:
    """What a block needed beyond what was held when it began."""

    bytes: int = 0


@contextmanager
def peak_bytes(device: torch.device) -> Iterator[Peak]:
    """Measure what a block allocates on an accelerator at most; 0 on a CPU, which cannot tell."""
    peak = Peak()
    if device.type != "cuda":
        yield peak
        return
    _peaks[device] = largest_bytes(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    yield peak
    stayed = max(held, torch.cuda.memory_allocated(device))  # a model that another thread loaded meanwhile, say
    peak.bytes = int(torch.cuda.max_memory_allocated(device)) - stayed
