"""A training run, and the forward pass of some rows of a step, from which objectives are computed.

Dimensions used in this file:
    B batch    S sender tokens    K slots    D receiver width    M mode tokens    A answer columns    V vocabulary
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from latentwire.bridge.checkpoint import BridgeModel, head_key
from latentwire.bridge.encoder import slots_of
from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.evaluation.tasks import Example, Task
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.prompt import IGNORE, Row, collate
from latentwire.bridge.residency import Residency
from latentwire.training.config import TrainConfig
from latentwire.training.data import chunks
from latentwire.training.features import CachedStates, LiveStates, States
from latentwire.training.machine import Ranks
from latentwire.training.said import Said, say
from latentwire.training.several import mix
from latentwire.training.state import Trained
from latentwire.training.tokens import Tokeniser, Tokens
from latentwire.training.utilisation import bridge_flops, receiver_flops

BUCKET = 64  # a compiled receiver meets lengths that are multiples of this
Phase = Literal["align", "answer"]
Soft = tuple[Float[Tensor, "B K D"], list[int]]
"""Soft tokens of a batch, and how many each row has."""
Read = tuple[Float[Tensor, "B A V"], Int[Tensor, "B A"]]
"""Logits at the answers' columns, and the labels there: of answers that are short."""


@dataclass
class Run(Trained):
    """Everything a step needs. ``micro_batch`` shrinks when memory runs out."""

    config: TrainConfig
    task: Task
    train: Sequence[Example]
    validation: Sequence[Example]
    bridge: BridgeModel
    modes: nn.ParameterDict
    states: LiveStates | CachedStates
    residency: Residency
    tokenisers: dict[str, Tokeniser]
    sample: Callable[[str, int], Tokens]
    ranks: Ranks
    identity: dict[str, object]
    alignment_steps: int
    micro_batch: int
    out_of_memory_count: int = 0
    refused_in_a_row: int = 0
    best: float | None = None

    @property
    def rows_per_step(self) -> int:
        """Examples of one optimiser step, over all processes."""
        return self.config.batch_size * self.config.accumulate * self.ranks.count

    @property
    def multiple(self) -> int:
        """Lengths are padded to a multiple of this."""
        return BUCKET if self.config.compile else 1

    def phase(self, step: int) -> Phase:
        """``align`` in the warm start, then ``answer``."""
        return "align" if step < self.alignment_steps else "answer"

    def receiver_of(self, step: int) -> str:
        """Whose turn step ``step`` is."""
        names = self.config.receivers
        return names[step // self.config.receiver_block % len(names)]


@dataclass
class Forward:
    """The passes of some rows of a step; each part is made when it is first read.

    Attributes:
        answered: Given what the receiver answers, once it is read.
        teacher: What the receiver says reading the sources, where an objective wants it.
        tokens: Tokens of sender and receiver read so far, padding not counted.
        flops: What the models needed for all passes so far and their gradients, as ``utilisation`` counts it.
        delta: loss(mismatched) - loss(matched), once it is known.
    """

    run: Run
    receiver: FrozenLM
    rows: Sequence[Tokens]
    answered: Callable[[Said], None]
    teacher: Said | None = None
    tokens: int = 0
    flops: int = 0
    delta: float | None = None

    @cached_property
    def states(self) -> States:
        """What the sender reads, and its mask."""
        sources = [row.source for row in self.rows]
        tokens = sum(len(source.ids) for source in sources)
        self.tokens += tokens
        self.flops += self.run.states.flops(tokens)
        return self.run.states.read(sources, multiple=self.run.multiple)

    @cached_property
    def soft(self) -> Soft:
        """Soft tokens of the sources (InvalidRequest where the encoder makes other slots than it counts)."""
        soft, slots = self.encode(self.states[1])
        config = self.run.bridge.config.encoder
        if slots != (counted := [slots_of(config, len(row.source.ids)) for row in self.rows]):
            raise InvalidRequest(f"encoder {config.kind!r} makes {slots} slots; its slot_count says {counted}")
        return soft, slots

    @cached_property
    def answers(self) -> Read:
        """Logits and labels of ``said``."""
        return self.said.logits, self.said.labels

    @cached_property
    def said(self) -> Said:
        """The receiver's answers from the soft tokens, where there are to be several sources also from others'."""
        rows, (soft, slots) = [row.answer for row in self.rows], self.soft
        if self.run.config.sources_per_example > 1:
            rows, soft = mix(self.run.tokenisers[self.receiver.name], self.rows, soft, slots)
        said = self.read(rows, soft)
        self.answered(said)
        return said

    @cached_property
    def alone(self) -> Said:
        """The answers from each source alone."""
        if self.run.config.sources_per_example == 1:
            return self.said
        return self.read([row.answer for row in self.rows], self.soft[0])

    def encode(self, mask: Bool[Tensor, "B S"]) -> Soft:
        """Soft tokens of the sources where ``mask`` is true."""
        latents, real = self.run.bridge.encoder(self.states[0], mask)
        head, slots = self.run.bridge.heads[head_key(self.receiver.name)], real.sum(dim=1).tolist()
        self.flops += bridge_flops([self.run.bridge.encoder, head], sum(slots))
        return head(latents.to(self.receiver.device)), slots

    def read(self, rows: Sequence[Row], soft: Float[Tensor, "B K D"]) -> Said:
        """What the receiver says to rows with these soft tokens."""
        self.tokens += sum(len(row) for row in rows)
        self.flops += receiver_flops(self.receiver, rows, gradient=torch.is_grad_enabled())
        batch = collate(rows, side="left", multiple=self.run.multiple).to(self.receiver.device)
        return say(self.receiver, batch, soft, multiple=self.run.multiple)

    def read_mode(self, mode: str, soft: Float[Tensor, "B K D"], slots: Sequence[int]) -> Said:
        """What the receiver says to the rows of a mode, from soft tokens and the mode's learned tokens."""
        if self.run.config.mode_tokens:
            learned = self.run.modes[f"{head_key(self.receiver.name)}·{mode}"]
            rms = self.run.bridge.config.heads[self.receiver.name].embedding_rms
            soft = with_mode(soft, slots, learned, scale=rms)
        return self.read([getattr(row, mode) for row in self.rows], soft)


def with_mode(
    soft: Float[Tensor, "B K D"], slots: Sequence[int], learned: Float[Tensor, "M D"], *, scale: float
) -> Float[Tensor, "B KM D"]:
    """Soft tokens with a mode's tokens directly after each row's last one, at the receiver's scale."""
    M, D = learned.shape
    tokens = (F.rms_norm(learned, (D,)) * scale).expand(len(soft), M, D).to(soft.dtype)
    at = torch.tensor(slots, device=soft.device)[:, None] + torch.arange(M, device=soft.device)
    return F.pad(soft, (0, 0, 0, M)).scatter(1, at[..., None].expand(-1, -1, D), tokens)


@torch.no_grad()
def taught(run: Run, receiver: FrozenLM, rows: Sequence[Tokens]) -> Said:
    """What the receiver says reading the sources themselves, at the answers' columns only; right-aligned."""
    parts: list[Said] = []
    for chunk in chunks(rows, run.config.kd_chunk or len(rows)):
        asked = [row.teacher for row in chunk]
        batch = collate([row for row in asked if row is not None], side="left", multiple=run.multiple)
        parts.append(say(receiver, batch.to(receiver.device), None, multiple=run.multiple))
    A = max(part.labels.shape[1] for part in parts)
    states = torch.cat([F.pad(part.states, (0, 0, A - part.states.shape[1], 0)) for part in parts])
    labels = torch.cat([F.pad(part.labels, (A - part.labels.shape[1], 0), value=IGNORE) for part in parts])
    return Said(states, labels, parts[0].output)
