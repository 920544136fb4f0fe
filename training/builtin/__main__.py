"""Make one of the built-in models: ``python -m latentwire.training.builtin llama --out bridge/builtin/llama``."""

import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from latentwire.bridge.evaluation import world
from latentwire.training.builtin.documents import END, Piece, document
from latentwire.training.builtin.recipe import RECIPES, Recipe, optimisers

WINDOW = 8
"""Batches are cut from this many batches of documents sorted by length: two in five tokens were padding without."""

Batch = tuple[torch.Tensor, torch.Tensor]
Row = tuple[list[int], list[float]]


def encode(pieces: list[Piece], tokenizer: PreTrainedTokenizerFast) -> Row:
    """A document as ids, BOS first, and the loss weight of each id as a target."""
    ids, weights, plain = [tokenizer.bos_token_id], [0.0], tokenizer.backend_tokenizer
    for text, weight in pieces:
        new = [tokenizer.eos_token_id] if text == END else plain.encode(text, add_special_tokens=False).ids
        ids += new
        weights += [weight] * len(new)
    return ids, weights


def collate(rows: list[Row], pad: int) -> Batch:
    """Right-padded ids and weights, both [B, T]; causal attention never looks at the padding."""
    width = max(len(ids) for ids, _ in rows)
    ids = [ids + [pad] * (width - len(ids)) for ids, _ in rows]
    weights = [weights + [0.0] * (width - len(weights)) for _, weights in rows]
    return torch.tensor(ids), torch.tensor(weights)


def batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Batch]:
    """One batch per step, each of documents of about the same length, a pure function of the seed."""
    size, window = recipe.batch, WINDOW * recipe.batch
    for start in range(0, recipe.steps, WINDOW):
        stage, first = recipe.stage(start), start * size
        drawn = (document(seed, index, stage, recipe.max_questions) for index in range(first, first + window))
        rows = sorted((encode(pieces, tokenizer) for pieces in drawn), key=lambda row: len(row[0]))
        for part in Random(f"window/{seed}/{start}").sample(range(WINDOW), min(WINDOW, recipe.steps - start)):
            yield collate(rows[part * size : (part + 1) * size], tokenizer.pad_token_id)


def train_step(
    model: PreTrainedModel, optimizers: list[torch.optim.Optimizer], batch: Batch, rates: list[float]
) -> float:
    """Forward, weighted cross-entropy, backward, clip, update. Returns the loss in nats per weighted token."""
    ids, weights = batch
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    targets = weights[:, 1:].flatten()
    loss = (losses * targets).sum() / targets.sum()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    for optimizer, rate in zip(optimizers, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


@torch.inference_mode()
def exact_match(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[tuple[str, str]], batch: int = 50
) -> float:
    """Share of (prompt, answer) rows that greedy generation answers to the letter, ending itself with EOS."""
    model.train(False)
    right = 0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        asked = [prompt for prompt, _ in part]
        wanted = [f" {answer}{tokenizer.eos_token}" for _, answer in part]
        inputs = tokenizer(asked, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
        longest = max(len(ids) for ids in tokenizer(wanted, add_special_tokens=False).input_ids)
        made = model.generate(**inputs, do_sample=False, max_new_tokens=longest)  # type: ignore[operator]
        ends = tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], clean_up_tokenization_spaces=False)
        texts = [text.replace(str(tokenizer.pad_token), "") for text in ends]
        right += sum(text == answer for text, answer in zip(texts, wanted, strict=True))
    model.train(True)
    return right / len(rows)


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, count: int) -> dict[str, float]:
    """Held-out scores: reading the source, with no source, and repeating it (4 to 8 facts, and 10)."""
    asked = world.questions("test", 1, count)
    full = world.questions("test", 2, count // 4, min_facts=10, max_facts=10)
    read = [(world.QUESTION.format(latent=source, question=q), a) for source, q, a in asked]
    blind = [(world.QUESTION.format(latent="", question=q), a) for _, q, a in asked]
    repeat = [(world.REPEAT.format(latent=source), source) for source, _, _ in asked[: count // 2]]
    repeat_ten = [(world.REPEAT.format(latent=source), source) for source, _, _ in full]
    tasks = {"read": read, "none": blind, "repeat": repeat, "repeat_ten_facts": repeat_ten}
    return {name: exact_match(model, tokenizer, rows) for name, rows in tasks.items()}


def publish(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, card: dict[str, Any], log: str, out: Path
) -> None:
    """Write the folder file by file through renames, so that a reader sees an old or a new file, never half of one.

    Weights are stored in bfloat16 (``main`` rounded them) and load as the float32 that the config names.
    """
    partial = out.with_name(f".{out.name}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone; this folder is installed
    (partial / "training.json").write_text(json.dumps(card, indent=2) + "\n")
    (partial / "training.jsonl").write_text(log)
    out.mkdir(parents=True, exist_ok=True)
    for file in partial.iterdir():
        file.replace(out / file.name)
    partial.rmdir()


def hardware() -> str:
    """The processor in words."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(": ")[1] for line in lines if "model name" in line] or [platform.processor()]
    return f"{torch.get_num_threads()} thread(s) of {names[0]}, {os.cpu_count()} cores"


def main(
    which: Annotated[str, typer.Argument(help="llama (the receiver) or neox (the sender)")],
    out: Annotated[Path, typer.Option(help="folder of the finished model")],
    seed: int = 0,
    threads: int = 1,
    stretch: Annotated[float, typer.Option(help="multiplies the last stage's steps: below 1 for a trial")] = 1.0,
    questions: Annotated[int, typer.Option(help="questions in the final evaluation")] = 1000,
) -> None:
    """Train one model of the pair from scratch and evaluate it on the test split."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    recipe = RECIPES[which]
    last = recipe.stages[-1]
    recipe = replace(recipe, stages=(*recipe.stages[:-1], replace(last, steps=round(last.steps * stretch))))
    tokenizer = recipe.tokenizer()
    model = recipe.model(tokenizer)
    optimizers = optimisers(model, recipe)
    console, log, started = Console(), "", time.monotonic()
    drawn, hidden = batches(recipe, tokenizer, seed), not console.is_terminal
    stream = track(drawn, which, recipe.steps, console=console, disable=hidden)
    for step, batch in enumerate(stream, 1):
        share = recipe.rate(step - 1)
        loss = train_step(model, optimizers, batch, [recipe.matrix_rate * share, recipe.other_rate * share])
        if step % 50 == 0:
            line = {"step": step, "loss": round(loss, 4), "seconds": round(time.monotonic() - started)}
            line |= evaluate(model, tokenizer, 100) if step % 300 == 0 else {}
            log += json.dumps(line) + "\n"
            console.print_json(json.dumps(line), indent=None)
    for parameter in model.parameters():  # rounded, so that half the bytes hold the model exactly
        parameter.data = parameter.data.to(torch.bfloat16).float()
    card = {
        "model": which,
        "parameters": model.num_parameters(),
        "seed": seed,
        "steps": recipe.steps,
        "recipe": {key: value for key, value in asdict(recipe).items() if not callable(value)},
        "wall_seconds": round(time.monotonic() - started),
        "hardware": hardware(),
        "torch": torch.__version__,
        "held_out": {"questions": questions, "base_rate": world.base_rate()} | evaluate(model, tokenizer, questions),
    }
    publish(model, tokenizer, card, log, out)
    console.print_json(json.dumps(card["held_out"]))


if __name__ == "__main__":
    typer.run(main)
