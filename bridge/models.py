"""Load a frozen language model, know exactly which one it is, and read its hidden states.

Dimensions used in this file:
    B batch    S sender tokens    D model width    ND widths of all layers read, side by side
"""

import hashlib
import json
import re
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from latentwire.bridge.config import RANDOM, Fingerprint, ModelRef
from latentwire.bridge.devices import default_device, default_dtype
from latentwire.bridge.errors import IncompatibleBridge, ModelUnavailable, first_line
from latentwire.bridge.families import Role, check_usable
from latentwire.bridge.loading import bytes_of, pretrained, untrained
from latentwire.bridge.lora import Lora
from latentwire.bridge.quantised import refuse_gguf
from latentwire.bridge.reader import Reader, SourceTokens, end_ids_of

BUILTIN = Path(__file__).parent / "builtin"
LARGE_BYTES = 1 << 30  # a model whose loading deserves a progress bar
# Of a model, and of a bridge: never pickles, never code, no weights twice.
WANTED_FILES = [
    "*.json", "*.jinja", "model*.safetensors", "*.model", "*.txt", "encoder-*.safetensors", "head-*.safetensors",
    "codebooks.safetensors",
]  # fmt: skip
TOKENIZER_FILES = re.compile(r"(tokenizer|special_tokens|added_tokens|vocab|merges).*\.(json|txt)|.*\.model")
SHA256 = re.compile(r"[0-9a-f]{64}")  # other files of the Hub are named by git, with 40 digits
CHUNK_ROWS = 8192  # vocabulary rows measured at once
VOLATILE_CONFIG = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}


@dataclass(frozen=True)
class FrozenLM(Reader):
    """A causal language model that will not be trained, with its tokenizer and identity."""

    model: PreTrainedModel
    fingerprint: Fingerprint

    @property
    def rows(self) -> int:
        """Rows of the input embedding, counted."""
        return len(self._embedding.weight)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def _embedding(self) -> nn.Embedding:
        return cast(nn.Embedding, self.model.get_input_embeddings())

    @property
    def width(self) -> int:
        return int(self._embedding.weight.shape[1])

    def state_width(self, layer: int) -> int:
        """Width of the hidden states at ``layer``; a few families embed narrower than they think."""
        return int(self.model.config.get_text_config().hidden_size) if layer else self.width

    @property
    def layers(self) -> int:
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def ref(self) -> ModelRef:
        return ModelRef(self.name, self.fingerprint, self.width, self.layers)

    def embed(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
        """The model's own input embedding of ``ids``."""
        return cast(Tensor, self._embedding(ids))

    def embedding_rms(self) -> float:
        """Root mean square of the input embeddings, averaged over the vocabulary (unitless).

        Measured through ``embed``, which some families scale: they differ 100×, and soft tokens must arrive like them.
        """
        every = torch.arange(self.rows, device=self.device)
        chunks = (self.embed(ids).detach().float().pow(2).mean(dim=1).sqrt() for ids in torch.split(every, CHUNK_ROWS))
        return sum(float(rms.sum()) for rms in chunks) / len(every)

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of key/value cache this model holds for ``tokens`` tokens, in its own dtype; 0 without attention."""
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
        if not heads:
            return 0
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * self.layers * heads * head_dim * tokens * self.model.dtype.itemsize)


def folder_of(name: str) -> Path:
    """Where the files of ``builtin:…``, a folder or a Hub name are, once fetched (ModelUnavailable: none, or GGUF)."""
    if name.startswith("builtin:"):
        folder = BUILTIN / name.removeprefix("builtin:")
        if not (folder / "config.json").is_file():
            known = ", ".join(f"builtin:{p.parent.name}" for p in sorted(BUILTIN.glob("*/tokenizer.json")))
            raise ModelUnavailable(f"no built-in model is called {name!r}; there are {known}")
        return folder
    folder = Path(name)
    if folder.is_file() or (folder.is_dir() and not any(folder.glob("*.safetensors"))):
        refuse_gguf(folder)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelUnavailable(f"the folder {name!r} holds no config.json; expected a Hugging Face model folder")
        return folder
    return hub_folder(name)


def revision_of(name: str) -> tuple[str, str | None]:
    """A Hub name as repository and revision; None for its main branch."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


@cache
def hub_folder(name: str) -> Path:
    """``org/model``, or ``org/model@revision``; asked once a process, so that no fingerprint is older than the load."""
    repository, revision = revision_of(name)
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=WANTED_FILES))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelUnavailable(
            f"model {name!r} is neither builtin:…, a folder, nor a reachable Hub name ({first_line(error)})"
        ) from error


