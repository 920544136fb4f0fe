"""What a run is: every flag of ``latentwire train``, and every key of its TOML file, by the same names.

Importing this module needs no torch: the command line makes its flags from it.
"""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator, model_validator

from latentwire.bridge.config import DEVICE, RANDOM, Precision
from latentwire.bridge.errors import InvalidRequest, one_of
from latentwire.bridge.evaluation.metrics import METRICS
from latentwire.bridge.wire import MAX_SLOTS, MAX_WIDTH

CACHE = Path("~/.cache/latentwire")


def _panel(title: str) -> Callable[..., Any]:
    """Makes the fields of one panel of ``--help``: a help text, the default, and pydantic's limits."""

    def field(text: str, default: Any = ..., **limits: Any) -> Any:
        return Field(default, description=text, json_schema_extra={"panel": title}, **limits)

    return field


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
    needed: ClassVar[tuple[str, ...]] = ("answer_weight", "first_k_weight", "kd_weight")  # one of them is above 0

    sender: str = MODELS("Model that reads the source: builtin:…, a folder, or a Hub name.", "")
    receiver: list[str] = MODELS("Model that answers, named the same way; repeat for several.", [])
    task: str = MODELS("'world' or the path of a task file (.toml).")
    out: Path = MODELS("Folder of the checkpoint, the resumable state and the logs.")
    add_receiver: str | None = MODELS(
        "Model that gets a head on the frozen encoder of --bridge; nothing else is trained.", None
    )
    bridge: str | None = MODELS("Checkpoint that --add-receiver extends.", None)
    init: str | None = MODELS(
        "Checkpoint whose weights the run begins with; its models, layers and encoder are the run's.", None
    )
    template: Literal["plain", "chat"] = MODELS(
        "chat: ask in the receiver's own chat template, the latent inside the user's turn.", "plain"
    )
    system: str | None = MODELS("System message of the chat template. [what the template has]", None)

    encoder: str = BRIDGE(
        "Encoder kind; mean and linear are baselines, prompt is a control without a sender.", "pooling"
    )
    ratio: int = BRIDGE("Sender tokens per window (pooling, pooled-perceiver, hybrid, linear).", 4, ge=1)
    num_latents: int = BRIDGE(
        "Slots (perceiver, pooled-perceiver, mean, prompt), or those before the windows' (hybrid).",
        16,
        ge=1,
        le=MAX_SLOTS,
    )
    latent_dim: int | None = BRIDGE(
        "Width C of the latent that crosses the wire. [the receiver's, at most 512]", None, ge=1, le=MAX_WIDTH
    )
    hidden_dim: int | None = BRIDGE(
        "Width inside the encoder. [near the sender's, 64 to 1024]", None, ge=32, multiple_of=32
    )
    head_dim: int | None = BRIDGE("Width inside a head. [twice the receiver's, at most 1024]", None, ge=1)
    gain: bool = BRIDGE("Learn a gain of the soft tokens, 1 to 256 times the embeddings' RMS.", False)
    depth: int = BRIDGE("Transformer blocks over the slots.", 2, ge=0)
    layer: list[int] | None = BRIDGE("Sender layer to read, from 1; repeat to read several. [two thirds up]", None)
    layer_mix: bool = BRIDGE("Read a learned mix of several layers instead of all of them side by side.", False)
    sender_lora: int = BRIDGE("Rank of LoRA on the sender's layers up to the one read, for this bridge alone.", 0, ge=0)

    max_steps: int = STEPS("Optimiser steps.", 1000, ge=1)
    batch_size: int = STEPS("Examples per forward pass, in each process.", 32, ge=1)
    accumulate: int = STEPS("Forward passes per optimiser step.", 1, ge=1)
    learning_rate: float = STEPS("Peak learning rate of vectors (AdamW).", 3e-3, gt=0)
    matrix_learning_rate: float = STEPS("Peak learning rate of matrices (Muon).", 0.02, gt=0)
    warmup_steps: int = STEPS("Optimiser steps of linear warm-up, before the cosine.", 20, ge=0)
    weight_decay: float = STEPS("Weight decay.", 0.01, ge=0)
    clip_norm: float = STEPS("Largest gradient norm over all trained weights.", 1.0, gt=0)
    seed: int = STEPS("Seed of the initial weights and of the data order.", 0, ge=0, lt=1 << 63)

    answer_weight: float = OBJECTIVES("Weight of the cross-entropy of the whole answer.", 1.0, ge=0)
    first_token_weight: float = OBJECTIVES("Weight of an answer's first token; the others have 1.", 1.0, gt=0)
    first_k: int = OBJECTIVES("Answer tokens that the first-k objective looks at.", 4, ge=1)
    first_k_weight: float = OBJECTIVES("Weight of the cross-entropy of the first k answer tokens.", 0.0, ge=0)
    alignment_steps: int | None = OBJECTIVES(
        "First steps, in which soft tokens learn the words they cover. [a third; pooling, hybrid, linear]", None, ge=0
    )
    alignment_weight: float = OBJECTIVES("Weight of that objective after the first steps.", 0.0, ge=0)
    reconstruction_weight: float = OBJECTIVES("Weight of repeating the source.", 1.0, ge=0)
    continuation_weight: float = OBJECTIVES("Weight of going on where half of the source ends.", 0.0, ge=0)
    mode_tokens: int = OBJECTIVES("Learned tokens that tell each of these two from answering.", 0, ge=0)
    kd_weight: float = OBJECTIVES("Weight of distillation from the receiver reading the source.", 0.0, ge=0)
    kd_chunk: int | None = OBJECTIVES("Rows the teacher reads at once. [a whole forward pass]", None, ge=1)
    margin_weight: float = OBJECTIVES("Weight of the margin to another example's latent.", 0.0, ge=0)
    margin: float = OBJECTIVES("Nats by which another example's latent should be worse.", 1.0, gt=0)
    diversity_weight: float = OBJECTIVES("Weight of answers that differ from example to example.", 0.0, ge=0)

    source_text: bool = OBJECTIVES("The receiver reads the source too, behind the soft tokens: a control.", False)
    sources_per_example: int = OBJECTIVES(
        "Most sources in one prompt: an example's own among others of its batch, in shuffled, marked order.", 1, ge=1
    )

    max_source_tokens: int = DATA("Longest source in sender tokens; longer ones are cut.", 512, ge=1)
    max_examples: int | None = DATA("Train on a seeded subset, stratified by label. [all]", None, ge=1)
    group_by_length: bool = DATA("Put sources of like length into one batch.", True)
    cache: Path = DATA("Folder of tokenised data and sender features.", CACHE)
    cache_features: bool = DATA("Run the sender once, keep its states on disk, and free it.", False)

    device: str | None = MACHINE(
        "Where models compute: cpu, cuda, cuda:1, mps or xpu. [the best there is]", None, pattern=DEVICE
    )
    precision: Precision | None = MACHINE(
        "What the frozen models compute in: bf16, fp16 or fp32. [bf16; fp32 on a CPU]", None
    )
    tf32: bool = MACHINE("On CUDA, multiply float32 (the trained weights) in TF32, whose products keep 10 bits.", True)
    gradient_checkpointing: bool = MACHINE("Recompute the receiver's blocks instead of keeping them.", False)
    compile: bool = MACHINE("Compile the receiver; lengths are padded to a few sizes.", False)
    memory_budget: ByteSize | None = MACHINE(
        "Most bytes of model weights in memory, e.g. 24GB; models take turns within it.", None
    )
    receiver_block: int = MACHINE("Steps until another of several receivers has its turn.", 1, ge=1)
    device_map: Literal["auto"] | None = MACHINE("auto: spread a model over several GPUs.", None)
    fsdp: bool = MACHINE("Shard the blocks of the frozen models over all processes.", False)

    save_every: int = WATCHING("Optimiser steps between saves.", 200, ge=1)
    keep_last: int = WATCHING("Resumable states kept.", 2, ge=1)
    validate_every: int = WATCHING("Optimiser steps between validations; 0 turns them off.", 200, ge=0)
    validation_examples: int = WATCHING("Training examples held out for validation.", 64, ge=1)
    metric: str | None = WATCHING(
        "What the best checkpoint is best in: em, accuracy, token_f1 or loss. [em, or accuracy]", None
    )
    probe_every: int = WATCHING("Steps between measurements of loss(mismatched) - loss(matched).", 20, ge=0)
    on_collapse: Literal["warn", "stop"] = WATCHING("What an alarm does: warn or stop.", "warn")
    log_with: list[Literal["tensorboard", "wandb"]] = WATCHING("Tracker to log to; repeat for several.", [])
    debug_print_first: int = WATCHING("Print the first N generations at each validation.", 0, ge=0)
    debug_topk: int = WATCHING("Print the N likeliest first answer tokens at each validation.", 0, ge=0)

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

    @field_validator("sender", "receiver", "task", "add_receiver", "bridge", "init")
    @classmethod
    def _found_from_anywhere(cls, name: str | list[str] | None) -> str | list[str] | None:
        if isinstance(name, list):
            return [absolute(each) for each in name]
        return name if name in (None, "", "world", "builtin") else absolute(name)

    @model_validator(mode="after")
    def _whole(self) -> "TrainConfig":
        if self.add_receiver is not None:
            if self.bridge is None or self.sender or self.receiver:
                raise ValueError("--add-receiver needs --bridge, and neither --sender nor --receiver")
            if self.init is not None:
                raise ValueError("--init begins with a whole bridge's weights, --add-receiver keeps them as they are")
        elif self.bridge is not None:
            raise ValueError("--bridge needs --add-receiver (--init begins with a checkpoint's weights)")
        elif self.init is None and not (self.sender and self.receiver):
            raise ValueError("sender and receiver are needed")
        if self.system is not None and self.template != "chat":
            raise ValueError("--system needs --template chat")
        if len(set(self.receiver)) < len(self.receiver):
            raise ValueError(f"receivers must differ, got {self.receiver}")
        if not any(getattr(self, name) for name in self.needed):
            *others, last = self.needed
            raise ValueError(f"one of {', '.join(others)} and {last} must be above 0")
        if self.batch_size < 2 and (self.margin_weight or self.diversity_weight):
            raise ValueError("margin_weight and diversity_weight compare examples: batch_size must be 2 or more")
        return self

    @model_validator(mode="after")
    def _keeps_its_beginning(self) -> "TrainConfig":
        if self.init is not None and Path(self.init).resolve() in (self.out.resolve(), (self.out / "best").resolve()):
            raise ValueError(f"--out {self.out} would replace the weights of --init {self.init}; give another --out")
        return self

    @model_validator(mode="after")
    def _several_sources(self) -> "TrainConfig":
        if self.sources_per_example > 1 and self.source_text:
            raise ValueError("--sources-per-example puts other examples' latents into a prompt, --source-text none")
        if self.sources_per_example > self.batch_size:
            raise ValueError(f"sources_per_example must be at most batch_size, {self.batch_size}")
        return self

    @property
    def receivers(self) -> list[str]:
        """Names of the receivers trained for."""
        return self.receiver if self.add_receiver is None else [self.add_receiver]


def absolute(name: str) -> str:
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


def read_config(file: Path | None, flags: dict[str, Any], kind: type[TrainConfig] = TrainConfig) -> TrainConfig:
    """A configuration of a kind from a TOML file, with flags (those not None) over it.

    Raises:
        InvalidRequest: The file is no TOML, or a key is missing, unknown or of the wrong type; it is named.
    """
    values = {**read_toml(file), **{name: value for name, value in flags.items() if value is not None}}
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise in_one_sentence(error) from None


def read_toml(file: Path | None) -> dict[str, Any]:
    """What stands in a file; nothing where none is given (InvalidRequest: it is no TOML)."""
    try:
        return {} if file is None else tomllib.loads(file.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"--config {file}: {error}", param="config") from None


def in_one_sentence(error: ValidationError) -> InvalidRequest:
    """The first mistake of a file or of flags: its key, what was expected, and what was met."""
    first = error.errors()[0]
    name, message = ".".join(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")
    if not name:
        return InvalidRequest(message)
    met = first["input"] if isinstance(first["input"], str | int | float | list) else str(first["input"])
    got = "" if first["type"] == "missing" else f", got {met!r}"
    return InvalidRequest(f"{name}: {message}{got}", param=name)
