"""Hidden states of the sender → latent.

Dimensions used in this file:
    B batch    S sender tokens    N sender width (all layers read, or each of them)    K slots
    R tokens per window    H width inside the encoder    C latent width    L layers mixed
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from latentwire.bridge.config import EncoderConfig
from latentwire.bridge.errors import one_of
from latentwire.bridge.lora import Lora

HEAD_WIDTH = 32  # attention head width inside the encoder
States = Float[Tensor, "B S N"]
Mask = Bool[Tensor, "B S"]
Slots = tuple[Float[Tensor, "B K H"], Bool[Tensor, "B K"]]
"""Slots of each row, and which of them are real."""
KINDS: dict[str, type["Encoder"]] = {}
"""Encoders by what a configuration calls them: every subclass of ``Encoder`` that has a ``kind``, yours too."""


class Encoder(nn.Module):
    """What every kind shares: normalise the states, make slots, mix them, narrow them to the wire.

    Sender states differ by orders of magnitude between layers and hold a few huge channels, so they are normalised
    first. Each latent slot leaves with RMS 1: a fixed scale makes int8 safe and tells a real message from noise.

    Attributes:
        kind: What ``--encoder`` and a checkpoint call it. A subclass with one is known once it is defined.
        windowed: Whether slots cover windows of ``ratio`` sender tokens, in order, behind any that cover none (those of
            a source of no tokens, by ``slot_count``); else there are ``num_latents`` slots.
        lora: Additions to the sender's layers, under which the states were read (``models.hidden_states``), or None.
    """

    kind: ClassVar[str]
    windowed: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "kind" in vars(cls):
            other = KINDS.get(cls.kind, cls)
            if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"the encoder kind {cls.kind!r} is taken by {other.__module__}.{other.__qualname__}")
            KINDS[cls.kind] = cls

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(config.sender_width)
        self.layer_mix = LayerMix(config.mixed_layers) if config.mixed_layers > 1 else None
        self.mix = nn.ModuleList(Block(config.hidden_dim) for _ in range(config.depth))
        self.out = nn.Linear(config.hidden_dim, config.latent_dim)
        self.lora = Lora(config.lora) if config.lora else None

    @classmethod
    def slot_count(cls, config: EncoderConfig, tokens: int) -> int:
        """Slots K that a source of so many sender tokens takes."""
        return -(-tokens // config.ratio) if cls.windowed else config.num_latents

    def slots(self, states: States, mask: Mask) -> Slots:
        """Make K slots of each row, and say which are real."""
        raise NotImplementedError(type(self).__name__)

    def forward(
        self, states: Float[Tensor, "B S LN"], mask: Mask
    ) -> tuple[Float[Tensor, "B K C"], Bool[Tensor, "B K"]]:
        """Latents, right-padded with zeros, and their mask.

        Args:
            states: Sender states, of layers to be mixed side by side; values at padding are ignored, NaN included.
            mask: True at real tokens. Padding may be on either side: rows are aligned to the left first.
        """
        order = (~mask).byte().argsort(dim=1, stable=True)
        mask = mask.gather(1, order)
        states = states.gather(1, order[..., None].expand_as(states))
        states = states.masked_fill(~mask[..., None], 0.0).to(self.norm.weight.dtype)
        if self.layer_mix is None:
            states = self.norm(states)
        else:
            states = self.layer_mix(self.norm(states.reshape(*mask.shape, self.config.mixed_layers, -1)))
        slots, slot_mask = self.slots(states * mask[..., None], mask)
        for block in self.mix:
            slots = block(slots, slots, slot_mask)
        latent = self.out(slots)
        latent = F.rms_norm(latent, latent.shape[-1:])
        return latent.masked_fill(~slot_mask[..., None], 0.0), slot_mask


class LayerMix(nn.Module):
    """Several layers as one: a weighted mean with learned weights (a softmax), times one learned scale.

    Source: ELMo, Peters et al. 2018, arXiv:1802.05365 §3.2. It takes layers that were normalised, each by itself.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(layers))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, states: Float[Tensor, "B S L N"]) -> States:
        return self.scale * torch.einsum("bsln,l->bsn", states, self.logits.softmax(dim=0))


