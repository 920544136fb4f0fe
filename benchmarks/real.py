"""Real text between pretrained models: bridges trained and measured beside what their receiver does without them.

Without ``--models`` two tiny models are the pair, on SST-2 and AG News, with every control: what runs is the command
line, as a user types it. With ``--models DIR`` every two models of the folder are a pair in both directions, on every
task of ``TASKS``. A run that is in the results file already is not made again, unless ``--again`` says so: a benchmark
of hours can be stopped at any moment and goes on where it was. With each run stands the command that makes it.

Models and data are no part of the project: they are looked for in a folder beside the checkout (``--material``).
"""

import gzip
import json
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import permutations, product
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.record import RESULTS, command_of, record
from benchmarks.several import SOURCES, among
from latentwire.bridge import engine
from latentwire.bridge.bridge import Bridge
from latentwire.bridge.evaluation.conditions import CONDITIONS, soft_tokens
from latentwire.bridge.evaluation.context import EvaluationContext, open_context
from latentwire.bridge.evaluation.evaluate import progress_bar
from latentwire.bridge.evaluation.measure import measure
from latentwire.bridge.evaluation.metrics import token_f1
from latentwire.bridge.prompt import collate
from latentwire.bridge.wire import DType
from latentwire.training.controls import train_controls
from latentwire.training.journal import LOG, read_jsonl
from latentwire.training.objectives import answer_mask
from latentwire.training.quantise import fit_codebooks

Row = dict[str, Any]
console = Console()


@dataclass(frozen=True)
class RealTask:
    """A task on real text.

    Attributes:
        data: Stem of its files; None for the built-in world.
        fields: Of its task file, but name and splits; empty ``labels`` are those of the training rows.
        recipe: Flags of ``latentwire train`` between pretrained models, on a few hundred steps of one core.
        row: Makes a row of the task from one of the data, or leaves it out; the data's own, unless given.
        nats: Whether the answer is measured as nats per token, being one of many that would do.
    """

    data: str | None
    fields: dict[str, Any]
    recipe: str
    row: Callable[[Row], Row | None] | None = None
    nats: bool = False


def _labelled(before: str, after: str, labels: list[str]) -> dict[str, Any]:
    asked = {"source": "{text}", "prompt": f"{before}: {{latent}}\n{after}:"}
    return {"kind": "classification", **asked, "label": "label", "labels": labels}


def _answered(source: str, prompt: str, answer: str, tokens: int) -> dict[str, Any]:
    return {"kind": "generation", "source": source, "prompt": prompt, "answer": answer, "max_answer_tokens": tokens}


def _halves(row: Row) -> Row:
    """A story's beginning and the sentence after it."""
    sentences = " ".join(row["text"].split()).split(". ")
    middle = max(1, len(sentences) // 2)
    return {
        "begun": ". ".join(sentences[:middle]) + ".",
        "next": ". ".join(sentences[middle : middle + 2]) or "The end.",
    }


def _named(row: Row) -> Row:
    """Labels as one writes them."""
    return {**row, "label": row["label"].replace("_", " ").strip(" ?").lower()}


BRIEF = "--max-steps 320 --batch-size 32 --alignment-steps 0 --reconstruction-weight 0 --hidden-dim 320"
SHORT = "--max-steps 160 --batch-size 8 --alignment-steps 0 --reconstruction-weight 0 --hidden-dim 320"
LONG = "--max-steps 160 --batch-size 8 --alignment-steps 60 --reconstruction-weight 0 --hidden-dim 320"
TASKS = {
    "sst2": RealTask("sst2", _labelled("Review", "Sentiment", ["negative", "positive"]), SHORT),
    "agnews": RealTask(
        "agnews_small", _labelled("News", "Topic", ["world", "sports", "business", "technology"]), SHORT
    ),
    "banking77": RealTask("banking77", _labelled("Query", "Intent", []), BRIEF, _named),
    "squad": RealTask(
        "squad2_devhalf",
        _answered("{context}", "Text: {latent}\nQuestion: {question}\nAnswer:", "{answers}", 24),
        LONG,
        lambda row: row if row["answers"] else None,
    ),
    "tinystories": RealTask(
        "tinystories_1k", _answered("{begun}", "{latent}\nGo on:", "{next}", 64), LONG, _halves, nats=True
    ),
    "facts": RealTask(None, {}, LONG),
}
MATERIAL = Path(__file__).resolve().parents[2] / "shared"
SENDER, RECEIVER = "stories260k-llama", "gpt2-mini-2m"
TINY = (
    "--encoder perceiver --num-latents 8 --layer 0 --layer 3 --max-steps 600 --batch-size 32 "
    "--matrix-learning-rate 0.005 --first-token-weight 1 --reconstruction-weight 0"
)
DTYPES: tuple[DType, ...] = ("int8", "int4", "rq8", "rq4", "rq2")
READ = 40  # sources that are read back
CODED_EXAMPLES = 1000  # training sources that codebooks are fitted to
MEASURED = ("bridge", "direct", "same_budget", "none", "mismatched", "noise")
BRIEFLY = ("bridge", "direct", "none", "mismatched")


def task_file(name: str, material: Path, folder: Path) -> str:
    """Write the task file of one of ``TASKS``, with the rows it makes, into ``folder``; its path, or ``world``."""
    task = TASKS[name]
    if task.data is None:
        return "world"
    files = {split: material.resolve() / "data" / f"{task.data}.{split}.jsonl.gz" for split in ("train", "test")}
    if task.row is not None:
        for split, file in files.items():
            rows = map(task.row, map(json.loads, gzip.open(file, "rt", encoding="utf-8")))
            files[split] = folder / f"{name}.{split}.jsonl"
            files[split].write_text("".join(json.dumps(row) + "\n" for row in rows if row), encoding="utf-8")
    if task.fields.get("labels") == []:
        named = {json.loads(line)["label"] for line in files["train"].read_text(encoding="utf-8").splitlines()}
        task = replace(task, fields={**task.fields, "labels": sorted(named)})
    fields = {"name": name, **{split: str(path) for split, path in files.items()}, **task.fields}
    toml = folder / f"{name}.toml"
    toml.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in fields.items()), encoding="utf-8")
    return str(toml)


