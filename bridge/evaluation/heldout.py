"""Which test examples are fit to be measured on: those that were not trained on and whose prompt tells no answer."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from latentwire.bridge.config import Layout
from latentwire.bridge.errors import InvalidRequest, LeakFound
from latentwire.bridge.evaluation.metrics import normalise
from latentwire.bridge.evaluation.tasks import Example, Task
from latentwire.bridge.prompt import LATENT

NEAR = 0.7  # Jaccard similarity of two sources' word triples from which they count as one text: a word or two differ
LIKE = 0.5  # estimated similarity from which it is counted out
PERMUTATIONS = 64
MOST_VISIBLE = 0.1  # share of examples whose prompt may hold the answer by chance

WHY = {
    "duplicate": "they are training examples too",
    "near_duplicate": "nearly the same text is a training example",
    "answer_in_prompt": "the prompt holds the answer",
}
"""Why an example is no test, as reports say it."""


@dataclass(frozen=True)
class HeldOut:
    """Test examples, and how many were left out, by why."""

    examples: Sequence[Example]
    dropped: dict[str, int]


def held_out(task: Task, limit: int | None) -> HeldOut:
    """The first ``limit`` test examples that are not in the training split and whose prompts do not hold the answer.

    A generated task, whose splits share no fact, is taken as it is.

    Raises:
        InvalidRequest: No example is left.
        LeakFound: More than ``MOST_VISIBLE`` of the prompts hold the answer: it is not chance.
    """
    count = limit or len(task.test)
    if task.generated:
        return HeldOut(task.test[:count], {})
    whys = ((why, example) for example, why in zip(task.test, _trained_on(task), strict=True))
    kept: list[Example] = []
    dropped: Counter[str] = Counter()
    for why, example in whys:
        why = why or ("answer_in_prompt" if is_visible(task, example) else "")
        if why:
            dropped[why] += 1
        elif len(kept) < count:
            kept.append(example)
    visible = dropped["answer_in_prompt"]
    if visible > MOST_VISIBLE * (visible + len(task.test) - sum(dropped.values())):
        raise LeakFound(
            f"task {task.name!r}: the prompt of {visible} of {len(task.test)} test examples holds the answer itself; "
            "expected it in the source alone (answers that the prompt lists are labels of a classification)"
        )
    if not kept:
        why = ", ".join(f"{number} {name}" for name, number in dropped.items()) or "it is empty"
        raise InvalidRequest(f"task {task.name!r}: no test example is left ({why})", param="task")
    return HeldOut(kept, dict(dropped))


def _trained_on(task: Task) -> list[str]:
    """For each test example why it is none: a ``duplicate`` or ``near_duplicate`` of a training example, or neither.

    The same prompt about another source is another example, and so is another prompt about the same source.
    """
    from datasketch import MinHashLSH  # late: with all that it imports

    exact = {_digest(example) for example in task.train}
    near = MinHashLSH(threshold=LIKE, num_perm=PERMUTATIONS)
    whys = ["duplicate" if _digest(example) in exact else "" for example in task.test]
    with near.insertion_session() as session:
        for i, sketch in enumerate(_sketches(task.test)):
            session.insert(i, sketch)
    for trained, sketch in zip(task.train, _sketches(task.train), strict=True):
        for i in near.query(sketch):
            same = not whys[i] and task.test[i].prompt == trained.prompt
            if same and _similarity(task.test[i].source, trained.source) >= NEAR:
                whys[i] = "near_duplicate"
    return whys


def _digest(example: Example) -> bytes:
    return hashlib.sha256(f"{normalise(example.source)}\0{example.prompt}".encode()).digest()


def _triples(text: str) -> set[str]:
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[at : at + 3]) for at in range(max(1, len(words) - 2))}


def _sketches(examples: Sequence[Example]) -> Sequence[Any]:
    from datasketch import MinHash

    return list(
        MinHash.bulk(
            ([triple.encode() for triple in _triples(example.source)] for example in examples), num_perm=PERMUTATIONS
        )
    )


def _similarity(one: str, other: str) -> float:
    a, b = _triples(one), _triples(other)
    return len(a & b) / len(a | b)


def is_visible(task: Task, example: Example) -> bool:
    """Whether the prompt alone gives a right answer away: it holds it, and none of the other labels."""
    shown = f" {normalise(example.prompt.replace(LATENT, ' '))} "
    right = {normalise(answer) for answer in example.right} - {""}
    if not any(f" {answer} " in shown for answer in right):
        return False
    others = {normalise(label) for label in task.labels} - right - {""}
    return not any(f" {other} " in shown for other in others)


def check_labels(task: Task, layout: Layout) -> None:
    """Refuse labels of which one begins another where no end of the answer is scored (InvalidRequest, naming both)."""
    labels = sorted(label.strip() for label in task.labels)
    pairs = pairwise(labels)
    if layout.eos_id is None and (pair := next((p for p in pairs if p[1].startswith(p[0])), None)):
        raise InvalidRequest(
            f"the label {pair[0]!r} begins {pair[1]!r}, and this receiver ends no answer: the shorter would always win",
            param="task",
        )
