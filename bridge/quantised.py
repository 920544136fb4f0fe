"""Checkpoints whose weights are packed into fewer bits: which are read, and how.

What is read is dequantised into the dtype the model computes in: every layer is then an ordinary one, with gradients
for training and the same answer in every batch. Packed ones may lack both: a 4-bit layer of bitsandbytes gives wrong
gradients once it has run without them on a CPU, an 8-bit one decides by the whole batch which columns stay in half.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedConfig

from latentwire.bridge.errors import ModelUnavailable

PACKED = ("F8", "F6", "F4")  # dtypes of safetensors
UNPACKED = "save it unquantised (where its library runs: model.dequantize(), then save_pretrained)"
READ = {"fp8": None, "mxfp4": None, "compressed-tensors": "compressed_tensors"}
"""Each ``quant_method`` that transformers unpacks while it reads, with the package it needs; others are refused."""


def method_of(config: PreTrainedConfig) -> str | None:
    """How a checkpoint's weights are packed, as it says itself; None where they are not."""
    parts = (config, config.get_text_config())
    found = next((f for part in parts if (f := getattr(part, "quantization_config", None)) is not None), None)
    return None if found is None else str(dict(found).get("quant_method") or "an unnamed method")


def check_quantisation(name: str, config: PreTrainedConfig) -> None:
    """Refuse weights that would be read wrongly or not at all (ModelUnavailable: the method, and what can be done)."""
    method = method_of(config)
    if method is None:
        return
    if method not in READ:
        raise ModelUnavailable(
            f"model {name!r} is quantised with {method}, which is not read here: {UNPACKED}, "
            f"or take one that is unquantised or quantised with {', '.join(READ)}"
        )
    package = READ[method]
    if package is not None and find_spec(package) is None:
        raise ModelUnavailable(
            f"model {name!r} is quantised with {method}, which needs a package that is not installed: "
            f"pip install {package.replace('_', '-')}, or {UNPACKED}"
        )


def dequantising(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration that tells transformers to unpack the weights while it reads them."""
    for part in (config, config.get_text_config()):
        if (found := getattr(part, "quantization_config", None)) is not None:
            part.quantization_config = {**found, "dequantize": True}
    return config


def dequantised(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the same model with ordinary weights."""
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def refuse_unnamed(name: str, dtypes: Mapping[str, str]) -> None:
    """Refuse weights of 8 bits and fewer without a named method, which would apply their scales (ModelUnavailable)."""
    if packed := [key for key, dtype in dtypes.items() if dtype.startswith(PACKED)]:
        raise ModelUnavailable(
            f"model {name!r} holds {packed[0]} in {dtypes[packed[0]]}, and its config.json names no quantisation: "
            "expected weights of 16 or 32 bits, or a quantization_config"
        )


def refuse_gguf(place: Path) -> None:
    """Refuse a GGUF file, or a folder that holds one (ModelUnavailable, with what to do about it)."""
    files = [place] if place.is_file() else sorted(place.iterdir())
    if packed := [file for file in files if file.suffix == ".gguf"]:
        folder, file = str(packed[0].parent), packed[0].name
        raise ModelUnavailable(
            f"{str(packed[0])!r} is a GGUF file, which is not read here; convert it once, with transformers and the "
            f"package gguf: read = AutoModelForCausalLM.from_pretrained({folder!r}, gguf_file={file!r}), put "
            "read.state_dict() into a fresh from_config model, and save_pretrained that and the tokenizer"
        )
