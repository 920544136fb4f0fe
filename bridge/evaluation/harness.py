"""A bridge as a model of lm-evaluation-harness: its tasks and tables, with our conditions in the latent's place.

The harness asks in plain text. Where the text of a document (its *source*) stands in what it asks, the latent of that
text stands instead, or what another condition puts there. So a task's own prompt stays as it is, examples before the
question included; only the source is read by the sender.
"""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import apply_template
from pydantic import TypeAdapter, ValidationError
from rich.progress import track

from latentwire.bridge import engine, scoring
from latentwire.bridge.errors import InvalidRequest, shorten
from latentwire.bridge.evaluation.conditions import CONDITIONS, Condition, scored, soft_tokens
from latentwire.bridge.evaluation.context import EvaluationContext, Lender, Reading, open_bridge
from latentwire.bridge.evaluation.leaks import check_inputs
from latentwire.bridge.evaluation.tasks import Example, Task
from latentwire.bridge.prompt import LATENT
from latentwire.bridge.sampling import SamplingParams
from latentwire.bridge.wire import as_dtype

ANYWHERE = "cuda:0"  # what the harness says where nobody has said anything
MAX_GEN_TOKENS = 256  # of an answer, where a task sets no limit: the harness's own default


@dataclass(frozen=True)
class Template:
    """Where a task's documents hold what the sender reads; Jinja over a document's fields, as in the harness.

    Attributes:
        source: The sender's text.
        prompt: What the receiver is asked, with ``{latent}``; None for what the harness asks, in which the latent then
            stands where the source stood last.
    """

    source: str
    prompt: str | None = None


TEMPLATES = {
    "boolq": Template("{{passage}}", "{latent}\nQuestion: {{question}}?\nAnswer:"),
    "squad_completion": Template("{{text.strip().rpartition('. ')[0]}}."),
    "drop": Template("{{passage}}"),
    "arc_*": Template("{{question}}"),
    "longbench_*": Template("{{context}}"),
}
"""Of tasks by name; the first pattern that fits. ``templates=FILE`` names more, which come before these."""


def templates_of(file: str | None) -> dict[str, Template]:
    """A TOML file of tables ``[TASK]`` with ``source`` and perhaps ``prompt``, and behind it ``TEMPLATES``.

    Raises:
        InvalidRequest: No such file, or a table is wrong.
    """
    if file is None:
        return TEMPLATES
    try:
        tables = tomllib.loads(Path(file).read_text())
        given = TypeAdapter(dict[str, Template]).validate_python(tables)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"templates={file}: not TOML: {error}", param="templates") from None
    except ValidationError as error:
        at = ".".join(map(str, error.errors()[0]["loc"]))
        raise InvalidRequest(f"templates={file}: {at}: {error.errors()[0]['msg']}", param="templates") from None
    for name, template in given.items():
        if template.prompt is not None and template.prompt.count(LATENT) != 1:
            raise InvalidRequest(f"templates={file}: {name}.prompt must hold {LATENT} once", param="templates")
    return {**given, **{name: template for name, template in TEMPLATES.items() if name not in given}}


