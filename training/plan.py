"""What a training run will hold in memory at its fullest moment, from the configurations of its models alone.

The step is its own formula: ``take_step`` runs on models whose tensors have shapes but no bytes, and what is alive is
noted at every allocation. At each such moment memory is linear in the rows of a forward pass and in the blocks of the
receiver, so two batch sizes and two depths give ``fixed + rows × per_row`` exactly; the peak is the highest of these
lines. Nothing here knows a model family or an objective, so nothing here can drift from the step.

It runs with a CPU's attention kernels, since a machine that plans need not have an accelerator: flash, which keeps the
same tensors for the backward pass as flash and memory-efficient attention on CUDA.
"""

from dataclasses import dataclass, field

from rich.table import Table

from latentwire.training.base import check_adapted, completed
from latentwire.training.config import TrainConfig
from latentwire.training.simulate import PARTS, Cost, Lengths, moments_of, total

USABLE = 0.94  # share of a device that tensors can have; driver, kernels and fragments take the rest


@dataclass(frozen=True)
class Plan:
    """Memory of a run.

    Attributes:
        batch_size: Rows of a forward pass.
        moments: Those at which some batch size is at its peak; each says what is alive then.
        device_bytes: What the device has, or None.
        others: Plans of the same run with other settings, by what is different.
    """

    batch_size: int
    moments: tuple[Cost, ...]
    device_bytes: int | None = None
    others: dict[str, "Plan"] = field(default_factory=dict)

    def fullest(self, rows: int) -> Cost:
        """What is alive at the peak with ``rows`` rows."""
        return max(self.moments, key=lambda moment: total(moment)[0] + rows * total(moment)[1])

    def peak_bytes(self, rows: int | None = None) -> int:
        """Peak in bytes, with ``batch_size`` rows unless said otherwise."""
        rows = self.batch_size if rows is None else rows
        fixed, row = total(self.fullest(rows))
        return fixed + rows * row


def largest_batch(plan: Plan, budget_bytes: int) -> int:
    """Most rows of a forward pass within a budget; 0 when not even one fits."""
    return max(0, min((budget_bytes - fixed) // max(row, 1) for fixed, row in map(total, plan.moments)))


def plan(
    config: TrainConfig,
    *,
    source_tokens: int,
    prompt_tokens: int,
    answer_tokens: int,
    device_bytes: int | None = None,
    compare: bool = False,
) -> Plan:
    """Predict the peak memory of one process of a run; only configurations are read.

    An upper bound where ``kd_chunk`` splits the teacher's pass, which is counted as one, and for weights that
    ``fsdp``, ``device_map`` or ``memory_budget`` keep elsewhere. A sender under ``cache_features`` costs nothing: it
    is gone before the first step.

    Args:
        config: The run.
        source_tokens: Longest source, in tokens of the sender; the receiver is taken to need as many.
        prompt_tokens: Receiver tokens of the longest prompt, its BOS included.
        answer_tokens: Receiver tokens of the longest answer, its EOS included.
        device_bytes: Memory of the device, for ``table``.
        compare: Also plan the run with each setting changed that saves or costs memory, for ``table``.

    Raises:
        ModelUnavailable: No such model, or no causal language model.
        InvalidRequest: A layer the sender does not have.
    """
    lengths, config = Lengths(source_tokens, prompt_tokens, answer_tokens), completed(config)
    check_adapted(config)
    others = {
        name: Plan(config.batch_size, moments_of(config.model_copy(update=update), lengths), device_bytes)
        for name, update in (_changes(config) if compare else {}).items()
    }
    return Plan(config.batch_size, moments_of(config, lengths), device_bytes, others)


def _changes(config: TrainConfig) -> dict[str, dict[str, bool | float]]:
    """Each setting that changes memory and no example, the other way round; and the two that save, together."""
    recomputed, cached, taught = config.gradient_checkpointing, config.cache_features, config.kd_weight > 0
    told = ("with", "without")
    changes: dict[str, dict[str, bool | float]] = {
        f"{told[recomputed]} --gradient-checkpointing": {"gradient_checkpointing": not recomputed},
        f"{told[cached]} --cache-features": {"cache_features": not cached},
        f"{told[taught]} distillation": {"kd_weight": 0.0 if taught else 1.0},
    }
    if config.sender_lora:  # no cache holds what it changes
        del changes[f"{told[cached]} --cache-features"]
    elif not (recomputed or cached):
        changes["with both of the first two"] = {"gradient_checkpointing": True, "cache_features": True}
    return changes


def table(made: Plan) -> Table:
    """A plan for people: each term, the total, and what would fit."""
    rows, budget = made.batch_size, int(USABLE * (made.device_bytes or 0))
    shown = Table(title=f"peak memory of a step with {rows} rows in a forward pass")
    for name in ("", "fixed GB", "GB per row", f"GB at {rows}"):
        shown.add_column(name, justify="right" if name else "left")
    moment = made.fullest(rows)
    for part in PARTS:
        fixed, row = moment.get(part, (0, 0))
        if fixed or row:
            shown.add_row(part, _gb(fixed), _gb(row), _gb(fixed + rows * row))
    fixed, row = total(moment)
    shown.add_section()
    shown.add_row("total", _gb(fixed), _gb(row), _gb(fixed + rows * row), style="bold")
    if made.device_bytes:
        verdict = "fits" if fixed + rows * row <= budget else "does not fit"
        shown.add_row(f"device ({USABLE:.0%} of {_gb(made.device_bytes)} usable): {verdict}", "", "", _gb(budget))
        shown.add_section()
        for name, other in {"largest batch as configured": made, **made.others}.items():
            shown.add_row(name, "", "", str(largest_batch(other, budget)))
    return shown


def _gb(count: int) -> str:
    return f"{count / 1e9:.3f}"
