"""Where models compute, and in what, unless told."""

import logging
from functools import cache

import torch
from torch import nn

from bridge.errors import first_line

log = logging.getLogger(__name__)


def default_dtype(device: torch.device) -> torch.dtype:
    """float32 on a CPU, where half precision is slow; bfloat16 on an accelerator."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


@cache
def default_device() -> torch.device:
    """The accelerator where there is one; Apple's only if it computes what we need."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device.type == "mps" and (why := _unusable(device)):
        log.warning("MPS cannot be used (%s): computing on the CPU", why)
        return torch.device("cpu")
    return device


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
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in said or "can't allocate memory" in said)
    )
