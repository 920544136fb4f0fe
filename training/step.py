"""One optimiser step, on one screen: batch → forward → loss → backward → clip → step → log.

A step is defined by its rows, not by how they are cut: every loss is a row's own, summed and divided by all rows of
the step, so that a smaller forward pass, more processes, or a retry after running out of memory change nothing but
rounding.

Dimensions used in this file:
    B batch    K slots    D receiver width    M mode tokens    A answer columns    V vocabulary
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from latentwire.bridge.checkpoint import BridgeModel, head_key
from latentwire.bridge.devices import is_out_of_memory
from latentwire.bridge.engine import answer_logits
from latentwire.bridge.errors import TrainingFailed
from latentwire.bridge.evaluation.tasks import Example, Task
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.prompt import Row, collate
from latentwire.bridge.residency import Residency
from latentwire.training.config import TrainConfig
from latentwire.training.data import chunks
from latentwire.training.features import CachedStates, LiveStates
from latentwire.training.machine import Ranks, clear_gradients, memory_of
from latentwire.training.monitor import AnswerStats, StepRecord
from latentwire.training.objectives import (
    alignment_loss,
    answer_loss,
    distillation_loss,
    diversity_loss,
    first_k_loss,
    first_logits,
    margin_loss,
    word_targets,
)
from latentwire.training.tokens import Tokeniser, Tokens

log = logging.getLogger(__name__)

BUCKET = 64  # a compiled receiver meets lengths that are multiples of this
REFUSED_IN_A_ROW = 5  # refused steps after which a run is dead; fp16 looks for its scale in the first ones
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


def take_step(run: Run, step: int, rows: Sequence[Tokens], *, waited: float = 0.0) -> StepRecord:
    """One update from this process's ``rows``; a step that is not finite is refused and changes no weight.

    The rows are cut into forward passes of ``run.micro_batch``, halved while memory does not suffice; ``waited`` is the
    seconds spent waiting for them.

    Raises:
        TrainingFailed: Not one row fits in memory, or ``REFUSED_IN_A_ROW`` steps in a row were not finite.
    """
    started, name = time.perf_counter(), run.receiver_of(step)
    with run.residency.use(name) as receiver:
        sums = _retry(run, step, receiver, rows)
    run.ranks.all_reduce([p.grad for p in run.parameters if p.grad is not None])
    sums.share(run.ranks, receiver.device)
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    norm = float(torch.nn.utils.clip_grad_norm_(run.parameters, run.config.clip_norm))
    rate = run.config.learning_rate * schedule(run.config, step)
    refused = not math.isfinite(norm)
    _update(run, step, refused)
    device = receiver.device
    return StepRecord(
        step=step + 1,
        phase=run.phase(step),
        receiver=name,
        **sums.averages(run.rows_per_step),
        gradient_norm=norm,
        learning_rate=rate,
        seconds=waited + time.perf_counter() - started,
        data_wait_seconds=waited,
        **asdict(memory_of(device)),
        micro_batch=run.micro_batch,
        out_of_memory_count=run.out_of_memory_count,
        refused=refused,
    )


def _retry(run: Run, step: int, receiver: FrozenLM, rows: Sequence[Tokens]) -> "_Sums":
    """Gradients of the whole step; after running out of memory, the same rows again in half as large passes."""
    while True:
        try:
            sums = _Sums()
            for micro in chunks(rows, run.micro_batch):
                _pass(run, step, receiver, micro, sums)
            return sums
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or run.config.fsdp:  # sharded passes of one process need all the others'
                raise
            reason = str(error).splitlines()[0]
        clear_gradients(run.parameters)
        run.out_of_memory_count += 1
        if run.micro_batch == 1:
            raise TrainingFailed(f"step {step + 1}: one row does not fit in memory ({reason}); see 'latentwire plan'")
        run.micro_batch = (run.micro_batch + 1) // 2
        log.warning(
            "step %d: out of memory (%s); the same rows again in passes of %d", step + 1, reason, run.micro_batch
        )


def _pass(run: Run, step: int, receiver: FrozenLM, rows: Sequence[Tokens], sums: "_Sums") -> None:
    """Forward and backward of some rows of a step."""
    probed = run.config.probe_every and (step + 1) % run.config.probe_every == 0 and not sums.rows
    losses = losses_of(run, receiver, rows, run.phase(step), sums, probe=bool(probed))
    weights = weights_of(run.config, run.phase(step))
    total = torch.stack([weights[name] * loss.sum() for name, loss in losses.items()]).sum() / run.rows_per_step
    torch.autograd.backward(run.scaler.scale(total))
    sums.add(len(rows), {name: float(loss.detach().sum()) for name, loss in losses.items()}, weights)


def weights_of(config: TrainConfig, phase: Phase) -> dict[str, float]:
    """Weight of each objective that is on; the warm start has one."""
    if phase == "align":
        return {"alignment": 1.0}
    names = ("answer", "first_k", "kd", "reconstruction", "continuation", "margin", "diversity", "alignment")
    return {name: weight for name in names if (weight := getattr(config, f"{name}_weight")) > 0}


def losses_of(
    run: Run, receiver: FrozenLM, rows: Sequence[Tokens], phase: Phase, sums: "_Sums", *, probe: bool = False
) -> dict[str, Float[Tensor, " B"]]:
    """Each objective that is on, one loss per row; measures of the answers go to ``sums``."""
    weights = weights_of(run.config, phase)
    # The teacher reads first: while nothing of the student's graph is held.
    taught = teacher_logits(run, receiver, rows) if "kd" in weights else None
    states, mask = run.states.read([row.source for row in rows], multiple=run.multiple)
    sums.tokens += int(mask.sum())
    head = run.bridge.heads[head_key(receiver.name)]
    latents, real = run.bridge.encoder(states, mask)
    soft, slots = head(latents.to(receiver.device)), real.sum(dim=1).tolist()
    losses: dict[str, Tensor] = {}
    if "alignment" in weights:
        words, covered = word_targets(receiver, [row.words for row in rows])
        losses["alignment"] = alignment_loss(soft[:, : words.shape[1]], words, covered)
    if phase == "align":
        return losses
    logits, labels = _read(run, receiver, [row.answer for row in rows], soft, sums)
    losses |= _of_answers(run.config, logits, labels, taught, weights)
    sums.stats.add(logits.detach(), labels)
    if len(rows) > 1 and ("margin" in weights or probe):
        losses |= _against_others(run, receiver, rows, soft, slots, logits, labels, sums)
    if "reconstruction" in weights:
        losses["reconstruction"] = _spoken(run, receiver, "reconstruction", rows, soft, slots, sums)
    if "continuation" in weights:
        # A causal sender's states of the first half are those of the whole source's first half.
        half = torch.tensor([row.half for row in rows], device=mask.device)
        latents, real = run.bridge.encoder(
            states, mask & (torch.arange(mask.shape[1], device=mask.device) < half[:, None])
        )
        soft, slots = head(latents.to(receiver.device)), real.sum(dim=1).tolist()
        losses["continuation"] = _spoken(run, receiver, "continuation", rows, soft, slots, sums)
    return {name: losses[name] for name in weights if name in losses}


def _of_answers(
    config: TrainConfig, logits: Tensor, labels: Tensor, taught: Tensor | None, weights: dict[str, float]
) -> dict[str, Tensor]:
    """The objectives that need no pass but that of the answers."""
    losses: dict[str, Tensor] = {}
    if "answer" in weights:
        losses["answer"] = answer_loss(logits, labels, first_token_weight=config.first_token_weight)
    if "first_k" in weights:
        losses["first_k"] = first_k_loss(logits, labels, k=config.first_k)
    if taught is not None:
        A = min(taught.shape[1], logits.shape[1])
        losses["kd"] = distillation_loss(logits[:, -A:], taught[:, -A:], labels[:, -A:])
    if "diversity" in weights:
        losses["diversity"] = diversity_loss(first_logits(logits, labels)[0])
    return losses


def _against_others(
    run: Run, receiver: FrozenLM, rows: Sequence[Tokens], soft: Tensor, slots: Sequence[int],
    logits: Tensor, labels: Tensor, sums: "_Sums",
) -> dict[str, Tensor]:  # fmt: skip
    """The margin to the latent of the row before; Δ = loss(mismatched) - loss(matched) is noted in ``sums``."""
    others = [slots[i - 1] for i in range(len(rows))]
    answers = [row.answer.with_slots(K) for row, K in zip(rows, others, strict=True)]
    with torch.set_grad_enabled(run.config.margin_weight > 0):
        mismatched = answer_loss(*_read(run, receiver, answers, soft.roll(1, dims=0), sums))
        matched = answer_loss(logits, labels)
    other = [row.source.ids != rows[i - 1].source.ids for i, row in enumerate(rows)]
    different = torch.tensor(other, device=soft.device)
    if any(other):
        sums.delta = float(((mismatched - matched).detach() * different).sum()) / sum(other)
    return {"margin": margin_loss(matched, mismatched, margin=run.config.margin) * different}


def _spoken(
    run: Run, receiver: FrozenLM, mode: str, rows: Sequence[Tokens], soft: Tensor, slots: Sequence[int], sums: "_Sums"
) -> Float[Tensor, " B"]:
    """Cross-entropy of a text after soft tokens and the mode's learned tokens."""
    asked: list[Row] = [getattr(row, mode) for row in rows]
    if run.config.mode_tokens:
        learned = run.modes[f"{head_key(receiver.name)}·{mode}"]
        soft = with_mode(soft, slots, learned, scale=run.bridge.config.heads[receiver.name].embedding_rms)
    return answer_loss(*_read(run, receiver, asked, soft, sums))


