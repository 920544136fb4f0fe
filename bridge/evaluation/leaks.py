"""How an answer can reach a receiver around the bridge: an evaluation in which one does is stopped.

Each of these has made published gains that were none.
"""

from collections.abc import Sequence
from dataclasses import replace

from latentwire.bridge.detokenise import decode
from latentwire.bridge.errors import LeakFound, shorten
from latentwire.bridge.evaluation.conditions import Condition
from latentwire.bridge.evaluation.context import EvaluationContext, Reading
from latentwire.bridge.prompt import TEXT, Row

CHECKED = 8  # examples answered again with other gold answers
CHECKED_INPUTS = 5000  # receiver inputs put together again: .24 ms each of the world's, so little over a second


def looked_at(count: int) -> range:
    """Which of ``count`` receiver inputs ``check_inputs`` is for: all, or ``CHECKED_INPUTS`` at most, spread evenly."""
    return range(0, count, max(1, -(-count // CHECKED_INPUTS)))


def check_inputs(context: EvaluationContext, chosen: Sequence[int], latents: Sequence[Reading]) -> int:
    """Check that the chosen receiver inputs are those of ``none`` but for the soft tokens; how many were.

    Raises:
        LeakFound: Something of the source, or of anything else, came with the latent.
    """
    empty: list[str | None] = [None]
    for i, latent in zip(chosen, latents, strict=True):
        (with_latent,), (without,) = context.rows([i], [latent], empty), context.rows([i], empty, empty)
        told, alone = (_without_blanks(context, row) for row in (with_latent, without))
        if told != alone or all(slot == TEXT for slot in with_latent.slots):
            raise LeakFound(
                f"example {i + 1}: beside its soft tokens the receiver reads {shorten(told, 100)!r} where the prompt "
                f"alone is {shorten(alone, 100)!r}; they must be equal"
            )
    return len(chosen)


def _without_blanks(context: EvaluationContext, row: Row) -> str:
    """The text of a row; a space before soft tokens is left out, so blanks are no difference."""
    return "".join(decode(context.receiver, row.text_ids, special=True).split())


def check_answers(
    context: EvaluationContext, condition: Condition, readings: Sequence[Reading], said: Sequence[str]
) -> int:
    """Check that the first answers are the same with other gold answers and labels in another order; how many were.

    Raises:
        LeakFound: An answer depends on the one that is wanted, its length, or on where its label stands.
    """
    count, rows = min(CHECKED, len(said)), context.lender.batch_rows or CHECKED
    task = replace(context.task, labels=context.task.labels[::-1])
    unlike = [replace(e, answer=" ?", label=None, also=()) for e in context.examples]
    other = replace(context, task=task, examples=unlike)
    for start in range(0, count, rows):
        chosen = range(start, min(start + rows, count))
        for i, again in zip(chosen, condition.answer(other, chosen, readings[start : chosen.stop]), strict=True):
            if said[i] != again:
                first, second = shorten(said[i], 80), shorten(again, 80)
                raise LeakFound(
                    f"example {i + 1}: the answer is {first!r}, and {second!r} where another "
                    "one is wanted and the labels are in another order; it must not depend on either"
                )
    return count
