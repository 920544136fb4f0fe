"""A training run: everything that its steps need.

``training.prepare`` makes a run, ``training.loop`` takes its steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from latentwire.bridge.checkpoint import BridgeModel
from latentwire.bridge.evaluation.tasks import Example, Task
from latentwire.bridge.residency import Residency
from latentwire.training.config import TrainConfig
from latentwire.training.features import CachedStates, LiveStates
from latentwire.training.machine import Ranks
from latentwire.training.tokens import Tokeniser, Tokens

BUCKET = 64  # a compiled receiver meets lengths that are multiples of this
Phase = Literal["align", "answer"]


@dataclass
class Run:
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
    parameters: list[nn.Parameter]
    optimizers: list[Optimizer]
    scaler: GradScaler
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