def typed(command: str) -> None:
    """Run a command of ``latentwire`` as a user would."""
    subprocess.run([sys.executable, "-m", *shlex.split(command)], check=True)


def tiny_pair(material: Path, limit: int, name: str) -> None:
    """Train a bridge between the tiny models and record its report against every condition and control."""
    models = material.resolve() / "models"
    with tempfile.TemporaryDirectory() as folder:
        file = task_file(name, material, Path(folder))
        commands = [
            f"latentwire train --sender {models}/{SENDER} --receiver {models}/{RECEIVER} "
            f"--task {file} --out {folder}/bridge {TINY}",
            f"latentwire evaluate {folder}/bridge --task {file} --limit {limit} --controls --out {folder}/report.json",
        ]
        for command in commands:
            typed(command)
        report = json.loads((Path(folder) / "report.json").read_text())
        shown = [line.replace(folder, "runs").replace(str(models), "models") for line in commands]
    record(
        f"real-{name}",
        f"python -m benchmarks.real --task {name} --limit {limit}",
        {"sender": SENDER, "receiver": RECEIVER, "typed": shown, "report": {**report, "checkpoint": "runs/bridge"}},
    )


def nats_per_token(context: EvaluationContext) -> dict[str, dict[str, Any]]:
    """Mean cross-entropy of the wanted answers under each condition, in nats per token; smaller is better."""
    found: dict[str, dict[str, Any]] = {}
    for name in MEASURED:
        nats, tokens = 0.0, 0
        for start in range(0, len(context.examples), 8):
            chosen = range(start, min(start + 8, len(context.examples)))
            readings = CONDITIONS[name].read(context, chosen)
            rows = context.rows(chosen, readings, [context.examples[i].answer for i in chosen])
            with context.lender.lend(context.receiver) as receiver, torch.inference_mode():
                batch, soft = collate(rows, side="left"), soft_tokens(context, receiver, readings)
                logits, labels = engine.answer_logits(receiver, batch.to(receiver.device), soft)
            nats = nats + float(engine.token_losses(logits, labels).sum())
            tokens += int(answer_mask(labels).sum())
        found[name] = {"metric": "nats_per_token", "value": nats / tokens}
    return found


@contextmanager
def loaded(checkpoint: str | Path) -> Iterator[Bridge]:
    """A bridge with its models, which are let go."""
    bridge = Bridge.load(checkpoint, precision="fp32")
    try:
        yield bridge
    finally:
        bridge.unload()


