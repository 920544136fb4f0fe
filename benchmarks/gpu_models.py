"""What ``benchmarks.gpu`` runs on: models of 8B shape drawn on the device from a configuration, nothing downloaded.

A dry run has the same parts in small on a CPU.
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from latentwire.bridge import models
from latentwire.bridge.checkpoint import BridgeModel, make_bridge
from latentwire.bridge.config import RANDOM, BridgeConfig, EncoderConfig, Head, Provenance
from latentwire.bridge.models import BUILTIN, FrozenLM, load_model
from latentwire.bridge.prompt import layout_for

LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
QWEN2_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}  # fmt: skip
TINY = {  # weights drawn wider than usual, so that outputs depend on inputs
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 512, "initializer_range": 0.1,
}  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        receiver: Shape of a Llama.
        sender: Shape of a Qwen2.
        exact_layers: Depth of ``exact``, the receiver's shape in float32: answers of rounded weights may differ with
            the batch for no other reason than rounding.
        copied_bytes: Of the copy that measures bandwidth.
        side: Of the square matrices whose product measures what the device can compute.
        rows: Requests that decode at once.
        contexts: Tokens that each has before it decodes.
        soft_tokens: Of them, so many from a latent.
        step_tokens: Most tokens of one step of an engine.
        steps: Tokens that each then generates.
        sources: How many texts are encoded at once, and their tokens.
        beside_rows: Requests that decode beside that.
        beside_seconds: How long they do.
        trained: Rows of a training step.
        lengths: Its source, prompt and answer, in tokens.
    """

    device: str
    dtype: torch.dtype
    receiver: Mapping[str, Any]
    sender: Mapping[str, Any]
    exact_layers: int
    copied_bytes: int
    side: int
    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    soft_tokens: int
    step_tokens: int
    steps: int
    sources: tuple[int, int]
    beside_rows: int
    beside_seconds: float
    trained: tuple[int, ...]
    lengths: tuple[int, int, int]


SCALES = {
    "8B": Scale(
        device="cuda", dtype=torch.bfloat16, receiver=LLAMA_8B, sender=QWEN2_7B, exact_layers=4, copied_bytes=4 << 30,
        side=8192, rows=(1, 32, 128, 256), contexts=(300, 1000), soft_tokens=64, step_tokens=2048, steps=32,
        sources=(32, 512), beside_rows=32, beside_seconds=10.0, trained=(8, 32), lengths=(512, 32, 32),
    ),
    "tiny": Scale(
        device="cpu", dtype=torch.float32, receiver=TINY, sender=TINY, exact_layers=2, copied_bytes=4 << 20,
        side=128, rows=(1, 2, 8), contexts=(24, 40), soft_tokens=8, step_tokens=64, steps=8,
        sources=(2, 16), beside_rows=2, beside_seconds=0.5, trained=(2, 4), lengths=(16, 8, 4),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """Where a part of the benchmark runs: ``folder`` holds the models' configurations, ``until`` is when it should end.

    ``say`` shows what was just measured, ``keep`` records figures so far, in case the part is ended.
    """

    scale: Scale
    folder: Path
    until: float
    say: Callable[[str], None]
    keep: Callable[[dict[str, Any]], None]

    @property
    def device(self) -> torch.device:
        return torch.device(self.scale.device)

    @property
    def is_over(self) -> bool:
        """Whether the part has had its time."""
        return time.monotonic() > self.until

    def name(self, role: str) -> str:
        """What ``load_model`` calls a model."""
        return f"{RANDOM}{self.folder / role}"

    def lm(self, role: str, dtype: torch.dtype | None = None) -> FrozenLM:
        """A model drawn on the device: ``sender``, ``receiver`` or ``exact``."""
        started = time.monotonic()
        lm = load_model(self.name(role), device=self.device, dtype=dtype or self.scale.dtype)
        self.say(f"{role} drawn in {time.monotonic() - started:.1f} s")
        return lm

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def say(part: str) -> Callable[[str], None]:
    """Prints progress lines of a part where they stand in nobody's way."""
    return lambda text: print(f"  [{part}] {text}", file=sys.stderr, flush=True)


def write_configurations(scale: Scale, folder: Path) -> None:
    """Folders of models without weights, with the built-in tokenizers: enough for ``random:`` models."""
    shapes: dict[str, tuple[PreTrainedConfig, str]] = {
        "receiver": (LlamaConfig(**scale.receiver), "llama"),
        "exact": (LlamaConfig(**{**scale.receiver, "num_hidden_layers": scale.exact_layers}), "llama"),
        "sender": (Qwen2Config(**scale.sender), "neox"),
    }
    for role, (config, tokenizer) in shapes.items():
        config.save_pretrained(folder / role)
        copy_tokenizer(tokenizer, folder / role)
        save_file({}, folder / role / "model.safetensors")


def copy_tokenizer(name: str, folder: Path) -> None:
    """Give a model's folder a built-in tokenizer."""
    for file in (BUILTIN / name).glob("tokenizer*.json"):
        shutil.copy(file, folder)


@contextmanager
def drawn_on(device: torch.device) -> Iterator[None]:
    """Have ``random:`` models drawn on the device, in the dtype they compute in, seeded.

    The product draws them in float32 on a CPU, so that they are the same everywhere: minutes for 8B.
    """

    def untrained(config: PreTrainedConfig, dtype: torch.dtype) -> tuple[PreTrainedModel, list[str]]:
        torch.manual_seed(0)
        with device:
            return AutoModelForCausalLM.from_config(config, dtype=dtype), []  # type: ignore[no-untyped-call]

    with patch.object(models, "untrained", untrained):
        yield


def bridge_between(sender: FrozenLM, receiver: FrozenLM, device: torch.device) -> BridgeModel:
    """An untrained bridge of the shape that a run has by default."""
    encoder = EncoderConfig(
        kind="pooling", sender_width=sender.width, latent_dim=min(receiver.width, 512),
        hidden_dim=min(sender.width, 1024), depth=2, ratio=4, num_latents=16,
    )  # fmt: skip
    head = Head(receiver.ref, layout_for(receiver, "{latent}\nQuestion: {question}\nAnswer:"), receiver.embedding_rms())
    layer, source_tokens = round(sender.layers * 2 / 3), min(sender.max_tokens, 8192)
    provenance = Provenance("world", "0" * 64, 0, 1, "benchmark", {})
    torch.manual_seed(0)
    bridge = make_bridge(BridgeConfig(sender.ref, (layer,), source_tokens, encoder, {receiver.name: head}, provenance))
    bridge.encoder.to(device)
    bridge.heads.to(device)
    return bridge
