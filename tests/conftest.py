"""Real parts, made small: tiny models of several families, a bridge between two of them, the built-in pair."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: a second thread costs more than it brings

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging as transformers_logging

from latentwire.bridge.checkpoint import make_bridge, save_bridge
from latentwire.bridge.config import BridgeConfig, EncoderConfig, Head, Provenance
from latentwire.bridge.models import FrozenLM, load_model
from latentwire.bridge.prompt import layout_for

transformers_logging.disable_progress_bar()
torch.set_num_threads(1)

TEMPLATE = "{latent}\nQuestion: {question}\nAnswer:"
SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256}
GATED = {**SHAPE, "num_key_value_heads": 2, "intermediate_size": 48}
FAMILIES: dict[str, Callable[[int], PreTrainedModel]] = {
    "llama": lambda v: LlamaForCausalLM(LlamaConfig(vocab_size=v, **GATED)),
    "qwen": lambda v: Qwen3ForCausalLM(Qwen3Config(vocab_size=v, head_dim=8, **GATED)),
    "mistral": lambda v: MistralForCausalLM(MistralConfig(vocab_size=v, sliding_window=16, **GATED)),
    "neox": lambda v: GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=v, intermediate_size=64, **SHAPE)),
    "gpt2": lambda v: GPT2LMHeadModel(GPT2Config(vocab_size=v, n_embd=32, n_layer=3, n_head=4, n_positions=256)),
}
SPECIAL = ["<s>", "</s>", "<pad>"]


def byte_tokenizer(*, bos: bool = True, pad: str = "<pad>") -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes: any text round-trips, and nobody has to train it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    begin = {"bos_token": "<s>"} if bos else {}
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token=pad, **begin)


def write_model(folder: Path, family: str, *, seed: int = 0, bos: bool = True, pad: str = "<pad>") -> Path:
    """A random model of ``family`` and a byte tokenizer, as an ordinary Hugging Face folder.

    Weights are drawn five times wider than usual, so that outputs depend on inputs as in a trained model.
    """
    tokenizer = byte_tokenizer(bos=bos, pad=pad)
    torch.manual_seed(seed)
    model = FAMILIES[family](len(tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Coroutine tests run on asyncio, as the service does."""
    return "asyncio"


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each family."""
    root = tmp_path_factory.mktemp("models")
    return {family: write_model(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="session")
def lms(model_folders: dict[str, Path]) -> dict[str, FrozenLM]:
    """Every family, loaded."""
    return {family: load_model(str(folder)) for family, folder in model_folders.items()}


@pytest.fixture(scope="session", params=list(FAMILIES))
def lm(request: pytest.FixtureRequest, lms: dict[str, FrozenLM]) -> FrozenLM:
    """One family after the other."""
    return lms[request.param]


def bridge_config(
    sender: FrozenLM, receiver: FrozenLM, *, chat: bool = False, system: str | None = None, **encoder: object
) -> BridgeConfig:
    """A small pooling bridge between two models; ``encoder`` changes its shape."""
    layout = layout_for(receiver, TEMPLATE, chat=chat, system=system)
    shape = {
        "kind": "pooling", "sender_width": sender.width, "latent_dim": 16, "hidden_dim": 32, "depth": 1,
        "ratio": 4, "num_latents": 6, **encoder,
    }  # fmt: skip
    return BridgeConfig(
        sender=sender.ref,
        layers=(2,),
        max_source_tokens=128,
        encoder=EncoderConfig(**shape),  # type: ignore[arg-type]
        heads={receiver.name: Head(receiver.ref, layout, receiver.embedding_rms())},
        provenance=Provenance("world", "0" * 64, 0, 1, "test", {}),
        source=sender.source_layout,
    )


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, lms: dict[str, FrozenLM]) -> Path:
    """An untrained bridge from the tiny NeoX to the tiny Llama: right in all but what it says. Do not edit."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    torch.manual_seed(1)
    save_bridge(folder, make_bridge(bridge_config(lms["neox"], lms["llama"])))
    return folder