def with_mode(
    soft: Float[Tensor, "B K D"], slots: Sequence[int], learned: Float[Tensor, "M D"], *, scale: float
) -> Float[Tensor, "B KM D"]:
    """Soft tokens with a mode's tokens directly after each row's last one, at the receiver's scale."""
    M, D = learned.shape
    tokens = (F.rms_norm(learned, (D,)) * scale).expand(len(soft), M, D).to(soft.dtype)
    at = torch.tensor(slots, device=soft.device)[:, None] + torch.arange(M, device=soft.device)
    return F.pad(soft, (0, 0, 0, M)).scatter(1, at[..., None].expand(-1, -1, D), tokens)


@torch.no_grad()
def teacher_logits(run: Run, receiver: FrozenLM, rows: Sequence[Tokens]) -> Float[Tensor, "B A V"]:
    """Logits of the receiver reading the sources themselves, at the answers' columns only; right-aligned."""
    parts: list[Tensor] = []
    for chunk in chunks(rows, run.config.kd_chunk or len(rows)):
        asked = [row.teacher for row in chunk]
        batch = collate([row for row in asked if row is not None], side="left", multiple=run.multiple)
        parts.append(answer_logits(receiver, batch.to(receiver.device), None, multiple=run.multiple)[0])
    A = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, 0, A - part.shape[1], 0)) for part in parts])


