"""Measure a bridge in this process: ``evaluate``, and the report it gives."""

import shlex
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bar

from latentwire.bridge import wire
from latentwire.bridge.bridge import Bridge
from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.evaluation.conditions import CONDITIONS
from latentwire.bridge.evaluation.context import EvaluationContext, Lender, check_room
from latentwire.bridge.evaluation.heldout import check_labels, held_out
from latentwire.bridge.evaluation.html import save
from latentwire.bridge.evaluation.measure import Progress, measure
from latentwire.bridge.evaluation.report import table
from latentwire.bridge.evaluation.tasks import Task, load_task
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.reader import Reader


@dataclass(frozen=True)
class ConditionResult:
    """What one condition reached.

    >>> report = latentwire.evaluate(latentwire.Bridge.load(), limit=1, conditions=["none"])
    >>> report.conditions["none"].metric
    'em'

    Attributes:
        metric: ``em`` (exact match) or ``accuracy``.
        value: Its mean over the examples, 0 to 1.
        low: Lower end of the 95 % interval; None where there are too few examples for one.
        high: Upper end.
        ttft_ms: Median milliseconds to the first token, one request at a time; None where no model speaks.
        token_f1: Mean token F1 of generated answers; None for a classification.
    """

    metric: str
    value: float
    low: float | None
    high: float | None
    ttft_ms: float | None
    token_f1: float | None = None


@dataclass(frozen=True)
class Report:
    """An evaluation: every number beside those it has to be compared with.

    >>> report = latentwire.evaluate(latentwire.Bridge.load(), task="world", limit=2, conditions=["bridge", "none"])
    >>> report.conditions["bridge"].value > report.conditions["none"].value
    True

    ``document`` holds all of it as ``latentwire evaluate --out`` writes it.
    """

    document: Mapping[str, Any] = field(repr=False)

    @property
    def conditions(self) -> dict[str, ConditionResult]:
        """The result of each condition, by its name."""
        names = [field.name for field in fields(ConditionResult)]
        rows = self.document["conditions"].items()
        return {condition: ConditionResult(**{k: row[k] for k in names if k in row}) for condition, row in rows}

    @property
    def content_share(self) -> float | None:
        """Part of the bridge's gain over ``none`` that another example's latent does not give; None without a gain."""
        share: float | None = self.document["content_share"]
        return share

    def save(self, path: str | Path) -> None:
        """Write the report, whole or not at all: as a page where the name ends in .html or .htm, else as JSON.

        Raises:
            InvalidRequest: The file cannot be written.
        """
        save(Path(path), self.document)

    def __repr__(self) -> str:
        return f"Report({self.document['checkpoint']} on {self.document['task']}: {', '.join(self.conditions)})"

    def __rich__(self) -> Any:
        return table(self.document)

    def __str__(self) -> str:
        console = Console(width=150)
        with console.capture() as shown:
            console.print(table(self.document))
        return shown.get()


class BridgeLender(Lender):
    """Lends a bridge's own models; ``waited_seconds`` is what their loading took."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge

    @contextmanager
    def lend(self, reader: Reader) -> Iterator[FrozenLM]:
        """A model for one pass (errors as ``Bridge.lend``)."""
        asked = time.perf_counter()
        with self._bridge.lend(reader.name) as lm:
            self.waited_seconds += time.perf_counter() - asked
            yield lm


def evaluate(
    bridge: Bridge | str | Path,
    task: str | Path = "world",
    *,
    limit: int | None = None,
    conditions: Collection[str] | None = None,
    receiver: str | None = None,
    dtype: str = "float16",
    on_progress: Progress | None = None,
) -> Report:
    """Measure a bridge on a task, beside what its receiver reaches without it.

    >>> latentwire.evaluate(latentwire.Bridge.load(), limit=1, conditions=["bridge"]).document["n"]
    1

    At a terminal a progress bar shows how far it is, unless ``on_progress`` is told.

    Args:
        bridge: The bridge, or the name of its checkpoint.
        task: ``world``, or a task file (.toml).
        limit: Use the first so many test examples; all of them, unless given.
        conditions: What the receiver gets to see; every condition, unless given.
        receiver: Which receiver answers; the first one, unless given.
        dtype: What latents travel in: float16, int8, int4 or float32; with codebooks rq2, rq4 or rq8.
        on_progress: Called with the condition, the examples done and those in all.

    Raises:
        InvalidRequest: No such task or condition, or the task does not suit the receiver.
        LatentWireError: A model cannot be loaded, or is not the one the bridge was trained with.
    """
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise InvalidRequest(f"limit is {limit!r}; expected 1 or more", param="limit")
    known = ", ".join(CONDITIONS)
    if isinstance(conditions, str) or (conditions is not None and not conditions):
        raise InvalidRequest(f"conditions is {conditions!r}; expected a list out of {known}", param="conditions")
    if unknown := [name for name in conditions or () if name not in CONDITIONS]:
        raise InvalidRequest(f"no condition is called {unknown[0]!r}; there are {known}", param="conditions")
    bridge = bridge if isinstance(bridge, Bridge) else Bridge.load(bridge)
    context = context_of(
        bridge,
        load_task(str(task)),
        BridgeLender(bridge),
        receiver,
        limit,
        wire.sendable(dtype, bridge.model.codebooks),
    )
    flags = {"task": task, "limit": limit, "receiver": receiver, "dtype": dtype}
    given = (f"--{name} {shlex.quote(str(value))}" for name, value in flags.items() if value is not None)
    asked: dict[str, Any] = {
        "conditions": conditions,
        "keep_examples": True,
        "command": " ".join(["latentwire evaluate", shlex.quote(bridge.name), *given]),
    }
    if on_progress is not None:
        document = measure(context, progress=on_progress, **asked)
    else:
        with progress_bar(Console(stderr=True)) as progress:
            document = measure(context, progress=progress, **asked)
    if not document["conditions"]:
        whys = "; ".join(f"no {name!r}: {why}" for name, why in document["left_out"].items())
        raise InvalidRequest(f"nothing can be measured ({whys})", param="conditions")
    return Report(document)


def context_of(
    bridge: Bridge,
    task: Task,
    lender: Lender,
    receiver: str | None = None,
    limit: int | None = None,
    dtype: wire.DType = "float16",
) -> EvaluationContext:
    """What an evaluation of a bridge runs on, with models lent for each pass (InvalidRequest, UnknownBridge)."""
    name = bridge.receiver(receiver)
    bridge.check_scores(name)
    check_room(task, bridge.reader(name))
    check_labels(task, bridge.model.config.heads[name].layout)
    held = held_out(task, limit)
    return EvaluationContext(
        checkpoint=bridge.name,
        task=task,
        examples=held.examples,
        dropped=held.dropped,
        bridge=bridge.model,
        bridge_id=bridge.manifest.bridge_id,
        sender=bridge.reader(bridge.sender),
        receiver_name=name,
        receiver=bridge.reader(name),
        lender=lender,
        dtype=dtype,
        gate=bridge.gates.get(name),
    )


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """A bar that shows how far an evaluation is, at a terminal."""
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        line = bar.add_task("evaluating", total=None)
        yield lambda name, done, total: bar.update(line, description=name, completed=done, total=total)
