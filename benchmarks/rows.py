"""A receiver's step on a CPU: each row over its own keys against all rows under a mask.

``python -m benchmarks.rows --model DIR``. Prompts of like length are read first, and then every row gets a token a
step: what a step takes, and how many tokens a second came from the first prompt to the last token. Both ways take
turns.
"""

import statistics
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any

import torch
import typer

from benchmarks.record import command_of, record
from latentwire.bridge.config import Mode
from latentwire.bridge.errors import LatentWireError
from latentwire.bridge.generation.output import Generation
from latentwire.bridge.generation.select import open_engine
from latentwire.bridge.models import FrozenLM, load_model
from latentwire.bridge.prompt import IGNORE, TEXT, Row
from latentwire.bridge.sampling import SamplingParams

CASES = ((1, 300), (8, 300), (32, 100), (32, 300))  # rows, and tokens of a prompt
ANSWER_TOKENS = 32
MODES: tuple[Mode, ...] = ("plain", "paged")


def answered(lm: FrozenLM, mode: Mode, rows: int, context: int) -> dict[str, float]:
    """Answer so many prompts at once: tokens a second, and milliseconds of a step in which each row got a token."""
    engine = open_engine(lm, max_rows=rows, kv_tokens=32_768, mode=mode, required="continuous")
    took, ended = list[float](), SimpleQueue[Generation | LatentWireError]()
    engine.on_step = lambda made, tokens, seconds: took.append(seconds) if made == tokens == rows else None
    started = time.perf_counter()
    for number in range(rows):
        ids = [(7 * place + 13 * number) % (lm.rows - 8) + 4 for place in range(context)]
        row = Row(ids, [TEXT] * context, [IGNORE] * context)
        engine.submit(row, SamplingParams(max_tokens=ANSWER_TOKENS), None, ended.put)
    tokens = 0
    for _ in range(rows):
        if isinstance(answer := ended.get(), LatentWireError):
            raise answer
        tokens += answer.token_count
    seconds = time.perf_counter() - started
    engine.close()
    return {"tokens_per_second": tokens / seconds, "step_ms": 1000 * statistics.median(took)}


def main(model: Annotated[str, typer.Option()], threads: int = 1, rounds: int = 3) -> None:
    """Measure ROUNDS of both ways for each number of rows, and record them."""
    torch.set_num_threads(threads)
    lm = load_model(model, device=torch.device("cpu"))
    found: dict[str, Any] = {}
    for rows, context in CASES:
        all_of: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
        for _ in range(rounds):
            for mode in MODES:
                all_of[mode].append(answered(lm, mode, rows, context))
        median = {
            mode: {what: statistics.median(one[what] for one in made) for what in made[0]}
            for mode, made in all_of.items()
        }
        faster = median["paged"]["tokens_per_second"] / median["plain"]["tokens_per_second"]
        found[f"{rows} rows of {context} tokens"] = {**median, "paged_over_plain": faster, "rounds": all_of}
        print(
            rows, context, {mode: {k: round(v, 1) for k, v in one.items()} for mode, one in median.items()}, flush=True
        )
    short = Path(model).name
    record(
        f"rows-{short}",
        command_of("rows", model=short, threads=threads, rounds=rounds),
        {"threads": threads, "steps": found},
    )


if __name__ == "__main__":
    typer.run(main)
