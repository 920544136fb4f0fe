"""What a bridge is, in plain data: saved beside the weights, compared when it is loaded.

Frozen dataclasses, read back through pydantic so that a damaged or unknown field is named. No torch.
"""

from collections.abc import Callable
from dataclasses import field
from typing import Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from latentwire.bridge.errors import CorruptCheckpoint

RANDOM = "random:"
"""Prefix of a model with the same shape and tokenizer but untrained weights: a control."""

Precision = Literal["bf16", "fp16", "fp32"]
Mode = Literal["plain", "paged", "graphs", "async"]
"""How the steps of continuous batching are made, each as those before it and more (``generation/steps.py``)."""
DEVICE = r"^(cpu|mps|xpu|cuda(:\d+)?)$"
"""What a device may be called, wherever one is named."""

STRICT = ConfigDict(extra="forbid")
T = TypeVar("T")


@dataclass(frozen=True, config=STRICT)
class Fingerprint:
    """Identity of a frozen language model: three SHA-256 digests, first 16 hex digits each."""

    config: str
    weights: str
    tokenizer: str

    def __str__(self) -> str:
        return f"{self.config}/{self.weights}/{self.tokenizer}"


@dataclass(frozen=True, config=STRICT)
class ModelRef:
    """A language model as a checkpoint remembers it: where it came from, what it was, how wide it is."""

    name: str
    fingerprint: Fingerprint
    width: int
    layers: int


@dataclass(frozen=True, config=STRICT)
class SourceLayout:
    """What stands around a source: the tokens that the sender's tokenizer itself adds to a text, or None."""

    bos_id: int | None
    eos_id: int | None


Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, config=STRICT)
class Turn:
    """What one side of a conversation says."""

    role: Role
    text: str


Prompt = str | tuple[Turn, ...]
"""What a receiver is asked: a text, or a conversation whose last turn it answers."""


@dataclass(frozen=True, config=STRICT)
class Chat:
    """A receiver's chat template (Jinja, as its files had it), and the system message that opens every conversation."""

    template: str
    system: str | None = None


@dataclass(frozen=True, config=STRICT)
class Layout:
    """How a receiver input is put together; read by ``bridge.prompt`` alone.

    Attributes:
        template: Where latent and prompt stand unless a prompt says: ``"Review: {latent}\\n{prompt}"``.
        bos_id: Receiver token that opens every input, once; None where the tokenizer, or a chat template, adds none.
        eos_id: Receiver token that a bridge is taught to end its answers with, or None.
        end_ids: Every receiver token that ends an answer; None in an old bridge, whose BOS is what the tokenizer has.
        chat: The chat template around prompts; None for plain text.
    """

    template: str
    bos_id: int | None
    eos_id: int | None
    end_ids: tuple[int, ...] | None = None
    chat: Chat | None = None


@dataclass(frozen=True, config=STRICT)
class LoraShape:
    """Shape of the additions to a sender's linear layers.

    Attributes:
        rank: Of each.
        layers: Outputs and inputs of each layer by its name among the blocks, as in ``0.attention.dense``.
    """

    rank: int
    layers: dict[str, tuple[int, int]]


@dataclass(frozen=True, config=STRICT)
class EncoderConfig:
    """Shape of the encoder.

    Attributes:
        kind: One of ``bridge.encoder.KINDS``.
        sender_width: Width of the states that slots are made of: summed over the layers read, or of each if mixed.
        latent_dim: Width C of the latent that crosses the wire.
        hidden_dim: Width inside the encoder.
        depth: Transformer blocks over the slots.
        ratio: Sender tokens per window, of kinds that read windows of the source.
        num_latents: Slots, of the other kinds; of ``hybrid``, those before the windows'.
        mixed_layers: Layers that a learned mix makes one of; 1, as in every old encoder: all are read side by side.
        lora: What is added to the sender's layers while this encoder's states are read; None, as in every old one:
            nothing.
    """

    kind: str
    sender_width: int
    latent_dim: int
    hidden_dim: int
    depth: int
    ratio: int
    num_latents: int
    mixed_layers: int = field(default=1, repr=False)  # ids of old bridges are made from the repr
    lora: LoraShape | None = field(default=None, repr=False)  # ids of old bridges are made from the repr


@dataclass(frozen=True, config=STRICT)
class Provenance:
    """Where the weights come from, so that a number can be traced to what produced it.

    ``recipe`` is the whole configuration of the run but its folder, enough to train a control the same way;
    ``processes`` is how many shared its steps, each with a batch of its own.
    """

    task: str
    data_sha256: str
    seed: int
    steps: int
    code_version: str
    recipe: dict[str, bool | int | float | str | list[int] | list[str] | None]
    processes: int = 1


@dataclass(frozen=True, config=STRICT)
class Head:
    """One receiver's head: the receiver, its layout, and the measured RMS of its embedding rows (unitless).

    Attributes:
        provenance: Set where the head was added later to an encoder that was frozen by then.
        hidden_dim: Width inside the head; None, as in every old head, is twice the receiver's.
        gain: Whether soft tokens have a learned gain over ``embedding_rms``; an old head has none.
        repeat: Prompt at which the receiver was taught to repeat a source; None where it was not, or in an old head
            (``bridge.readback.taught``).
    """

    receiver: ModelRef
    layout: Layout
    embedding_rms: float
    provenance: Provenance | None = None
    hidden_dim: int | None = None
    gain: bool = False
    repeat: str | None = None


@dataclass(frozen=True, config=STRICT)
class BridgeConfig:
    """Everything about a bridge but its weights.

    Attributes:
        layers: Sender blocks whose output is read, counted from 1; 0 is the embedding.
        max_source_tokens: Longest source in sender tokens.
        source: What stands around a source; None in a bridge made before it was kept (``bridge.reader.kept_layout``).
        heads: By receiver name, in order of training; the first is the default.
        earlier: Runs whose weights this bridge's run began with, the last one last.
    """

    sender: ModelRef
    layers: tuple[int, ...]
    max_source_tokens: int
    encoder: EncoderConfig
    heads: dict[str, Head]
    provenance: Provenance
    source: SourceLayout | None = None
    earlier: tuple[Provenance, ...] = ()


@dataclass(frozen=True, config=STRICT)
class Part:
    """A weight file of a checkpoint."""

    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True, config=STRICT)
class Manifest:
    """``config.json``: the one file whose replacement commits a checkpoint.

    ``bridge_id`` (32 hex digits) names the latent space: made from the encoder alone, so that later heads read it too.
    """

    format: Literal[1]
    bridge_id: str
    bridge: BridgeConfig
    encoder: Part
    heads: dict[str, Part]


_MANIFEST = TypeAdapter(Manifest)


def dump_manifest(manifest: Manifest) -> bytes:
    """The manifest as indented JSON."""
    return _MANIFEST.dump_json(manifest, indent=2) + b"\n"


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Read ``config.json`` (CorruptCheckpoint, naming the field that is missing, unknown or of the wrong type)."""
    return parsed(_MANIFEST.validate_json, data, where)


def parsed(read: Callable[[bytes], T], data: bytes, where: str) -> T:
    """What ``read`` makes of a file of a checkpoint (CorruptCheckpoint, as of ``parse_manifest``)."""
    try:
        return read(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the document"
        raise CorruptCheckpoint(f"{where}: {field}: {first['msg']}") from None
