"""Read a model's weights, whatever their dtype on disk, and tell beforehand how many bytes they will take."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from latentwire.bridge.errors import ModelUnavailable
from latentwire.bridge.quantised import dequantised, dequantising, method_of, refuse_unnamed


def bytes_of(name: str, config: PreTrainedConfig, files: Sequence[Path], dtype: torch.dtype) -> int:
    """Bytes of weights in ``dtype``: by their headers, or if packed, the model's shapes (ModelUnavailable: damaged)."""
    if method_of(config) is not None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(dequantised(config))  # type: ignore[no-untyped-call]
        return sum(int(weights.numel()) for weights in model.parameters()) * dtype.itemsize
    total = 0
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                pieces = {key: file.get_slice(key) for key in file.keys()}
        except SafetensorError as error:
            raise ModelUnavailable(f"model {name!r} cannot be loaded: {path.name}: {error}") from None
        refuse_unnamed(name, {key: piece.get_dtype() for key, piece in pieces.items()})
        total += sum(math.prod(piece.get_shape()) for piece in pieces.values())
    return total * dtype.itemsize


def pretrained(
    config: PreTrainedConfig, folder: Path, dtype: torch.dtype, device: torch.device, device_map: str | None
) -> tuple[PreTrainedModel, list[str]]:
    """A model, and the weights its files lack, which the library would fill with random numbers.

    For an accelerator weights are read straight onto it, and never stand in the machine's memory as a whole. Packed
    ones are unpacked on the CPU first: on the accelerator both forms would need room at once.
    """
    packed = method_of(config) is not None
    straight = None if packed or device.type == "cpu" else {"": device}
    fixed = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, config=dequantising(config), dtype=dtype, device_map=device_map or straight, **fixed
    )
    model, info = loaded
    return _in(dtype, model) if packed else model, sorted(info["missing_keys"])


def embedding_alone(
    config: PreTrainedConfig, folder: Path, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """A model without its layers and its output matrix: it embeds ids as the whole one does, scale and all."""
    bare = copy.deepcopy(dequantised(config))
    text = bare.get_text_config()
    text.num_hidden_layers = 0
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = []
    made: Any = AutoModel._model_mapping[type(bare)]
    without_layers: Any = type(made.__name__, (made,), {"_keys_to_ignore_on_load_unexpected": [""]})  # silently
    fixed = {"use_safetensors": True, "output_loading_info": True}
    model, info = without_layers.from_pretrained(folder, config=bare, dtype=dtype, **fixed)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"its weights lack {missing[0]}")
    return cast(PreTrainedModel, model.to(device).eval().requires_grad_(False))


def untrained(config: PreTrainedConfig, dtype: torch.dtype) -> tuple[PreTrainedModel, list[str]]:
    """A model of the same shape, drawn in float32 so that it is the same one in every dtype."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(dequantised(config), dtype=torch.float32)  # type: ignore[no-untyped-call]
    return _in(dtype, model), []


def _in(dtype: torch.dtype, model: PreTrainedModel) -> PreTrainedModel:
    """A model with its weights in ``dtype``. Its buffers stay: rotary frequencies of bfloat16 are another model's."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
