"""How soon a first token comes from a stored latent, against its text read anew and against its text's keys and values.

Asked of sources of 384 and 2,000 sender tokens: at least twice as soon as from the cold text between the built-in
models, four times between pretrained ones; the prefix-cached text, the real rival, is reported. The bridge is trained
for one step: what it says does not matter here, and how long that takes does not depend on its weights.
"""

import gzip
import json
import tempfile
from itertools import cycle
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.real import MATERIAL, typed
from benchmarks.record import record
from latentwire.bridge.evaluation.context import open_context
from latentwire.bridge.evaluation.evaluate import progress_bar
from latentwire.bridge.evaluation.latency import latency
from latentwire.bridge.models import load_reader
from latentwire.bridge.reader import text_ids

TASK = """name = "long"
kind = "generation"
train = "rows.jsonl"
test = "tests.jsonl"
source = "{text}"
prompt = "Text: {latent}\\nQuestion: {question}\\nAnswer:"
answer = "{answer}"
max_answer_tokens = 24
"""
ROWS = 24
console = Console()


def write_task(folder: Path, sender: str, length: int, material: Path) -> Path:
    """Texts of Wikipedia, cut to so many sender tokens, with a question about each."""
    reader = load_reader(sender)
    file = material.resolve() / "data" / "squad2_devhalf.train.jsonl.gz"
    paragraphs = [json.loads(line) for line in gzip.open(file, "rt", encoding="utf-8")]
    texts = cycle(dict.fromkeys(row["context"] for row in paragraphs))
    rows = []
    for number in range(2 * ROWS):
        text = next(texts)
        while len(text_ids(reader, text)) < length:
            text += "\n" + next(texts)
        cut: Any = reader.tokenizer.decode(text_ids(reader, text)[:length], skip_special_tokens=True)
        asked = paragraphs[number]
        rows.append({"text": cut, "question": asked["question"], "answer": (asked["answers"] or ["nothing"])[0]})
    for name, part in (("rows", rows[:ROWS]), ("tests", rows[ROWS:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    (folder / "long.toml").write_text(TASK)
    return folder / "long.toml"


def measured(sender: str, receiver: str, length: int, batch: list[int], repeats: int, material: Path) -> dict[str, Any]:
    """Latency of every side on sources of so many sender tokens."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        task = write_task(folder, sender, length, material)
        typed(
            f"latentwire train --sender {sender} --receiver {receiver} --task {task} --out {folder}/bridge "
            f"--max-steps 1 --batch-size 1 --alignment-steps 0 --reconstruction-weight 0 --validate-every 0 "
            f"--max-source-tokens {length + 32} --max-examples 2"
        )
        context = open_context(folder / "bridge", str(task), limit=None, dtype="float16", receiver=None)
        with progress_bar(console) as progress:
            return {"sender_tokens": length, **latency(context, batch_sizes=batch, repeats=repeats, progress=progress)}


def main(
    sender: str = "builtin:neox",
    receiver: str = "builtin:llama",
    length: list[int] | None = None,
    batch: list[int] | None = None,
    repeats: int = 10,
    material: Path = MATERIAL,
) -> None:
    """Measure sources of each LENGTH (384) in sender tokens, at each BATCH (1 and 8)."""
    found = [measured(sender, receiver, one, batch or [1, 8], repeats, material) for one in length or [384]]
    names = [Path(name).name.removeprefix("builtin:") for name in (sender, receiver)]
    flags = " ".join(f"--length {one['sender_tokens']}" for one in found)
    record(
        f"latency-{'-'.join(names)}",
        f"python -m benchmarks.latency --sender {names[0]} --receiver {names[1]} {flags} --repeats {repeats}",
        {"sender": names[0], "receiver": names[1], "runs": found},
    )
    shown = Table("sender tokens", "batch", "side", "first token, p50 ms", "p95", "stored is sooner by")
    for one in found:
        for size, sides in one["batches"].items():
            stored = sides["stored"]["first_ms"]["p50"]
            for name, times in sides.items():
                first = times["first_ms"]
                cells = (one["sender_tokens"], size, name, first["p50"], first["p95"], f"{first['p50'] / stored:.2f} ×")
                shown.add_row(*map(str, cells))
    console.print(shown)


if __name__ == "__main__":
    typer.run(main)
