"""What a run is: every flag of ``latentwire train``, and every key of its TOML file, by the same names."""

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from bridge.config import RANDOM
from bridge.errors import InvalidRequest
from bridge.wire import MAX_SLOTS, MAX_WIDTH


class TrainConfig(BaseModel):
    """Frozen; an unknown key is an error. Field descriptions are the help texts of the flags."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sender: str = Field(description="Model that reads the source: builtin:…, a folder, or a Hub name.")
    receiver: str = Field(description="Model that answers: builtin:…, a folder, or a Hub name.")
    task: str = Field(description="'world' or the path of a task file (.toml).")
    out: Path = Field(description="Folder of the checkpoint, the resumable state and the log.")
    encoder: Literal["pooling", "perceiver", "mean", "linear", "prompt"] = Field(
        "pooling", description="Encoder kind; mean and linear are baselines, prompt is a control without a sender."
    )
    ratio: int = Field(4, ge=1, description="Sender tokens per slot (pooling, linear).")
    num_latents: int = Field(16, ge=1, le=MAX_SLOTS, description="Slots (perceiver, mean, prompt).")
    latent_dim: int | None = Field(
        None,
        ge=1,
        le=MAX_WIDTH,
        description="Width C of the latent that crosses the wire. Default: the receiver's, at most 512.",
    )
    hidden_dim: int | None = Field(
        None,
        ge=32,
        multiple_of=32,
        description="Width inside the encoder. Default: near the sender's, 64 to 1024.",
    )
    depth: int = Field(2, ge=0, description="Transformer blocks over the slots.")
    layer: list[int] | None = Field(None, description="Sender layer to read, from 1; repeat to read several.")
    max_steps: int = Field(1000, ge=1, description="Optimiser steps.")
    batch_size: int = Field(32, ge=1, description="Examples per forward pass.")
    accumulate: int = Field(1, ge=1, description="Forward passes per optimiser step.")
    learning_rate: float = Field(3e-3, gt=0, description="Peak learning rate of vectors (AdamW).")
    matrix_learning_rate: float = Field(0.02, gt=0, description="Peak learning rate of matrices (Muon).")
    warmup_steps: int = Field(20, ge=0, description="Optimiser steps of linear warm-up, before the cosine.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay.")
    clip_norm: float = Field(1.0, gt=0, description="Largest gradient norm over all trained weights.")
    first_token_weight: float = Field(4.0, gt=0, description="Weight of an answer's first token; the others have 1.")
    alignment_steps: int | None = Field(
        None,
        ge=0,
        description="First steps, in which soft tokens learn the words they cover. Default: a third (pooling, linear).",
    )
    alignment_weight: float = Field(0.0, ge=0, description="Weight of that objective after the first steps.")
    reconstruction_weight: float = Field(1.0, ge=0, description="Weight of repeating the source; 0 turns it off.")
    max_source_tokens: int = Field(512, ge=1, description="Longest source in sender tokens; longer ones are cut.")
    save_every: int = Field(200, ge=1, description="Optimiser steps between saves.")
    seed: int = Field(0, ge=0, lt=1 << 63, description="Seed of the initial weights and of the data order.")

    @field_validator("layer", mode="before")
    @classmethod
    def _one_or_several(cls, layer: Any) -> Any:
        return [layer] if type(layer) is int else layer

    @field_validator("sender", "receiver", "task")
    @classmethod
    def _found_from_anywhere(cls, name: str) -> str:
        return name if name == "world" else _absolute(name)


def _absolute(name: str) -> str:
    """A local path made independent of the working directory; any other name as it is."""
    prefix, rest = (RANDOM, name.removeprefix(RANDOM)) if name.startswith(RANDOM) else ("", name)
    return prefix + (str(Path(rest).resolve()) if Path(rest).exists() else rest)


def demo_config(out: Path, max_steps: int | None = None) -> TrainConfig:
    """The run of ``latentwire demo``: the built-in pair, in minutes on two cores.

    Without the second objective, whose long answers double the time of a step: 0.83 against 0.59 exact match after
    the same three minutes. A longer run is better with it.
    """
    pair = {"sender": "builtin:neox", "receiver": "builtin:llama", "task": "world"}
    steps = max_steps or 440
    quick = {"alignment_steps": steps * 2 // 5, "reconstruction_weight": 0.0}
    return TrainConfig.model_validate({**pair, "out": out, "max_steps": steps, **quick})


def read_config(file: Path | None, flags: dict[str, Any]) -> TrainConfig:
    """A configuration from a TOML file, with flags (those not None) over it.

    Raises:
        InvalidRequest: The file is no TOML, or a key is missing, unknown or of the wrong type; it is named.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = tomllib.loads(file.read_text())
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"--config {file}: {error}", param="config") from None
    values |= {name: value for name, value in flags.items() if value is not None}
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        got = "" if first["type"] == "missing" else f", got {first['input']!r}"
        raise InvalidRequest(f"{name}: {first['msg']}{got}", param=name) from None