def by_dtype(context: EvaluationContext, task: str, unquantised: float) -> list[Row]:
    """What the bridge scores where its latents travel in fewer bytes, with codebooks fitted to training sources."""
    with loaded(context.checkpoint) as bridge, progress_bar(console) as progress:
        books, left = fit_codebooks(bridge, task, count=8, examples=CODED_EXAMPLES, progress=progress)
    coded, rows = replace(context, bridge=replace(context.bridge, codebooks=books)), []
    for dtype in DTYPES:
        report = measure(replace(coded, dtype=dtype), conditions=("bridge",))
        score, sizes = report["conditions"]["bridge"], report["bytes"]
        rows.append(
            {
                "dtype": dtype,
                "bytes": sizes["latent"],
                "bytes_per_source_byte": sizes["latent"] / sizes["source"],
                "score": score,
                "kept": score["value"] / unquantised if unquantised else None,
            }
        )
    return [{"codebooks_left": left, "codebooks_examples": CODED_EXAMPLES}, *rows]


def read_back(bridge: Bridge, sources: list[str]) -> Row:
    """What the receiver takes latents to say, held against their own sources, and each against another's."""
    readings = bridge.read(sources, against=sources, truncate=True)
    said, nats = [one.text for one in readings], [-one.against.mean for one in readings if one.against]
    others = [*sources[1:], sources[0]]
    scores = {name: statistics.fmean(map(token_f1, said, held)) for name, held in (("own", sources), ("other", others))}
    return {"n": len(sources), "token_f1": scores, "nats_per_token": statistics.fmean(nats), "readings": said[:5]}


