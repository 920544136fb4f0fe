"""What a bridge is trained and measured on: sources, prompts and answers.

A task is ``world`` (generated, ships with the product) or a TOML file:

    name = "sst2"
    kind = "classification"                     # or "generation"
    train = "sst2.train.jsonl.gz"               # relative to this file, or a Hub data set: NAME[:CONFIGURATION][@SPLIT]
    test = "sst2.test.jsonl.gz"
    source = "{text}"                           # template over a row's fields
    prompt = "Review: {latent}\\nSentiment:"     # {latent} marks where the soft tokens stand
    label = "label"                             # classification: the row's field, an index or a name …
    labels = ["negative", "positive"]           # … into these
    # answer = "{answer}"                       # generation: template over a row's fields; one may hold a list
"""

import gzip
import hashlib
import json
import re
import tomllib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from latentwire.bridge.errors import InvalidRequest, first_line
from latentwire.bridge.evaluation import world
from latentwire.bridge.prompt import LATENT, REPEAT

FIELD = re.compile(r"\{(\w+)\}")
SUMMARY = "{source}\nSummary:"


@dataclass(frozen=True, slots=True)
class Example:
    """One question about one source.

    Attributes:
        source: The sender's text.
        prompt: The receiver's template, ``{latent}`` where the soft tokens stand.
        answer: What the receiver should say, with the space that leads it.
        label: Index into the task's labels, in a classification.
        also: Other answers that are as right: no one trains on them, and they count where an answer is scored.
    """

    source: str
    prompt: str
    answer: str
    label: int | None = None
    also: tuple[str, ...] = ()

    @property
    def right(self) -> tuple[str, ...]:
        """Every right answer."""
        return (self.answer, *self.also)


@dataclass(frozen=True)
class Task:
    """Examples of two splits, and how to score them.

    Attributes:
        labels: Every possible answer of a classification, as the task file names them; empty for generation.
        template: The prompt template with its fields unfilled; the checkpoint's layout is made from it.
        reconstruction: Template of the second objective, in which the receiver repeats the source.
        relay: What the sender reads when it writes a summary for the receiver; holds ``{source}``.
        max_answer_tokens: Most tokens an answer may take when it is generated.
        data_sha256: Digest of the data, or of the generator's version and seed.
    """

    name: str
    kind: Literal["classification", "generation"]
    train: Sequence[Example]
    test: Sequence[Example]
    template: str
    data_sha256: str
    labels: tuple[str, ...] = ()
    reconstruction: str = REPEAT
    relay: str = SUMMARY
    max_answer_tokens: int = 32

    @property
    def generated(self) -> bool:
        """Whether examples are made as they are read, and hardly ever repeat."""
        return isinstance(self.train, World)


def load_task(name: str) -> Task:
    """``world``, or the path of a task file.

    Raises:
        InvalidRequest: No such task, or its file or a row of its data is wrong; the field is named.
    """
    if name == "world":
        return world_task()
    path = Path(name)
    if path.suffix != ".toml" or not path.is_file():
        why = "; there is no such file" if path.suffix == ".toml" else ""
        raise InvalidRequest(f"task {name!r} is neither 'world' nor the path of a .toml file{why}", param="task")
    return _file_task(path)


class World(Sequence[Example]):
    """A split of the world, made as it is read: example i is a pure function of (split, seed, i)."""

    def __init__(self, split: world.Split, size: int, *, seed: int = 0) -> None:
        self.split, self.size, self.seed = split, size, seed

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.size))]
        if not 0 <= index < self.size:
            raise IndexError(index)
        scene = world.scene(self.split, self.seed, index)
        question, answer = scene.questions[index * 7919 % len(scene.questions)]
        return Example(scene.source, world.QUESTION.replace("{question}", question), f" {answer}")


def world_task() -> Task:
    """The built-in task: facts of 4 to 8 subjects, one question; no test fact is in the training split."""
    digest = hashlib.sha256(Path(world.__file__).read_bytes()).hexdigest()
    return Task(
        name="world",
        kind="generation",
        train=World("train", 1_000_000),
        test=World("test", 500),
        template=world.QUESTION,
        data_sha256=digest,
        reconstruction=world.REPEAT,
        relay=world.REPEAT.replace(LATENT, "{source}"),
        max_answer_tokens=24,
    )


