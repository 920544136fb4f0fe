"""Where models compute, and in what: as an operator says it, or as the machine allows.

``LW_DEVICE`` and ``LW_DTYPE`` of the service take the same words as ``--device`` and ``--precision`` of the commands.
"""

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch
from torch import nn

from latentwire.bridge.config import DEVICE
from latentwire.bridge.errors import InvalidRequest, first_line

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NVIDIA = Path("/proc/driver/nvidia/version")
QUOTAS = (("/sys/fs/cgroup/cpu.max",), ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"))
"""Files of a container's quota in either version of cgroups: microseconds, of each so many. "max" and -1 are none."""
NO_HALF = (7, 0)  # compute capability below which half precision is no faster than float32


def device_named(name: str | None) -> torch.device:
    """The device that was asked for and no other (InvalidRequest, with the reason), or by default the best there is."""
    if name is None:
        return default_device()
    if not re.fullmatch(DEVICE, name):
        raise InvalidRequest(f"device {name!r}: expected cpu, cuda, cuda:1, mps or xpu", param="device")
    device = torch.device(name)
    if trouble := _missing(device):
        raise InvalidRequest(f"device {name!r} was asked for, but {trouble}", param="device")
    return device


def cores() -> int:
    """Cores that this process may keep busy: those it is bound to, or as many as a container's quota pays for."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in QUOTAS:
        with suppress(OSError, ValueError):
            quota, period = (int(word) for file in files for word in Path(file).read_text().split())
            found = min(found, quota // period) if quota > 0 else found
    return max(1, found)


def use_threads(count: int | None) -> None:
    """Compute with so many threads on a CPU, in all of this process; None leaves a core to the process of HTTP.

    On two cores that HTTP and callers shared, two threads answered less than one (``benchmarks/threads.py``): a product
    is done when its last thread is. ``OMP_NUM_THREADS`` stands.
    """
    if count is None and "OMP_NUM_THREADS" in os.environ:
        return
    torch.set_num_threads(count or max(1, min(torch.get_num_threads(), cores() - 1)))


def is_same(one: torch.device, other: torch.device) -> bool:
    """Whether two names are of one device: ``cuda`` is ``cuda:0``."""
    return (one.type, one.index or 0) == (other.type, other.index or 0)


@cache
def default_device() -> torch.device:
    """The accelerator where there is one; Apple's only if it computes what we need. A GPU left unused is named."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device.type == "mps" and (why := _unusable(device)):
        log.warning("MPS cannot be used (%s): computing on the CPU", why)
        return torch.device("cpu")
    if device.type == "cpu" and has_nvidia():
        log.warning("this machine has an NVIDIA GPU, but %s: computing on the CPU", why_no_cuda())
    return device


def has_nvidia() -> bool:
    """Whether there is an NVIDIA driver, or its tools, whatever torch makes of it."""
    return NVIDIA.is_file() or shutil.which("nvidia-smi") is not None


def why_no_cuda() -> str:
    """Why torch computes on no NVIDIA GPU here: what hides it, what the build lacks, or what the driver says."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if hidden is not None and not hidden.strip(" -1"):
        return f"CUDA_VISIBLE_DEVICES is {hidden!r} and hides every GPU"
    if not has_nvidia():
        return "no NVIDIA driver is loaded"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return first_line(error)
    return "torch finds no GPU"


def _missing(device: torch.device) -> str | None:
    """Why a device cannot be had, or None where it can."""
    if device.type == "cpu":
        return None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) < count:
            return None
        return f"torch finds {count} GPU{'s' * (count > 1)} here, counted from cuda:0" if count else why_no_cuda()
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type != device.type:
        return f"torch finds {'no accelerator' if found is None else repr(found.type)} here"
    return _unusable(device)


def dtype_named(precision: str | None, device: torch.device) -> torch.dtype:
    """What was asked for (InvalidRequest unless it is known; a warning where it is slow), or what suits the device."""
    if precision is None:
        return default_dtype(device)
    if precision not in DTYPES:
        raise InvalidRequest(f"precision {precision!r}: expected {', '.join(DTYPES)}", param="precision")
    if precision == "bf16" and device.type == "cpu" and not _cpu_has_bf16():
        log.warning("this CPU computes bfloat16 in software, about five times slower than fp32")
    return DTYPES[precision]


@cache
def default_dtype(device: torch.device) -> torch.dtype:
    """float32 on a CPU, where half precision is slow; bfloat16 on an accelerator that computes it itself."""
    if device.type == "cpu":
        return torch.float32
    if device.type != "cuda" or not torch.cuda.is_available():  # a run planned for another machine
        return torch.bfloat16
    with torch.cuda.device(device):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        name, half = torch.cuda.get_device_name(), torch.cuda.get_device_capability() >= NO_HALF
    log.warning("%s only emulates bfloat16: computing in %s, unless told otherwise", name, "fp16" if half else "fp32")
    return torch.float16 if half else torch.float32


def multiply_float32(device: torch.device, *, tf32: bool) -> None:
    """Let CUDA multiply float32, in which the trained weights are, in TF32; on any other device nothing changes.

    TF32 rounds factors to 10 bits and adds in float32: several times faster there, as exact as bfloat16 would be or
    better, and never on a CPU, whose runs end bit-equal.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")


@contextmanager
def in_background(device: torch.device) -> Iterator[None]:
    """Have the work of a block done on a stream of its own, which comes behind those of engines; on CUDA alone.

    It begins after what was asked of the device before, and what is asked after it waits for it. What a block makes
    and hands on should be on the host by its end: memory of another stream is not kept for who reads it here.
    """
    if device.type != "cuda":
        yield
        return
    stream, current = _background(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


@cache
def _background(device: torch.device) -> torch.cuda.Stream:
    # Of the lowest priority; an engine's steps have a higher one.
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 itself: AVX-512 BF16, AMX, or their like elsewhere."""
    return any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


def _unusable(device: torch.device) -> str | None:
    """Why attention and its gradient do not work on a device, tried in small; None where they do."""
    try:
        query = torch.randn(1, 1, 4, 8, device=device, dtype=default_dtype(device), requires_grad=True)
        out = nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True).sum()
        (gradient,) = torch.autograd.grad(out, query)
        return None if bool(gradient.isfinite().all()) else "attention has no finite gradient"
    except (RuntimeError, NotImplementedError, AssertionError, TypeError) as error:
        return first_line(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on an accelerator or on a CPU."""
    message = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in message or "can't allocate memory" in message)
    )
