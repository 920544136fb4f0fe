"""What a run is: every flag of ``latentwire train``, and every key of its TOML file, by the same names.

Importing this module needs no torch: the command line makes its flags from it.
"""

import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator, model_validator

from latentwire.bridge.config import DEVICE, RANDOM, Precision
from latentwire.bridge.errors import InvalidRequest, one_of
from latentwire.bridge.evaluation.metrics import METRICS
from latentwire.bridge.wire import MAX_SLOTS, MAX_WIDTH

CACHE = Path("~/.cache/latentwire")


def _panel(title: str) -> Callable[..., Any]:
    """pydantic's ``Field`` for what stands in one panel of ``--help``. A field of no panel is refused as a flag."""
    return partial(Field, json_schema_extra={"panel": title})


MODELS = _panel("Models and task")
BRIDGE = _panel("Bridge")
STEPS = _panel("Optimisation")
OBJECTIVES = _panel("Objectives")
DATA = _panel("Data")
MACHINE = _panel("Machine and memory")
WATCHING = _panel("Saving and watching")


class TrainConfig(BaseModel):
    """Frozen; an unknown key is an error. Field descriptions are the help texts of the flags.

    What holds where a field is not given stands last in its description, in brackets, unless its default says it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sender: str = MODELS("", description="Model that reads the source: builtin:…, a folder, or a Hub name.")
    receiver: list[str] = MODELS([], description="Model that answers, named the same way; repeat for several.")
    task: str = MODELS(description="'world' or the path of a task file (.toml).")
    out: Path = MODELS(description="Folder of the checkpoint, the resumable state and the logs.")
    add_receiver: str | None = MODELS(
        None,
        description="Model that gets a head on the frozen encoder of --bridge; nothing else is trained.",
    )
    bridge: str | None = MODELS(None, description="Checkpoint that --add-receiver extends.")
    template: Literal["plain", "chat"] = MODELS(
        "plain", description="chat: ask in the receiver's own chat template, the latent inside the user's turn."
    )
    system: str | None = MODELS(None, description="System message of the chat template. [what the template has]")

    encoder: str = BRIDGE(
        "pooling", description="Encoder kind; mean and linear are baselines, prompt is a control without a sender."
    )
    ratio: int = BRIDGE(4, ge=1, description="Sender tokens per slot (pooling, linear).")
    num_latents: int = BRIDGE(16, ge=1, le=MAX_SLOTS, description="Slots (perceiver, mean, prompt).")
    latent_dim: int | None = BRIDGE(
        None,
        ge=1,
        le=MAX_WIDTH,
        description="Width C of the latent that crosses the wire. [the receiver's, at most 512]",
    )
    hidden_dim: int | None = BRIDGE(
        None, ge=32, multiple_of=32, description="Width inside the encoder. [near the sender's, 64 to 1024]"
    )
    depth: int = BRIDGE(2, ge=0, description="Transformer blocks over the slots.")
    layer: list[int] | None = BRIDGE(
        None, description="Sender layer to read, from 1; repeat to read several. [two thirds up]"
    )

    max_steps: int = STEPS(1000, ge=1, description="Optimiser steps.")
    batch_size: int = STEPS(32, ge=1, description="Examples per forward pass, in each process.")
    accumulate: int = STEPS(1, ge=1, description="Forward passes per optimiser step.")
    learning_rate: float = STEPS(3e-3, gt=0, description="Peak learning rate of vectors (AdamW).")
    matrix_learning_rate: float = STEPS(0.02, gt=0, description="Peak learning rate of matrices (Muon).")
    warmup_steps: int = STEPS(20, ge=0, description="Optimiser steps of linear warm-up, before the cosine.")
    weight_decay: float = STEPS(0.01, ge=0, description="Weight decay.")
    clip_norm: float = STEPS(1.0, gt=0, description="Largest gradient norm over all trained weights.")
    seed: int = STEPS(0, ge=0, lt=1 << 63, description="Seed of the initial weights and of the data order.")

    answer_weight: float = OBJECTIVES(1.0, ge=0, description="Weight of the cross-entropy of the whole answer.")
    first_token_weight: float = OBJECTIVES(
        1.0, gt=0, description="Weight of an answer's first token; the others have 1."
    )
    first_k: int = OBJECTIVES(4, ge=1, description="Answer tokens that the first-k objective looks at.")
    first_k_weight: float = OBJECTIVES(
        0.0, ge=0, description="Weight of the cross-entropy of the first k answer tokens."
    )
    alignment_steps: int | None = OBJECTIVES(
        None,
        ge=0,
        description="First steps, in which soft tokens learn the words they cover. [a third; pooling, linear]",
    )
    alignment_weight: float = OBJECTIVES(0.0, ge=0, description="Weight of that objective after the first steps.")
    reconstruction_weight: float = OBJECTIVES(1.0, ge=0, description="Weight of repeating the source.")
    continuation_weight: float = OBJECTIVES(0.0, ge=0, description="Weight of going on where half of the source ends.")
    mode_tokens: int = OBJECTIVES(0, ge=0, description="Learned tokens that tell each of these two from answering.")
    kd_weight: float = OBJECTIVES(0.0, ge=0, description="Weight of distillation from the receiver reading the source.")
    kd_chunk: int | None = OBJECTIVES(None, ge=1, description="Rows the teacher reads at once. [a whole forward pass]")
    margin_weight: float = OBJECTIVES(0.0, ge=0, description="Weight of the margin to another example's latent.")
    margin: float = OBJECTIVES(1.0, gt=0, description="Nats by which another example's latent should be worse.")
    diversity_weight: float = OBJECTIVES(
        0.0, ge=0, description="Weight of answers that differ from example to example."
    )

    max_source_tokens: int = DATA(512, ge=1, description="Longest source in sender tokens; longer ones are cut.")
    max_examples: int | None = DATA(None, ge=1, description="Train on a seeded subset, stratified by label. [all]")
    group_by_length: bool = DATA(True, description="Put sources of like length into one batch.")
    cache: Path = DATA(CACHE, description="Folder of tokenised data and sender features.")
    cache_features: bool = DATA(False, description="Run the sender once, keep its states on disk, and free it.")

    device: str | None = MACHINE(
        None, pattern=DEVICE, description="Where models compute: cpu, cuda, cuda:1, mps or xpu. [the best there is]"
    )
    precision: Precision | None = MACHINE(
        None, description="What the frozen models compute in: bf16, fp16 or fp32. [bf16; fp32 on a CPU]"
    )
    gradient_checkpointing: bool = MACHINE(
        False, description="Recompute the receiver's blocks instead of keeping them."
    )
    compile: bool = MACHINE(False, description="Compile the receiver; lengths are padded to a few sizes.")
    memory_budget: ByteSize | None = MACHINE(
        None, description="Most bytes of model weights in memory, e.g. 24GB; models take turns within it."
    )
    receiver_block: int = MACHINE(1, ge=1, description="Steps until another of several receivers has its turn.")
    device_map: Literal["auto"] | None = MACHINE(None, description="auto: spread a model over several GPUs.")
    fsdp: bool = MACHINE(False, description="Shard the blocks of the frozen models over all processes.")

    save_every: int = WATCHING(200, ge=1, description="Optimiser steps between saves.")
    keep_last: int = WATCHING(2, ge=1, description="Resumable states kept.")
    validate_every: int = WATCHING(200, ge=0, description="Optimiser steps between validations; 0 turns them off.")
    validation_examples: int = WATCHING(64, ge=1, description="Training examples held out for validation.")
    metric: str | None = WATCHING(
        None, description="What the best checkpoint is best in: em, accuracy, token_f1 or loss. [em, or accuracy]"
    )
    probe_every: int = WATCHING(20, ge=0, description="Steps between measurements of loss(mismatched) - loss(matched).")
    on_collapse: Literal["warn", "stop"] = WATCHING("warn", description="What an alarm does: warn or stop.")
    log_with: list[Literal["tensorboard", "wandb"]] = WATCHING([], description="Tracker to log to; repeat for several.")
    debug_print_first: int = WATCHING(0, ge=0, description="Print the first N generations at each validation.")
    debug_topk: int = WATCHING(0, ge=0, description="Print the N likeliest first answer tokens at each validation.")

    @field_validator("layer", "receiver", "log_with", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if type(value) in (int, str) else value

    @field_validator("encoder")
    @classmethod
    def _known_encoder(cls, kind: str) -> str:
        from latentwire.bridge.encoder import encoder_class  # late: it loads torch

        return encoder_class(kind).kind

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, name: str | None) -> str | None:
        if name is not None and name not in METRICS:
            raise ValueError(f"Input should be {one_of(METRICS)}")
        return name

    @field_validator("sender", "receiver", "task", "add_receiver", "bridge")
    @classmethod
    def _found_from_anywhere(cls, name: str | list[str] | None) -> str | list[str] | None:
        if isinstance(name, list):
            return [_absolute(each) for each in name]
        return name if name in (None, "", "world", "builtin") else _absolute(name)

    @model_validator(mode="after")
    def _whole(self) -> "TrainConfig":
        if self.add_receiver is not None:
            if self.bridge is None or self.sender or self.receiver:
                raise ValueError("--add-receiver needs --bridge, and neither --sender nor --receiver")
        elif self.bridge is not None:
            raise ValueError("--bridge needs --add-receiver")
        elif not self.sender or not self.receiver:
            raise ValueError("sender and receiver are needed")
        if self.system is not None and self.template != "chat":
            raise ValueError("--system needs --template chat")
        if len(set(self.receiver)) < len(self.receiver):
            raise ValueError(f"receivers must differ, got {self.receiver}")
        if not any((self.answer_weight, self.first_k_weight, self.kd_weight)):
            raise ValueError("one of answer_weight, first_k_weight and kd_weight must be above 0")
        if self.batch_size < 2 and (self.margin_weight or self.diversity_weight):
            raise ValueError("margin_weight and diversity_weight compare examples: batch_size must be 2 or more")
        return self

    @property
    def receivers(self) -> list[str]:
        """Names of the receivers trained for."""
        return self.receiver if self.add_receiver is None else [self.add_receiver]


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
        raise in_one_sentence(error) from None


def in_one_sentence(error: ValidationError) -> InvalidRequest:
    """The first mistake of a file or of flags: its key, what was expected, and what was met."""
    first = error.errors()[0]
    name, message = ".".join(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")
    if not name:
        return InvalidRequest(message)
    met = first["input"] if isinstance(first["input"], str | int | float | list) else str(first["input"])
    got = "" if first["type"] == "missing" else f", got {met!r}"
    return InvalidRequest(f"{name}: {message}{got}", param=name)