@register_model("latentwire")
class BridgeLM(LM):  # type: ignore[misc]
    """The receiver of a bridge, asked about documents under one condition.

    Args:
        checkpoint: A checkpoint folder, or ``builtin``.
        condition: What stands in the source's place: a name in ``conditions.CONDITIONS``.
        receiver: Which receiver answers; the first one, unless given.
        dtype: What latents travel in.
        templates: A TOML file of templates for other tasks; see ``templates_of``.
        batch_size: Rows of one pass; ``auto`` leaves the choice here.
        device: Where models compute, as of ``bridge.devices``; ``cuda:0`` is the best there is.
        precision: What in; as of ``bridge.devices``.

    Raises:
        LatentWireError: A checkpoint or model cannot be loaded, or an argument is none.
    """

    def __init__(
        self,
        checkpoint: str = "builtin",
        condition: str = "bridge",
        receiver: str | None = None,
        dtype: str = "float16",
        templates: str | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
        precision: str | None = None,
    ) -> None:
        super().__init__()
        if condition not in CONDITIONS:
            raise InvalidRequest(f"condition={condition}: expected one of {', '.join(CONDITIONS)}", param="condition")
        self.condition: Condition = CONDITIONS[condition]
        self.templates = templates_of(templates)
        self.rows = int(batch_size) if str(batch_size).isdecimal() else (max_batch_size or scoring.SCORED_ROWS)
        place = None if device == ANYWHERE else device
        opened = open_bridge(checkpoint, dtype=as_dtype(dtype), receiver=receiver, device=place, precision=precision)
        nothing = Task("harness", "generation", (), (), LATENT, "", max_answer_tokens=0)
        lender = Lender()
        lender.batch_rows = self.rows
        self.context = EvaluationContext(task=nothing, examples=(), lender=lender, **opened)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is what greedy decoding says; no end is scored."""
        results: dict[int, tuple[float, bool]] = {}
        for asked in self._asked(requests, [0] * len(requests)):
            questions = []
            for i, reading, numbers in asked.each():
                texts = [requests[number].args[1] for number in numbers]
                rows = asked.context.rows([i] * len(texts), [reading] * len(texts), texts)
                questions.append(rows if asked.context.layout.eos_id is None else [row[:-1] for row in rows])
            found = scored(asked.context, asked.readings, questions)
            for (_, _, numbers), continuations in zip(asked.each(), found, strict=True):
                for number, one in zip(numbers, continuations, strict=True):
                    results[number] = one.logprob, one.greedy
        return [self._told("loglikelihood", requests[number], results[number]) for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Refused: the whole text is scored, and a latent has no place in it (InvalidRequest)."""
        raise InvalidRequest(
            f"task {requests[0].task_name!r} scores whole texts (loglikelihood_rolling), in which no source stands "
            "before what is said; expected a task of another output type"
        )

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What the receiver says to each request, up to the first of its stop strings; greedy unless sampling is on."""
        params = [self._params(request.args[1]) for request in requests]
        results: dict[int, str] = {}
        for asked in self._asked(requests, [one.max_tokens for one in params]):
            wanted = [(i, reading, number) for i, reading, numbers in asked.each() for number in numbers]
            rows = asked.context.rows([i for i, _, _ in wanted], [r for _, r, _ in wanted], [None] * len(wanted))
            with asked.context.lender.lend(asked.context.receiver) as receiver:
                soft = soft_tokens(asked.context, receiver, [reading for _, reading, _ in wanted])
                said, _ = engine.generate(receiver, rows, soft, [params[number] for _, _, number in wanted])
            results |= {number: one.text for (_, _, number), one in zip(wanted, said, strict=True)}
        return [self._told("generate_until", requests[number], results[number]) for number in range(len(requests))]

    def _told(self, kind: str, request: Instance, result: Any) -> Any:
        self.cache_hook.add_partial(kind, request.args, result)
        return result

    def _params(self, given: Mapping[str, Any]) -> SamplingParams:
        until = given.get("until") or ()
        stops = (until,) if isinstance(until, str) else tuple(stop for stop in until if stop)
        most = min(int(given.get("max_gen_toks", MAX_GEN_TOKENS)), self.context.receiver.max_tokens // 2)
        if not given.get("do_sample"):
            return SamplingParams(most, stop=stops)
        drawn = float(given.get("temperature", 1.0)), float(given.get("top_p", 1.0)), int(given.get("top_k", 0))
        return SamplingParams(most, *drawn, stop=stops)

    def _asked(self, requests: Sequence[Instance], rooms: Sequence[int]) -> Iterator["_Asked"]:
        """Documents of one task after the other, batch by batch, with what the condition puts in the source's place.

        ``rooms`` are the tokens that each answer may take beside the receiver's input.
        """
        batches: list[tuple[EvaluationContext, range, list[list[int]]]] = []
        for task in dict.fromkeys(request.task_name for request in requests):
            own: dict[tuple[Any, str], list[int]] = {}
            for number, request in enumerate(requests):
                if request.task_name == task:
                    own.setdefault((request.doc_id, request.args[0]), []).append(number)
            examples = [
                self._example(str(task), requests[numbers[0]].doc, prompt) for (_, prompt), numbers in own.items()
            ]
            room = max(rooms[number] for numbers in own.values() for number in numbers)
            context = replace(
                self.context, examples=examples, task=replace(self.context.task, name=str(task), max_answer_tokens=room)
            )
            asked = self.condition.asked(context)
            if why := self.condition.missing(asked):
                message = f"condition {self.condition.name} cannot be had of task {task!r}: {why}"
                raise InvalidRequest(message, param="condition")
            groups = list(own.values())
            for start in range(0, len(groups), self.rows):
                chosen = range(start, min(start + self.rows, len(groups)))
                batches.append((asked, chosen, groups[chosen.start : chosen.stop]))
        for asked, chosen, numbers in track(batches, description=f"latentwire, {self.condition.name}"):
            readings = [
                reading if asked.examples[i].prompt else None
                for i, reading in zip(chosen, self.condition.read(asked, chosen), strict=True)
            ]
            if self.condition.name == "bridge":
                told = [(i, reading) for i, reading in zip(chosen, readings, strict=True) if reading is not None]
                check_inputs(asked, [i for i, _ in told], [reading for _, reading in told])
            yield _Asked(asked, chosen, readings, numbers)

    def _example(self, task: str, doc: Mapping[str, Any], prompt: str) -> Example:
        """A document and what is asked about it. Asked nothing, as for mutual information, there is no place for it."""
        template = next((one for pattern, one in self.templates.items() if fnmatch(task, pattern)), None)
        if template is None:
            raise InvalidRequest(
                f"task {task!r} has no template; say what the sender reads in a file for templates=FILE: "
                f'[{task}] source = "{{{{FIELD}}}}"; its documents have {", ".join(doc)}',
                param="templates",
            )
        source = apply_template(template.source, doc)
        if not source.strip():
            raise InvalidRequest(f"task {task!r}: {template.source!r} of a document is empty; expected a text")
        if prompt and template.prompt is not None:
            return Example(source, apply_template(template.prompt, doc), "")
        before, found, after = prompt.rpartition(source)
        if prompt and not found:
            raise InvalidRequest(
                f"what task {task!r} asks does not hold its source {shorten(source, 60)!r}; "
                f"give a prompt with {LATENT} in its template",
                param="templates",
            )
        return Example(source, before + LATENT + after if prompt else "", "")


@dataclass(frozen=True, eq=False)
class _Asked:
    """Some documents of a task, what stands in their source's place, and the requests about each."""

    context: EvaluationContext
    chosen: range
    readings: list[Reading]
    numbers: list[list[int]]

    def each(self) -> Iterator[tuple[int, Reading, list[int]]]:
        return zip(self.chosen, self.readings, self.numbers, strict=True)
