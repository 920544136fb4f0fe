"""One optimiser step, on one screen: batch → forward → loss → backward → clip → step → log.

A step is defined by its rows, not by how they are cut: every loss is a row's own, summed and divided by all rows of
the step, so that a smaller forward pass, more processes, or a retry after running out of memory change nothing but
rounding.

Dimensions used in this file:
    B batch
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from latentwire.bridge.devices import is_out_of_memory
from latentwire.bridge.errors import TrainingFailed
from latentwire.bridge.models import FrozenLM
from latentwire.training.config import TrainConfig
from latentwire.training.data import chunks
from latentwire.training.machine import Ranks, clear_gradients, memory_of
from latentwire.training.monitor import AnswerStats, StepRecord
from latentwire.training.objectives import NEEDS, OBJECTIVES, weights_of
from latentwire.training.run import Forward, Phase, Run, taught
from latentwire.training.tokens import Tokens
from latentwire.training.utilisation import peak_flops, receiver_flops

log = logging.getLogger(__name__)

REFUSED_IN_A_ROW = 5  # refused steps after which a run is dead; fp16 looks for its scale in the first ones


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
    seconds, peak = waited + time.perf_counter() - started, peak_flops(receiver.device)
    return StepRecord(
        step=step + 1,
        phase=run.phase(step),
        receiver=name,
        **sums.averages(run.rows_per_step),
        gradient_norm=norm,
        learning_rate=rate,
        seconds=seconds,
        flops_per_second=sums.flops / seconds,
        mfu=None if peak is None else sums.flops / seconds / (peak * run.ranks.count),
        data_wait_seconds=waited,
        **asdict(memory_of(receiver.device)),
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
        again = "step %d: out of memory (%s); the same rows again in passes of %d"
        log.warning(again, step + 1, reason, run.micro_batch)


def _pass(run: Run, step: int, receiver: FrozenLM, rows: Sequence[Tokens], sums: "_Sums") -> None:
    """Forward and backward of some rows of a step."""
    phase, every = run.phase(step), run.config.probe_every
    probe = phase == "answer" and every > 0 and (step + 1) % every == 0 and not sums.rows
    losses, weights = losses_of(run, receiver, rows, phase, sums, probe=probe), weights_of(run.config, phase)
    total = torch.stack([weights[name] * loss.sum() for name, loss in losses.items()]).sum() / run.rows_per_step
    torch.autograd.backward(run.scaler.scale(total))
    sums.add(len(rows), {name: float(loss.detach().sum()) for name, loss in losses.items()}, weights)


def losses_of(
    run: Run, receiver: FrozenLM, rows: Sequence[Tokens], phase: Phase, sums: "_Sums", *, probe: bool = False
) -> dict[str, Float[Tensor, " B"]]:
    """Each objective that is on, one loss per row; measures of the answers go to ``sums``.

    ``probe`` measures loss(mismatched) - loss(matched) also where the margin is off.
    """
    weights = weights_of(run.config, phase)
    wanted = [made for name, made in OBJECTIVES.items() if name in weights or (probe and name == "margin")]
    # The teacher reads first: while nothing of the student's graph is held.
    teacher = taught(run, receiver, rows) if any(objective.taught for objective in wanted) else None
    forward = Forward(run, receiver, rows, sums.stats.add, teacher)
    losses = {
        objective.name: objective.loss(forward)
        for objective in sorted(wanted, key=lambda objective: NEEDS.index(objective.needs))
        if len(rows) > 1 or objective.needs != "others"
    }
    sums.tokens += forward.tokens
    sums.flops += forward.flops
    if teacher is not None:
        sums.flops += receiver_flops(receiver, [row.teacher for row in rows if row.teacher], gradient=False)
    sums.delta = sums.delta if forward.delta is None else forward.delta
    return {name: losses[name] for name in weights if name in losses}


def _update(run: Run, step: int, refused: bool) -> None:
    """Move the weights, or refuse to: a weight that met a NaN never comes back."""
    run.refused_in_a_row = run.refused_in_a_row + 1 if refused else 0
    share = schedule(run.config, step)
    peaks = (run.config.matrix_learning_rate, run.config.learning_rate)
    for optimizer, peak in zip(run.optimizers, peaks, strict=True):
        optimizer.param_groups[0]["lr"] = peak * share
        if not refused:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    run.scaler.update()
    if run.refused_in_a_row == REFUSED_IN_A_ROW:
        failed = f"{REFUSED_IN_A_ROW} steps in a row were not finite, none applied; what was saved is kept"
        raise TrainingFailed(f"step {step + 1}: {failed}")


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
    flops: int = 0
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
        """Add up losses, tokens and operations over all processes; measures of the answers stay those of this one."""
        if ranks.count == 1:
            return
        counts = [self.loss, *self.parts.values(), self.tokens, self.flops]
        numbers = torch.tensor(counts, dtype=torch.float64, device=device)
        ranks.all_reduce([numbers])
        self.loss, *parts, tokens, flops = numbers.tolist()
        self.parts, self.tokens, self.flops = dict(zip(self.parts, parts, strict=True)), int(tokens), int(flops)

    def averages(self, rows: int) -> dict[str, Any]:
        """The fields of a record that these sums decide."""
        return {
            "loss": self.loss / rows,
            "losses": {name: value / rows for name, value in self.parts.items()},
            "delta_nats": self.delta,
            "tokens": self.tokens,
            **self.stats.summary(),
        }