def run_once(
    pair: tuple[Path, Path],
    name: str,
    ratio: int,
    seed: int,
    *,
    material: Path,
    limit: int,
    controls: list[str],
    extra: str,
    keep: Path | None,
    brief: bool,
) -> dict[str, Any]:
    """Train a bridge on one task, and measure it; its checkpoint stays where there is a folder to KEEP it in.

    ``brief`` leaves out what does not tell two bridges apart: two conditions, and the bytes of codes.
    """
    sender, receiver = pair
    kept = keep and keep / f"{sender.name}-{receiver.name}-{name}-{ratio}-{seed}"
    with nullcontext(str(kept)) if kept else tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        file = task_file(name, material, folder)
        command = (
            f"latentwire train --sender {sender} --receiver {receiver} --task {file} --out {folder}/bridge "
            f"{TASKS[name].recipe} --ratio {ratio} --seed {seed} --precision fp32 --cache-features "
            f"--max-source-tokens 256 --validate-every 0 {extra}"
        ).strip()
        began = time.perf_counter()
        typed(command)
        ended = time.perf_counter()
        steps = [line for line in read_jsonl(folder / "bridge" / LOG)]
        context = open_context(folder / "bridge", file, limit=limit, dtype="float16", receiver=None, precision="fp32")
        if len(steps) < (wanted := context.bridge.config.provenance.recipe["max_steps"]):
            sys.exit(f"the run was stopped after {len(steps)} of {wanted} steps; nothing of it is recorded")
        if TASKS[name].nats:
            report: dict[str, Any] = {"n": len(context.examples), "conditions": nats_per_token(context)}
        else:
            trained = train_controls(context, console, controls) if controls else {}
            with progress_bar(console) as progress:
                conditions = BRIEFLY if brief else MEASURED
                report = measure(context, conditions=conditions, trained=trained, progress=progress)
            most = context.bridge.config.provenance.recipe["sources_per_example"]
            if name == "facts" and most > 1:
                with loaded(folder / "bridge") as asked:
                    report["several"] = [among(asked, count, limit // 2) for count in SOURCES if count <= most]
            if not brief:
                with loaded(folder / "bridge") as asked:
                    report["read_back"] = read_back(asked, [one.source for one in context.examples[:READ]])
                report["by_dtype"] = by_dtype(context, file, report["conditions"]["bridge"]["value"])
        events = read_jsonl(folder / "bridge" / "events.jsonl")
        alarms = [line["message"] for line in events if line["event"] == "alarm"]
    made_by = {"typed": command, "alarms": alarms, "report": {**report, "checkpoint": f"{folder}/bridge"}}
    paths = {str(folder): "runs", str(sender.parent): "models"}
    return {
        **json.loads(re.sub("|".join(map(re.escape, paths)), lambda found: paths[found[0]], json.dumps(made_by))),
        "train_seconds": round(ended - began, 1),
        "evaluate_seconds": round(time.perf_counter() - ended, 1),
        "step_seconds": round(statistics.median(line["seconds"] for line in steps), 3),
        "losses": [round(statistics.fmean(line["loss"] for line in part), 4) for part in _fifths(steps)],
        "threads": torch.get_num_threads(),
    }


def _fifths(steps: list[Row]) -> Iterator[list[Row]]:
    size = max(1, len(steps) // 5)
    return (steps[start : start + size] for start in range(0, len(steps), size))


def table(runs: list[Row]) -> Table:
    """What each condition reached, averaged over seeds; a dash where one was not measured."""
    shown = Table(title="between pretrained models: means over seeds")
    names = dict.fromkeys([*MEASURED, *(name for run in runs for name in run["report"]["conditions"])])
    for heading in ("pair", "task", "ratio", "seeds", "metric", *names):
        shown.add_column(heading)
    groups: dict[tuple[str, str, int, str], list[Row]] = {}
    for run in runs:
        pair = f"{run['sender']} → {run['receiver']}"
        groups.setdefault((pair, run["task"], run["ratio"], run.get("extra", "")), []).append(run)
    for (pair, task, ratio, extra), same in groups.items():
        rows = [run["report"]["conditions"] for run in same]
        values = [
            f"{statistics.fmean(row[name]['value'] for row in rows):.3f}" if all(name in row for row in rows) else "–"
            for name in names
        ]
        named = f"{task} {extra}".strip()
        shown.add_row(pair, named, str(ratio), str(len(same)), rows[0]["bridge"]["metric"], *values)
    return shown


def between_models(
    models: Path, material: Path, limit: int, names: list[str], ratios: list[int], seeds: int, senders: list[str],
    controls: list[str], extra: str, keep: Path | None, again: bool, brief: bool,
) -> None:  # fmt: skip
    """Every pair, task, ratio and seed that is not in the newest results file; each is recorded once it is done."""
    asked = {"models": "models", "limit": limit, "control": controls, "extra": extra, "keep": keep and "kept"}
    asked |= {"again": again, "brief": brief}
    folders = sorted(path.parent for path in models.resolve().glob("*/config.json"))
    pairs = [pair for pair in permutations(folders, 2) if not senders or pair[0].name in senders]
    written = sorted(RESULTS.glob("real-models-20*.json"))
    runs: list[Row] = json.loads(written[-1].read_text())["runs"] if written else []
    wanted = list(product(range(seeds), pairs, names, ratios))
    for number, (seed, pair, name, ratio) in enumerate(wanted, start=1):
        key = {"sender": pair[0].name, "receiver": pair[1].name, "task": name, "ratio": ratio, "seed": seed}
        key |= {"extra": extra} if extra else {}
        same = [run for run in runs if {**run, **key} == run and run.get("extra", "") == extra]
        if same and not again:
            continue
        console.print(f"run {number} of {len(wanted)}: {key}", markup=False, highlight=False, soft_wrap=True)
        try:
            made = run_once(
                pair, name, ratio, seed, material=material, limit=limit, controls=controls, extra=extra, keep=keep,
                brief=brief,
            )  # fmt: skip
        except subprocess.CalledProcessError:  # it has said why: a task need not fit every model
            console.print("left out")
            continue
        one = {"sender": pair[0].name, "task": name, "ratio": ratio, "seeds": seed + 1}
        runs = [run for run in runs if run not in same]
        runs.append({**key, "command": command_of("real", **asked, **one), **made})
        every = {"sender": senders, "task": names, "ratio": ratios, "seeds": seeds}
        record("real-models", command_of("real", **asked, **every), {"runs": runs})
    Console(width=160).print(table(runs))


def main(
    material: Path = MATERIAL,
    limit: int = 1000,
    task: list[str] | None = None,
    models: Path | None = None,
    ratio: list[int] | None = None,
    seeds: int = 1,
    sender: list[str] | None = None,
    control: list[str] | None = None,
    extra: str = "",
    keep: Path | None = None,
    again: bool = False,
    brief: bool = False,
) -> None:
    """Train and measure bridges on each TASK: between tiny models, or between all those in the folder MODELS.

    With MODELS: at each RATIO (4), for so many SEEDS, from the SENDERs named (all), with EXTRA flags of training.
    CONTROLs are those of ``latentwire evaluate``, trained beside each bridge (none). Checkpoints stay in KEEP. What is
    recorded is not made again, unless asked for AGAIN. BRIEF measures four conditions and no codes.
    """
    if models is None:
        for name in task or ("sst2", "agnews"):
            tiny_pair(material, limit, name)
        return
    between_models(
        models, material, limit, task or list(TASKS), ratio or [4], seeds, sender or [], control or [], extra, keep,
        again, brief,
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