class TaskFile(BaseModel):
    """The fields of a task file; an unknown one is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Literal["classification", "generation"]
    train: str = Field(min_length=1)
    test: str = Field(min_length=1)
    source: str
    prompt: str
    answer: str | None = None
    label: str | None = None
    labels: list[str] = []
    reconstruction: str = REPEAT
    relay: str = SUMMARY
    max_answer_tokens: int = Field(32, ge=1, le=4096)

    @model_validator(mode="after")
    def _scored_one_way(self) -> "TaskFile":
        if self.kind == "classification" and (self.label is None or len(self.labels) < 2 or self.answer is not None):
            raise ValueError("a classification needs 'label' and at least two 'labels', and no 'answer'")
        if self.kind == "generation" and (self.answer is None or self.label is not None or self.labels):
            raise ValueError("a generation needs 'answer', and neither 'label' nor 'labels'")
        if self.prompt.count(LATENT) > 1:
            raise ValueError(f"'prompt' holds {LATENT} {self.prompt.count(LATENT)} times; expected once at most")
        if len({label.strip() for label in self.labels} - {""}) < len(self.labels):
            raise ValueError(f"'labels' must differ and not be blank, got {self.labels}")
        if self.reconstruction.count(LATENT) != 1 or self.relay.count("{source}") != 1:
            raise ValueError(f"'reconstruction' must hold {LATENT} once, and 'relay' {{source}} once")
        return self


def _file_task(path: Path) -> Task:
    try:
        spec = TaskFile.model_validate(tomllib.loads(path.read_text()))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path}: not TOML: {error}", param="task") from None
    except ValidationError as error:
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InvalidRequest(f"{path}: {field}: {first['msg']}", param="task") from None
    digest = hashlib.sha256()
    splits: dict[str, list[Example]] = {}
    for split, where in (("train", spec.train), ("test", spec.test)):
        rows = list(_rows(path.parent, where, split, digest))
        if not rows:
            raise InvalidRequest(f"{path}: {split} = {where!r} holds no row", param="task")
        splits[split] = [_example(spec, row, f"{where} row {number}") for number, row in enumerate(rows, start=1)]
    return Task(
        name=spec.name,
        kind=spec.kind,
        train=splits["train"],
        test=splits["test"],
        template=spec.prompt,
        data_sha256=digest.hexdigest(),
        labels=tuple(spec.labels),
        reconstruction=spec.reconstruction,
        relay=spec.relay,
        max_answer_tokens=spec.max_answer_tokens,
    )


def _rows(folder: Path, where: str, split: str, digest: Any) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL file beside the task file, or of a Hub data set's split."""
    if not where.endswith((".jsonl", ".jsonl.gz")):
        yield from _hub_rows(folder, where, split, digest)
        return
    path = folder / where
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{split} = {where!r}: {error.strerror} ({path})", param="task") from None
    digest.update(data)
    try:
        lines = (gzip.decompress(data) if where.endswith(".gz") else data).decode().split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}", param="task") from None
    for number, line in enumerate(lines if lines[-1] else lines[:-1], start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{path} line {number} is not JSON: {error}", param="task") from None
        if not isinstance(row, dict):
            raise InvalidRequest(f"{path} line {number} is {type(row).__name__}; expected an object", param="task")
        yield row


def _hub_rows(folder: Path, where: str, split: str, digest: Any) -> Iterator[dict[str, Any]]:
    """Rows of ``NAME[:CONFIGURATION][@SPLIT]``; a folder of that name beside the task file comes first."""
    import datasets  # late: it takes a second, and most tasks are files

    rest, _, chosen = where.partition("@")
    name, _, configuration = rest.partition(":")
    name = str(folder / name) if (folder / name).is_dir() else name
    try:
        rows = datasets.load_dataset(name, configuration or None, split=chosen or split)
    except Exception as error:  # the library's own tree is wide: connection, parsing, configuration, not found
        reason = f"neither a .jsonl[.gz] file nor a readable Hub data set ({first_line(error)})"
        raise InvalidRequest(f"{split} = {where!r} is {reason}", param="task") from None
    digest.update(rows._fingerprint.encode())
    yield from (dict(row) for row in rows)


def _example(spec: TaskFile, row: dict[str, Any], where: str) -> Example:
    source, prompt = _fill(spec.source, row, where), _fill(spec.prompt, row, where)
    if prompt.count(LATENT) > spec.prompt.count(LATENT):
        raise InvalidRequest(f"{where}: a field put a {LATENT} of its own into the prompt", param="task")
    if not source.strip():
        raise InvalidRequest(f"{where}: the source is empty; expected a text", param="task")
    if spec.answer is not None:
        answer, *also = dict.fromkeys(answer_text(prompt, one) for one in _answers(spec.answer, row, where))
        return Example(source, prompt, answer, also=tuple(also))
    assert spec.label is not None
    index = _label(spec, _field(row, spec.label, where), where)
    return Example(source, prompt, answer_text(prompt, spec.labels[index]), index)


def _answers(template: str, row: dict[str, Any], where: str) -> list[str]:
    """The template filled once, or once for each value of a field that holds a list (InvalidRequest: one is empty)."""
    lists = [name for name in FIELD.findall(template) if isinstance(row.get(name), list)]
    if len(set(lists)) > 1:
        raise InvalidRequest(f"{where}: fields {' and '.join(lists)} hold lists; expected one at most", param="task")
    each = [row] if not lists else [{**row, lists[0]: value} for value in row[lists[0]]]
    answers = [_fill(template, one, where) for one in each]
    if not answers:
        raise InvalidRequest(f"{where}: field {lists[0]!r} is []; expected at least one text", param="task")
    if not all(answer.strip() for answer in answers):
        raise InvalidRequest(f"{where}: the answer is empty; expected a text", param="task")
    return answers


def _label(spec: TaskFile, value: Any, where: str) -> int:
    if value in spec.labels:
        return spec.labels.index(value)
    if type(value) is int and 0 <= value < len(spec.labels):
        return value
    message = f"{where}: label {value!r} is neither one of {spec.labels} nor an index into them"
    raise InvalidRequest(message, param="task")


def _field(row: dict[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise InvalidRequest(f"{where} has no field {name!r}; it has {', '.join(row)}", param="task")
    return row[name]


def _fill(template: str, row: dict[str, Any], where: str) -> str:
    def value(match: re.Match[str]) -> str:
        if match[0] == LATENT:
            return match[0]
        field = _field(row, match[1], where)
        if not isinstance(field, str | int | float):
            raise InvalidRequest(f"{where}: field {match[1]!r} is {field!r:.80}; expected a text", param="task")
        return str(field)

    return FIELD.sub(value, template)


def answer_text(prompt: str, answer: str) -> str:
    """The answer as it follows the prompt: one space between them, wherever the task wrote it."""
    return answer if answer[:1].isspace() or prompt[-1:].isspace() else f" {answer}"