def fingerprint_of(name: str) -> Fingerprint:
    """Identity of a model from its files alone (ModelUnavailable as ``folder_of``, or where they are damaged)."""
    folder = folder_of(name.removeprefix(RANDOM))
    try:
        document = dict(json.loads((folder / "config.json").read_bytes()))
    except (ValueError, TypeError) as error:
        raise ModelUnavailable(f"model {name!r} cannot be loaded: its config.json is damaged ({error})") from None
    config = {k: v for k, v in document.items() if k not in VOLATILE_CONFIG}
    tokenizer_files = sorted(p for p in folder.iterdir() if TOKENIZER_FILES.fullmatch(p.name))
    weights = _weight_files(name)
    return Fingerprint(
        config=hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16],
        weights="random".ljust(16, "0") if name.startswith(RANDOM) else _digest(weights),
        tokenizer=_digest(tokenizer_files),
    )


def _weight_files(name: str) -> list[Path]:
    """The files the library would read: one, or the shards of an index; a repository may hold others."""
    folder = folder_of(name.removeprefix(RANDOM))
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ModelUnavailable(f"model {name!r} has no model.safetensors in {folder}; pickled weights are not read")
    try:
        files = [folder / file for file in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelUnavailable(f"model {name!r} cannot be loaded: {index.name} is damaged ({error})") from None
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelUnavailable(f"model {name!r} cannot be loaded: {missing[0]} is missing from {folder}")
    return files


def _digest(files: Sequence[Path]) -> str:
    parts = "".join(_file_sha256(p.resolve(), p.stat().st_size, p.stat().st_mtime_ns) for p in files)
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


@lru_cache(maxsize=256)
def _file_sha256(path: Path, size: int, mtime_ns: int) -> str:
    """The SHA-256 of a file. The Hub's cache names large files by it: two models of 8 B would take half a minute."""
    if path.parent.name == "blobs" and path.parent.parent.name.startswith("models--") and SHA256.fullmatch(path.name):
        return path.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def config_of(name: str) -> PreTrainedConfig:
    """What a model's files say of it (ModelUnavailable as ``folder_of``, or it is no language model's)."""
    folder = folder_of(name.removeprefix(RANDOM))
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a damaged file surfaces as whatever the library trips over
        raise ModelUnavailable(f"model {name!r} cannot be loaded: {first_line(error)}") from None
    return config


def check_role(name: str, role: Role) -> None:
    """Refuse a model before any weight is read: it is not there, or could not play its part (ModelUnavailable)."""
    check_usable(name, config_of(name), role)


def predicted_bytes(name: str, dtype: torch.dtype) -> int:
    """``bytes_of`` a model's weights, which are not read (ModelUnavailable also as ``folder_of``, ``check_usable``)."""
    config = config_of(name)
    check_usable(name, config)
    return bytes_of(name, config, _weight_files(name), dtype)


def pass_bytes(name: str, tokens: int, dtype: torch.dtype) -> int:
    """About what a pass over so many tokens takes beside the weights: states, and what is widest within a block.

    Source: ours; of 8,192 tokens in float32 on a CPU, two Llamas and a GPT-NeoX took 71 to 97 % of it (measured).
    """
    config: Any = config_of(name).get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size  # of a few families: for each layer
    widest = max(inner) if isinstance(inner, list | tuple) else inner
    return int(tokens * (10 * config.hidden_size + 4 * widest) * dtype.itemsize)


def load_model(
    name: str, *, device: torch.device | None = None, dtype: torch.dtype | None = None, device_map: str | None = None
) -> FrozenLM:
    """Load a frozen model: evaluation mode, no gradients, safetensors only, never remote code.

    Args:
        name: ``builtin:llama``, a local folder, a Hub name (``org/model@revision`` for one revision of it), or one of
            these behind ``random:`` for a model of the same shape with untrained weights (seeded: it has one identity).
        device: Default: the accelerator where there is one.
        dtype: Default: ``default_dtype(device)``.
        device_map: ``auto`` spreads a model that one accelerator cannot hold over all of them.

    Raises:
        ModelUnavailable: Not found, not a causal language model, not usable, or its files are damaged.
    """
    device = device or default_device()
    dtype = dtype or default_dtype(device)
    config = config_of(name)
    check_usable(name, config)
    fingerprint, folder = fingerprint_of(name), folder_of(name.removeprefix(RANDOM))
    shown = predicted_bytes(name, dtype) >= LARGE_BYTES and sys.stderr.isatty()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()  # type: ignore[no-untyped-call]
    reader = load_reader(name)
    try:
        random = name.startswith(RANDOM)
        model, holes = untrained(config, dtype) if random else pretrained(config, folder, dtype, device, device_map)
    except Exception as error:  # a damaged file surfaces as whatever the library trips over
        raise ModelUnavailable(f"model {name!r} cannot be loaded: {first_line(error)}") from None
    if holes:
        raise ModelUnavailable(f"model {name!r} cannot be loaded: its weights lack {holes[0]}")
    model = (model if device_map else cast(Any, model).to(device)).eval().requires_grad_(False)
    if (head := model.get_output_embeddings()) is not None:
        # States of the last columns only, copied: torch would copy the output matrix instead, once for each row.
        head.register_forward_pre_hook(lambda _, states: (states[0].contiguous(), *states[1:]))
    # Its own defaults (penalties, sampling) would change every answer.
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    lm = FrozenLM(name, reader.tokenizer, model.config, reader.end_ids, model, fingerprint)
    if lm.rows != reader.rows:
        raise ModelUnavailable(
            f"model {name!r} cannot be used: its embedding has {lm.rows} rows, its config.json says {reader.rows}"
        )
    return lm


def load_reader(name: str) -> Reader:
    """The tokenizer of a model without its weights, which may come and go (ModelUnavailable as ``load_model``)."""
    folder, config = folder_of(name.removeprefix(RANDOM)), config_of(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        settings: Any = config.get_text_config()
        if (folder / "generation_config.json").is_file():  # where instruct models name every token that ends a turn
            settings = GenerationConfig.from_pretrained(folder)
    except Exception as error:
        raise ModelUnavailable(f"model {name!r} cannot be loaded: {first_line(error)}") from None
    return Reader(name, tokenizer, config, end_ids_of(tokenizer, getattr(settings, "eos_token_id", None)))


def pad_sources(
    lm: FrozenLM, sources: Sequence[SourceTokens], *, multiple: int = 1
) -> tuple[Int[Tensor, "B S"], Bool[Tensor, "B S"]]:
    """Ids and mask (True at real tokens) of a batch, right-padded to a multiple, on the sender's device."""
    ids = pad_sequence([torch.tensor(source.ids, dtype=torch.long) for source in sources], batch_first=True)
    ids = F.pad(ids, (0, -ids.shape[1] % multiple))
    lengths = torch.tensor([len(source.ids) for source in sources])
    return ids.to(lm.device), (torch.arange(ids.shape[1]) < lengths[:, None]).to(lm.device)


class _Reached(Exception):
    """The last layer wanted has run: the rest of the forward pass is not needed."""


def hidden_states(
    lm: FrozenLM, ids: Int[Tensor, "B S"], mask: Bool[Tensor, "B S"], layers: Sequence[int], lora: Lora | None = None
) -> Float[Tensor, "B S ND"]:
    """Outputs of the given blocks, side by side, for any decoder family.

    Runs without a key/value cache and stops at the highest layer: what lies above costs nothing. Position ids
    are explicit, so padding on either side changes no real row.

    Args:
        lm: The sender.
        ids: Token ids; anything at padding.
        mask: True at real tokens.
        layers: Blocks counted from 1 (0 is the embedding); a block's raw output, without the final norm.
        lora: Added to this pass alone. Gradients are kept for it, and without it for nothing.

    Raises:
        IncompatibleBridge: A layer the model does not have.

    Source: ours; stopping by a forward hook works where truncating the module list would touch the model.
    """
    for layer in layers:
        if not 0 <= layer <= lm.layers:
            raise IncompatibleBridge(f"layer {layer} was asked for; {lm.name!r} has 0 to {lm.layers}")
    found: dict[int, Tensor] = {}
    mine = threading.get_ident()

    def keep(layer: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if threading.get_ident() != mine:
                return  # another thread's pass of the same model
            found[layer] = output[0] if isinstance(output, tuple) else output
            if layer == max(layers):
                raise _Reached

        return hook

    modules = [lm.model.get_input_embeddings(), *blocks_of(lm)]
    # A row of padding only (an empty slot of a batch) still needs one position to attend to.
    seen = mask | ((~mask).all(dim=1, keepdim=True) & (torch.arange(mask.shape[1], device=mask.device) == 0))
    with ExitStack() as hooks, torch.set_grad_enabled(lora is not None and torch.is_grad_enabled()), suppress(_Reached):
        if lora is not None:
            hooks.enter_context(lora.applied(stack_of(lm)))
        for layer in set(layers):
            hooks.callback(modules[layer].register_forward_hook(keep(layer)).remove)
        lm.model.base_model(
            input_ids=ids,
            attention_mask=seen.long(),
            position_ids=(seen.long().cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
        )
    return torch.cat([found[layer] for layer in layers], dim=-1)


def blocks_of(lm: FrozenLM) -> list[nn.Module]:
    """The decoder blocks, whatever the family calls them."""
    return list(stack_of(lm))


def stack_of(lm: FrozenLM) -> nn.ModuleList:
    """The list of blocks itself: the one as long as the model is deep, in the part of it that reads text."""
    for module in cast(Any, lm.model).get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == lm.layers:
            return module
    raise ModelUnavailable(f"{lm.name!r} shows no list of {lm.layers} decoder blocks")