class Block(nn.Module):
    """Pre-norm attention and feed-forward; attends to the slots of its own row only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // HEAD_WIDTH)
        self.norm_query, self.norm_context, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.attended = nn.Linear(width, width), nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(
        self, x: Float[Tensor, "B Q H"], context: Float[Tensor, "B M H"], mask: Bool[Tensor, "B M"]
    ) -> Float[Tensor, "B Q H"]:
        def split(t: Tensor) -> Tensor:
            return t.reshape(*t.shape[:2], self.heads, -1).transpose(1, 2)

        key, value = self.key_value(self.norm_context(context)).chunk(2, dim=-1)
        # A row with nothing to attend to attends to padding and is masked away later: never NaN.
        visible = (mask | ~mask.any(dim=1, keepdim=True))[:, None, None, :]
        mixed = F.scaled_dot_product_attention(
            split(self.query(self.norm_query(x))), split(key), split(value), attn_mask=visible
        )
        x = x + self.attended(mixed.transpose(1, 2).flatten(-2))
        return x + torch.as_tensor(self.mlp(self.norm_mlp(x)))


class Pooling(Encoder):
    """Windows of R contiguous tokens; a slot reads all R states in order, so none is averaged away.

    K grows with the source, which carried more than a fixed number of global queries (ARC-Encoder,
    arXiv:2510.20535 §3). Reading the window whole instead of its mean: ours.
    """

    kind = "pooling"
    windowed = True

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.read = nn.Linear(config.ratio * config.sender_width, config.hidden_dim)

    def slots(self, states: States, mask: Mask) -> Slots:
        windows, window_mask = _windows(states, mask, self.config.ratio)
        return self.read(windows.flatten(-2)), window_mask.any(dim=-1)


class Perceiver(Encoder):
    """A fixed number of learned queries that read every token.

    Source: Perceiver resampler, Alayrac et al. 2022, arXiv:2204.14198 §3.1.1.
    """

    kind = "perceiver"

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.read = nn.Linear(config.sender_width, config.hidden_dim)
        self.queries = nn.Parameter(torch.randn(config.num_latents, config.hidden_dim))
        self.attend = Block(config.hidden_dim)

    def slots(self, states: States, mask: Mask) -> Slots:
        return self.ask(self.read(states), mask)

    def ask(self, context: Float[Tensor, "B M H"], mask: Bool[Tensor, "B M"]) -> Slots:
        """What the queries find in a context; a row without any has no slots."""
        queries = self.queries.expand(len(context), -1, -1)
        return self.attend(queries, context, mask), _all_or_none(mask, self.config.num_latents)


class PooledPerceiver(Pooling, Perceiver):
    """A fixed number of learned queries that read the slots of ``Pooling`` instead of every token: ours.

    ``Pooling`` stands first, so ``read`` is that of windows.
    """

    kind = "pooled-perceiver"
    windowed = False

    def slots(self, states: States, mask: Mask) -> Slots:
        return self.ask(*Pooling.slots(self, states, mask))


class Hybrid(Pooling, Perceiver):
    """The slots of ``Pooling``, behind ``num_latents`` global ones from learned queries that read them: ours."""

    kind = "hybrid"

    @classmethod
    def slot_count(cls, config: EncoderConfig, tokens: int) -> int:
        return config.num_latents + super().slot_count(config, tokens)

    def slots(self, states: States, mask: Mask) -> Slots:
        windows, real = Pooling.slots(self, states, mask)
        found, there = self.ask(windows, real)
        return torch.cat([found, windows], dim=1), torch.cat([there, real], dim=1)


class Mean(Encoder):
    """Baseline: one mean over the whole source, given to ``num_latents`` slots by a linear map each."""

    kind = "mean"

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.read = nn.Linear(config.sender_width, config.num_latents * config.hidden_dim)

    def slots(self, states: States, mask: Mask) -> Slots:
        mean = states.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        K = self.config.num_latents
        return self.read(mean).reshape(len(mean), K, -1), _all_or_none(mask, K)


class LinearPooling(Encoder):
    """Baseline: the mean of each window through linear maps, no mixing (``depth`` is ignored)."""

    kind = "linear"
    windowed = True

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.mix = nn.ModuleList()
        self.read = nn.Linear(config.sender_width, config.hidden_dim)

    def slots(self, states: States, mask: Mask) -> Slots:
        windows, window_mask = _windows(states, mask, self.config.ratio)
        count = window_mask.sum(dim=-1, keepdim=True).clamp(min=1)
        return self.read(windows.sum(dim=-2) / count), window_mask.any(dim=-1)


class LearnedPrompt(Encoder):
    """Control: learned slots that never see the source; what they reach is no merit of a bridge."""

    kind = "prompt"

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.prompt = nn.Parameter(torch.randn(config.num_latents, config.hidden_dim))

    def slots(self, states: States, mask: Mask) -> Slots:
        return self.prompt.expand(len(states), -1, -1), _all_or_none(mask, self.config.num_latents)


def _all_or_none(mask: Bool[Tensor, "B M"], slots: int) -> Bool[Tensor, "B K"]:
    return mask.any(dim=1, keepdim=True).expand(-1, slots)


def _windows(states: States, mask: Mask, ratio: int) -> tuple[Float[Tensor, "B K R N"], Bool[Tensor, "B K R"]]:
    missing = -states.shape[1] % ratio
    states, mask = F.pad(states, (0, 0, 0, missing)), F.pad(mask, (0, missing))
    B, S, N = states.shape
    return states.reshape(B, S // ratio, ratio, N), mask.reshape(B, S // ratio, ratio)


def encoder_class(kind: str) -> type[Encoder]:
    """The encoder of that kind (ValueError where there is none, with the names of those there are)."""
    if kind not in KINDS:
        raise ValueError(f"Input should be {one_of(KINDS)}")
    return KINDS[kind]


def make_encoder(config: EncoderConfig) -> Encoder:
    """A freshly initialised encoder of ``config.kind``."""
    return encoder_class(config.kind)(config)


def slots_of(config: EncoderConfig, tokens: int) -> int:
    """Slots K that a source of so many sender tokens takes."""
    return encoder_class(config.kind).slot_count(config, tokens)
