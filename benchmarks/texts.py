"""What texts cost: those of answers, decoded whole at every token or as tokens come; and long ones that are read.

All times are those of one core, so that other programs on the machine do not count.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.record import record
from latentwire.bridge.generation.base import CallbackThread
from latentwire.bridge.generation.output import OutputText, OutputTokens
from latentwire.bridge.models import BUILTIN, load_reader
from latentwire.bridge.reader import Reader, text_ids
from latentwire.bridge.sampling import SamplingParams

STREAMS, TOKENS, STEPS = 256, 300, 15
STOPS = {"no stop strings": (), "two stop strings": ("\n\n", "Question:")}
FAMILY = "👨‍👩‍👧‍👦"
TEXT = f"Mara wants a cup of tea. Otto lives in Oslo, and naïve Ben sings in the café; 你好, {FAMILY}. "
CHARACTERS = 100_000  # the most that a service takes unless told otherwise
LONG = {
    "prose": TEXT,
    "underscores": "_",
    "letters without a space": "quickbrownfox",
    "joined emoji": FAMILY,
    "Han": "你好世界",
}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def main() -> None:
    """Measure both and write the result."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in a service
    record(
        "texts", "python -m benchmarks.texts",
        {
            "made": {
                "streams": STREAMS, "tokens": TOKENS,
                "core_milliseconds_a_step": {
                    name: {kind: step(load_reader(name), stop) for kind, stop in STOPS.items()}
                    for name in ("builtin:llama", "builtin:neox")
                },
            },
            "read": {"characters": CHARACTERS, "core_milliseconds": {kind: long(one) for kind, one in kinds().items()}},
        },
    )  # fmt: skip


def kinds() -> dict[str, Tokenizer]:
    """A small tokenizer of each kind."""
    fallback = Tokenizer(models.BPE(byte_fallback=True))
    fallback.train_from_iterator([TEXT.replace(" ", "▁")], trainers.BpeTrainer(vocab_size=600, special_tokens=BYTES))
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    unigram.train_from_iterator(
        [TEXT] * 9, trainers.UnigramTrainer(vocab_size=300, unk_token="?", special_tokens=["?"])
    )
    byte_level = Tokenizer.from_file(str(BUILTIN / "llama" / "tokenizer.json"))
    return {"byte-level BPE": byte_level, "byte-fallback BPE": fallback, "Unigram": unigram}


def long(tokenizer: Tokenizer) -> dict[str, dict[str, float]]:
    """Milliseconds of long texts: read as here, and by the call that lets no other thread run meanwhile."""
    found = {}
    for name, piece in LONG.items():
        text = (piece * CHARACTERS)[:CHARACTERS]
        here, alone = list[float](), list[float]()
        for _ in range(5):
            here.append(timed(lambda: tokenizer.encode_batch_fast([text], add_special_tokens=False)))  # noqa: B023
            alone.append(timed(lambda: tokenizer.encode(text, add_special_tokens=False)))  # noqa: B023
        found[name] = {"here": 1000 * statistics.median(here), "holding_all_threads": 1000 * statistics.median(alone)}
    return found


def step(lm: Reader, stop: tuple[str, ...]) -> dict[str, Any]:
    """Milliseconds of one token for each of the streams, after so many tokens; both ways take turns."""
    ids = (text_ids(lm, TEXT) * TOKENS)[: TOKENS + STEPS]
    params = SamplingParams(max_tokens=2 * TOKENS, stop=stop)
    outputs = [OutputText(OutputTokens(lm, params)) for _ in range(STREAMS)]
    for output in outputs:
        read(output, ids[:TOKENS])
    callbacks = CallbackThread()
    callbacks.close()  # what is given to it is kept, and done by hand
    whole, adding, reading = list[float](), list[float](), list[float]()
    for at in range(TOKENS, TOKENS + STEPS):
        whole.append(timed(lambda: [decode_whole(lm, ids[: at + 1], stop) for _ in outputs]))  # noqa: B023
        adding.append(timed(lambda: [add(output, ids[at], callbacks) for output in outputs]))  # noqa: B023
        reading.append(timed(lambda: [output.read() for output in outputs]))
    before, stepping, off = (statistics.median(seconds) * 1000 for seconds in (whole, adding, reading))
    return {
        "before_on_the_thread_that_steps": before,
        "on_the_thread_that_steps": stepping,
        "on_the_thread_that_tells": off,
        "thread_that_steps_before_over_after": before / stepping,
        "all_before_over_after": before / (stepping + off),
    }


def read(output: OutputText, ids: Sequence[int]) -> None:
    """Tokens read as they come."""
    for token in ids:
        output.tokens.add(token)
        output.read()


def add(output: OutputText, token: int, callbacks: CallbackThread) -> None:
    """What an engine does with a token on the thread that steps."""
    output.tokens.add(token)
    callbacks.submit(partial(OutputText.read, output))


def decode_whole(lm: Reader, ids: Sequence[int], stop: Sequence[str]) -> str:
    """What was done with it there before: the whole answer again, and the last tokens for stop strings."""
    if stop:
        recent = str(lm.tokenizer.decode(list(ids[-4 * max(map(len, stop)) - 8 :]), skip_special_tokens=True))
        assert not any(one in recent for one in stop)
    return str(lm.tokenizer.decode(list(ids), skip_special_tokens=True)).rstrip("\ufffd")


def timed(work: Callable[[], object]) -> float:
    """Seconds of this thread."""
    started = time.thread_time()
    work()
    return time.thread_time() - started


if __name__ == "__main__":
    main()
