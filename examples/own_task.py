"""Train and measure a bridge on data of your own: a task file, ``train``, ``evaluate``.

The data here is made on the spot: is an order large or small? Replace the two files by yours.
"""

import argparse
import json
import random
from pathlib import Path

import latentwire

TASK = """
name = "orders"
kind = "classification"
train = "train.jsonl"                      # beside this file
test = "test.jsonl"
source = "{text}"                          # what the sender reads
prompt = "{latent}\\nThe order is"         # what the receiver reads; soft tokens stand at {latent}
label = "label"
labels = ["large", "small"]
"""

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--folder", type=Path, default=Path("runs/orders"), help="Where data and bridge are written.")
parser.add_argument("--steps", type=int, default=200, help="Optimiser steps.")
parser.add_argument("--limit", type=int, default=100, help="Test examples.")
options = parser.parse_args()

rng = random.Random(0)
options.folder.mkdir(parents=True, exist_ok=True)
for split, count in (("train", 2000), ("test", 200)):
    sizes = [rng.choice([rng.randint(1, 9), rng.randint(100, 999)]) for _ in range(count)]
    rows = [{"text": f"Mara wants {size} boats.", "label": 0 if size > 9 else 1} for size in sizes]
    (options.folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
task = options.folder / "task.toml"
task.write_text(TASK)

run = latentwire.train(
    sender="builtin:neox", receiver="builtin:llama", task=task, out=options.folder / "bridge", overwrite=True,
    max_steps=options.steps, batch_size=8,
)  # fmt: skip
report = latentwire.evaluate(run.bridge(), task, limit=options.limit)
report.save(options.folder / "report.html")
print(report)
