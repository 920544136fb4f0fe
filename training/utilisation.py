"""How much of a device a step uses: the arithmetic that its models need, over its seconds and the device's peak.

The count is of the models and not of the code: padding, recomputed blocks and what runs twice are left out, so that
only a faster step raises it. A weight multiplies a token in 2 operations forwards; the gradient of its input takes 2
more, and its own gradient another 2. Frozen models need no gradients of weights:

    sender     2 × weights of the blocks up to the layer read × tokens (4 × where LoRA on it is trained, 0 from a cache)
    receiver   4 × (weights of the blocks × tokens + weights of the output layer × answer tokens); 2 × without gradient
    bridge     6 × weights of the encoder and the head × slots

Attention's products of tokens with tokens are left out (12 × layers × width × length for each token, a few percent at
500 tokens), and all experts of a mixture count, although few work on a token.

Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B, for models of which a part is trained.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from latentwire.bridge.models import FrozenLM, blocks_of
from latentwire.bridge.prompt import IGNORE, Row

# Dense bfloat16 (of older ones float16) TFLOP/s, from the makers' data sheets; the first name that is found counts.
PEAKS = {
    "B200": 2250.0, "H200": 989.4, "GH200": 989.4, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.4, "A100": 312.0,
    "L40S": 362.0, "L4": 121.0, "A10G": 70.0, "A10": 125.0, "RTX 4090": 165.2, "RTX 3090": 71.0, "V100": 125.0,
    "T4": 65.0, "MI300X": 1307.4, "MI250X": 383.0,
}  # fmt: skip


def sender_flops(lm: FrozenLM, tokens: int, layers: Sequence[int], *, trained: bool) -> int:
    """Of reading so many tokens up to the highest of ``layers``; ``trained`` where LoRA on it is."""
    return (4 if trained else 2) * _weights(*blocks_of(lm)[: max(layers)]) * tokens


def receiver_flops(lm: FrozenLM, rows: Sequence[Row], *, gradient: bool) -> int:
    """Of reading rows and saying their answers, with or without the gradient of the soft tokens."""
    tokens, said = sum(map(len, rows)), sum(len(row.labels) - row.labels.count(IGNORE) for row in rows)
    output = cast(Any, lm.model).get_output_embeddings()
    weights = _weights(*blocks_of(lm)) * tokens + (0 if output is None else _weights(output) * said)
    return (4 if gradient else 2) * weights


def bridge_flops(modules: Sequence[nn.Module], slots: int) -> int:
    """Of making so many slots, with all gradients."""
    return 6 * _weights(*modules) * slots


def _weights(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def peak_flops(device: torch.device) -> float | None:
    """Most operations a second that a device's maker states for dense bfloat16; None for a CPU or an unknown GPU."""
    return None if device.type != "cuda" else peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """The same by the device's name."""
    return next((1e12 * peak for known, peak in PEAKS.items() if known in name), None)