def _read(
    run: Run, receiver: FrozenLM, rows: Sequence[Row], soft: Float[Tensor, "B K D"], sums: "_Sums"
) -> tuple[Float[Tensor, "B A V"], Int[Tensor, "B A"]]:
    sums.tokens += sum(len(row) for row in rows)
    batch = collate(rows, side="left", multiple=run.multiple).to(receiver.device)
    return answer_logits(receiver, batch, soft, multiple=run.multiple)


def _update(run: Run, step: int, refused: bool) -> None:
    """Move the weights, or refuse to: a weight that met a NaN never comes back."""
    run.refused_in_a_row = run.refused_in_a_row + 1 if refused else 0
    share = schedule(run.config, step)
    for optimizer, peak in zip(run.optimizers, rates(run.config), strict=True):
        optimizer.param_groups[0]["lr"] = peak * share
        if not refused:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    run.scaler.update()
    if run.refused_in_a_row == REFUSED_IN_A_ROW:
        raise TrainingFailed(
            f"step {step + 1}: {REFUSED_IN_A_ROW} steps in a row were not finite, none applied; what was saved is kept"
        )


def rates(config: TrainConfig) -> tuple[float, float]:
    """Peak learning rates of the optimisers, in their order."""
    return config.matrix_learning_rate, config.learning_rate


def schedule(config: TrainConfig, step: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to a tenth, in optimiser steps from 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


@dataclass
class _Sums:
    """What a step's forward passes have added up to."""

    rows: int = 0
    tokens: int = 0
    loss: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    stats: AnswerStats = field(default_factory=AnswerStats)
    delta: float | None = None

    def add(self, rows: int, parts: dict[str, float], weights: dict[str, float]) -> None:
        self.rows += rows
        for name, value in parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + value
            self.loss += weights[name] * value

    def share(self, ranks: Ranks, device: torch.device) -> None:
        """Add up losses and tokens over all processes; measures of the answers stay those of this one."""
        if ranks.count == 1:
            return
        numbers = torch.tensor([self.loss, *self.parts.values(), self.tokens], dtype=torch.float64, device=device)
        ranks.all_reduce([numbers])
        self.loss, *parts, tokens = numbers.tolist()
        self.parts, self.tokens = dict(zip(self.parts, parts, strict=True)), int(tokens)

    def averages(self, rows: int) -> dict[str, Any]:
        """The fields of a record that these sums decide."""
        return {
            "loss": self.loss / rows,
            "losses": {name: value / rows for name, value in self.parts.items()},
            "delta_nats": self.delta,
            "tokens": self.tokens,
            **self.stats.summary(),
        }
