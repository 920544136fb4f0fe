"""What a run takes over from a checkpoint: the one that it extends (``--bridge``), or begins with (``--init``)."""

import os
from collections.abc import Sequence

import torch

from latentwire.bridge.checkpoint import BridgeModel, load_bridge, make_bridge, read_manifest
from latentwire.bridge.config import BridgeConfig, LoraShape, Provenance
from latentwire.bridge.errors import InvalidRequest, first_line
from latentwire.bridge.lora import lora_shape
from latentwire.bridge.models import FrozenLM, stack_of
from latentwire.training.config import TrainConfig

OF_HEADS = ("template", "system", "gain", "head_dim")  # settings of a run that its heads are made by
NOTHING: tuple[object, ...] = (None, "", [])  # what a setting has that is left to the checkpoint


def completed(config: TrainConfig) -> TrainConfig:
    """The configuration with what the launcher and an extended checkpoint decide.

    Raises:
        InvalidRequest: A setting asks for another shape than the checkpoint has; it is named.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        config = config.model_copy(update={"fsdp": True})
    given = config.bridge or config.init
    if given is None:
        return config
    base = read_manifest(given).bridge
    if config.add_receiver in base.heads:
        raise InvalidRequest(f"{config.bridge} already has a head for {config.add_receiver!r}", param="add_receiver")
    encoder = base.encoder
    decided = {name: getattr(encoder, name) for name in ("ratio", "num_latents", "latent_dim", "hidden_dim", "depth")}
    decided |= {"encoder": encoder.kind, "sender": config.sender or base.sender.name, "layer": list(base.layers)}
    decided["layer_mix"] = encoder.mixed_layers > 1
    decided["sender_lora"] = encoder.lora.rank if encoder.lora else 0
    if config.bridge is not None:
        decided["max_source_tokens"] = base.max_source_tokens
    else:
        known = set(config.receiver) <= base.heads.keys()
        kept = ("max_source_tokens", *OF_HEADS) if known else ("max_source_tokens",)
        recipe = base.provenance.recipe
        decided |= {name: recipe[name] for name in kept if name in recipe and name not in config.model_fields_set}
        if decided.get("template", config.template) != "chat":
            decided.pop("system", None)
        if not config.receiver:
            decided["receiver"] = list(base.heads)
    asked = config.model_dump(include=config.model_fields_set & decided.keys())
    for name, value in asked.items():
        if value not in NOTHING and value != decided[name]:
            message = (
                f"{name} {value!r}: the bridge at {given} has {decided[name]!r}, which a run with its weights keeps"
            )
            raise InvalidRequest(message, param=name)
    return config.model_copy(update=decided)


def adapted(config: TrainConfig, sender: FrozenLM, layers: Sequence[int]) -> LoraShape | None:
    """The LoRA that a run asks for (InvalidRequest: nothing that it could adapt)."""
    if config.sender_lora and config.encoder == "prompt":
        message = f"--sender-lora {config.sender_lora}: the encoder 'prompt' never sees the sender"
        raise InvalidRequest(message, param="sender_lora")
    if config.sender_lora > sender.width:
        message = f"--sender-lora {config.sender_lora}: {sender.name!r} is {sender.width} wide; expected a smaller rank"
        raise InvalidRequest(message, param="sender_lora")
    shape = lora_shape(stack_of(sender), config.sender_lora, max(layers))
    if config.sender_lora and shape is None:
        message = f"--sender-lora {config.sender_lora}: {sender.name!r} has no linear layer below layer {max(layers)}"
        raise InvalidRequest(message, param="sender_lora")
    return shape


def check_adapted(config: TrainConfig) -> None:
    """Refuse, beside LoRA on the sender, what could not follow it (InvalidRequest)."""
    for flag, on, why in (
        ("--cache-features", config.cache_features, "keeps the states of the sender as it is"),
        ("--fsdp", config.fsdp, "spreads the sender's layers over processes"),
    ):
        if on and config.sender_lora:
            message = f"{flag} {why}, and this bridge reads it with LoRA of rank {config.sender_lora} (--sender-lora)"
            raise InvalidRequest(message, param="sender_lora")


def earlier_runs(config: TrainConfig) -> tuple[Provenance, ...]:
    """The runs whose weights this one begins with, the last one last."""
    if config.init is None:
        return ()
    base = read_manifest(config.init).bridge
    return (*base.earlier, base.provenance)


def bridge_of(config: TrainConfig, described: BridgeConfig) -> BridgeModel:
    """A fresh bridge; one that begins with another's weights; or the extended one, frozen but for its new head.

    Raises:
        InvalidRequest: A head of the checkpoint is of another shape.
    """
    fresh, given = make_bridge(described), config.bridge or config.init
    if given is None:
        return fresh
    _, base = load_bridge(given, device=torch.device("cpu"))
    heads = [(fresh.head(name), base.head(name)) for name in base.config.heads if name in fresh.config.heads]
    for module, trained in ((fresh.encoder, base.encoder), *heads):
        try:
            module.load_state_dict(trained.state_dict())
        except RuntimeError as error:
            raise InvalidRequest(f"--init {given}: its head is of another shape ({first_line(error)})") from None
        if config.bridge is not None:
            module.requires_grad_(False)
    return fresh
