"""Train a bridge between two frozen models.

The step reads as one screen: batch → forward → loss → backward → clip → step → log.

Dimensions used in this file:
    B batch    K slots    D receiver width
"""

import math
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor
from torch.optim import AdamW, Optimizer

from bridge.checkpoint import CONFIG, Bridge, head_key, make_bridge, save_bridge
from bridge.config import WINDOWED, BridgeConfig, EncoderConfig, Head, Manifest, Provenance
from bridge.engine import answer_logits
from bridge.errors import InvalidRequest, TrainingFailed
from bridge.evaluation.tasks import Example, Task, load_task
from bridge.models import FrozenLM, hidden_states, load_model, pad_sources, text_ids, tokenize_source
from bridge.prompt import collate, compose, layout_for
from training.config import TrainConfig
from training.data import Order, covered_words
from training.monitor import Monitor, StepRecord, watch
from training.muon import Muon
from training.objectives import alignment_loss, answer_loss, answers_right
from training.state import STATE, load_state, save_state

CHECKED = 2000  # training examples looked at before the first step


@dataclass(frozen=True)
class Run:
    """Everything a step needs."""

    config: TrainConfig
    task: Task
    sender: FrozenLM
    receiver: FrozenLM
    bridge: Bridge
    optimizers: list[Optimizer]

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the result: the settings, and what the models and the data were."""
        return {
            **self.config.model_dump(mode="json"),
            "sender_fingerprint": str(self.sender.fingerprint),
            "receiver_fingerprint": str(self.receiver.fingerprint),
            "data_sha256": self.task.data_sha256,
        }

    @property
    def alignment_steps(self) -> int:
        """Steps of the warm start; encoders without windows, or tokenizers without offsets, have nothing to align."""
        wanted = self.config.alignment_steps
        return 0 if self.not_aligned else self.config.max_steps // 3 if wanted is None else wanted

    @property
    def not_aligned(self) -> str | None:
        """Why no soft token can be held against the words it covers, or None where it can."""
        if self.config.encoder not in WINDOWED:
            return f"{self.config.encoder} slots cover no words of their own"
        slow = [lm.name for lm in (self.sender, self.receiver) if not lm.tokenizer.is_fast]
        return f"the tokenizer of {slow[0]!r} gives no character offsets" if slow else None


def train(config: TrainConfig, console: Console, *, resume: bool = False, overwrite: bool = False) -> Manifest:
    """Train, saving checkpoint and state as it goes; return the last checkpoint's manifest.

    Raises:
        InvalidRequest: ``out`` already holds a checkpoint and neither ``resume`` nor ``overwrite`` is given, the
            state to resume is missing or of another configuration, or an example does not fit the receiver.
        TrainingFailed: The loss stopped being finite; the last saved checkpoint is kept.
    """
    done, resumable = (config.out / CONFIG).exists(), (config.out / STATE).exists()
    if not resume and not overwrite and (done or resumable):
        raise InvalidRequest(f"{config.out} already holds a checkpoint; give --resume, --overwrite or another --out")
    if resume and not overwrite and done and not resumable:
        raise InvalidRequest(f"{config.out} holds a checkpoint but no {STATE} to go on from; --overwrite replaces it")
    run = prepare(config)
    check_examples(run, console)
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"--out {config.out}: {error.strerror}", param="out") from None
    start = load_state(config.out, run.identity, run.bridge.parameters(), run.optimizers) if resume else 0
    trained = sum(p.numel() for p in run.bridge.parameters())
    console.print(
        f"{run.sender.name} layer {','.join(map(str, run.bridge.config.layers))} → {config.encoder} "
        f"({trained:,} trained weights) → {run.receiver.name}, task {run.task.name}"
        + (f", resumed after step {start}" if start else ""),
        markup=False,
        soft_wrap=True,
    )
    with watch(config.out, console, total=config.max_steps, start=start) as monitor:
        for step in range(start, config.max_steps):
            take_step(run, step, monitor)
            if (step + 1) % config.save_every == 0 and step + 1 < config.max_steps:
                _save(run, step + 1)
    return _save(run, config.max_steps)


def prepare(config: TrainConfig) -> Run:
    """Load the task and both models, and make a bridge between them from the seed."""
    task = load_task(config.task)
    sender, receiver = load_model(config.sender), load_model(config.receiver)
    torch.manual_seed(config.seed)
    bridge = make_bridge(describe(config, task, sender, receiver))
    bridge.encoder.to(sender.device)
    bridge.heads.to(receiver.device)
    return Run(config, task, sender, receiver, bridge, optimisers(bridge, config))


def check_examples(run: Run, console: Console) -> None:
    """Refuse before the first step what would stop a later one, and say what will be cut.

    Looks at up to ``CHECKED`` training examples: the one with the longest prompt and answer stands for all.

    Raises:
        InvalidRequest: It does not fit the receiver beside as many soft tokens as a source can take, or
            ``alignment_steps`` or ``alignment_weight`` ask for what these models cannot give.
    """
    config, described = run.config, run.bridge.config
    if run.not_aligned and (config.alignment_steps or config.alignment_weight):
        raise InvalidRequest(f"alignment was asked for, but {run.not_aligned}", param="alignment_steps")
    examples = [run.task.train[i] for i in range(min(CHECKED, len(run.task.train)))]
    sources = [
        tokenize_source(run.sender, e.source, max_tokens=described.max_source_tokens, truncate=True) for e in examples
    ]
    longest = max(len(source.ids) for source in sources)
    slots = -(-longest // described.encoder.ratio) if config.encoder in WINDOWED else config.num_latents
    worst = max(examples, key=lambda e: len(e.prompt) + len(e.answer))
    layout = described.heads[run.receiver.name].layout
    asked = [(worst.prompt, worst.answer)] + [(run.task.reconstruction, " x")] * (config.reconstruction_weight > 0)
    for prompt, answer in asked:
        compose(run.receiver, layout, prompt, latent=slots, answer=answer, max_tokens=run.receiver.max_tokens)
    if cut := sum(source.full_length > len(source.ids) for source in sources):
        console.print(
            f"{cut} of the first {len(examples)} sources are longer than {described.max_source_tokens} sender tokens: "
            "only their start is read"
        )


def optimisers(bridge: Bridge, config: TrainConfig) -> list[Optimizer]:
    """Muon for the matrices, AdamW for the rest.

    AdamW alone lost on the world task what the warm start had built (0.03 against 0.82 after the same steps).
    """
    matrices = [p for p in bridge.parameters() if p.ndim == 2]
    others = [p for p in bridge.parameters() if p.ndim != 2]
    return [
        Muon(matrices, lr=config.matrix_learning_rate, decay=config.weight_decay),
        AdamW(others, lr=config.learning_rate, weight_decay=config.weight_decay),
    ]


def describe(config: TrainConfig, task: Task, sender: FrozenLM, receiver: FrozenLM) -> BridgeConfig:
    """The bridge that ``config`` asks for between these models."""
    layers = tuple(config.layer or (round(sender.layers * 2 / 3),))
    if bad := [layer for layer in layers if not 0 <= layer <= sender.layers]:
        raise InvalidRequest(f"--layer {bad[0]}: {sender.name!r} has layers 0 to {sender.layers}", param="layer")
    head = Head(receiver.ref, layout_for(receiver, task.template), receiver.embedding_rms())
    return BridgeConfig(
        sender=sender.ref,
        layers=layers,
        max_source_tokens=min(config.max_source_tokens, sender.max_tokens),
        encoder=EncoderConfig(
            kind=config.encoder,
            sender_width=sum(sender.state_width(layer) for layer in layers),
            latent_dim=config.latent_dim or min(receiver.width, 512),
            hidden_dim=config.hidden_dim or min(max(sender.width // 32 * 32, 64), 1024),
            depth=config.depth,
            ratio=config.ratio,
            num_latents=config.num_latents,
        ),
        heads={receiver.name: head},
        provenance=Provenance(
            task=task.name,
            data_sha256=task.data_sha256,
            seed=config.seed,
            steps=config.max_steps,
            code_version=code_version(),
            recipe=config.model_dump(mode="json", exclude={"out"}),
        ),
    )


def take_step(run: Run, step: int, monitor: Monitor) -> None:
    """One optimiser step: ``accumulate`` forward passes, one update, one log line."""
    config, started = run.config, time.perf_counter()
    order = Order(len(run.task.train), batch_size=config.batch_size, seed=config.seed)
    parts: dict[str, float] = {"loss": 0.0, "answer_loss": 0.0, "reconstruction_loss": 0.0, "accuracy": 0.0}
    phase: Literal["align", "answer"] = "align" if step < run.alignment_steps else "answer"
    for micro in range(config.accumulate):
        examples = [run.task.train[i] for i in order.batch(step * config.accumulate + micro)]
        soft, slots = soft_tokens(run, examples)
        if phase == "align":
            losses = {"loss": align(run, examples, soft)}
        else:
            losses = objectives(run, examples, soft, slots)
        torch.autograd.backward(losses["loss"] / config.accumulate)
        for name, value in losses.items():
            parts[name] += float(value.detach()) / config.accumulate
    norm = float(torch.nn.utils.clip_grad_norm_(run.bridge.parameters(), config.clip_norm))
    if not math.isfinite(norm):
        raise TrainingFailed(f"step {step + 1}: the loss is {parts['loss']} and its gradient norm {norm}; not applied")
    share = schedule(config, step)
    for optimizer, peak in zip(run.optimizers, (config.matrix_learning_rate, config.learning_rate), strict=True):
        optimizer.param_groups[0]["lr"] = peak * share
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    rate, seconds = config.learning_rate * share, time.perf_counter() - started
    monitor.log(StepRecord(step + 1, phase, **parts, gradient_norm=norm, learning_rate=rate, seconds=seconds))


def soft_tokens(run: Run, examples: Sequence[Example]) -> tuple[Float[Tensor, "B K D"], list[int]]:
    """Soft tokens of each example's source, and how many each has."""
    limit = run.bridge.config.max_source_tokens
    sources = [tokenize_source(run.sender, e.source, max_tokens=limit, truncate=True) for e in examples]
    ids, mask = pad_sources(run.sender, sources)
    latents, slots = run.bridge.encoder(hidden_states(run.sender, ids, mask, run.bridge.config.layers), mask)
    head = run.bridge.heads[head_key(run.receiver.name)]
    return head(latents.to(run.receiver.device)), slots.sum(dim=1).tolist()


def align(run: Run, examples: Sequence[Example], soft: Float[Tensor, "B K D"]) -> Tensor:
    """The warm start: soft tokens learn the words of their windows, without a pass of the receiver."""
    words, covered = covered_words(
        run.sender,
        run.receiver,
        [e.source for e in examples],
        ratio=run.config.ratio,
        max_source_tokens=run.bridge.config.max_source_tokens,
    )
    return alignment_loss(soft[:, : words.shape[1]], words, covered).mean()


def objectives(
    run: Run, examples: Sequence[Example], soft: Float[Tensor, "B K D"], slots: Sequence[int]
) -> dict[str, Tensor]:
    """Losses of one forward pass, each a mean over its rows, and the sum that is minimised."""
    config = run.config
    asked = [(e.prompt, e.answer) for e in examples]
    logits, labels = _read(run, asked, soft, slots)
    losses = {
        "answer_loss": answer_loss(logits, labels, first_token_weight=config.first_token_weight).mean(),
        "accuracy": answers_right(logits, labels).mean(),
        "reconstruction_loss": torch.zeros((), device=soft.device),
    }
    if config.reconstruction_weight > 0:
        repeated = [
            (run.task.reconstruction, f" {_shorten(run, e.source, K)}") for e, K in zip(examples, slots, strict=True)
        ]
        losses["reconstruction_loss"] = answer_loss(*_read(run, repeated, soft, slots)).mean()
    losses["loss"] = losses["answer_loss"] + config.reconstruction_weight * losses["reconstruction_loss"]
    if config.alignment_weight > 0:
        losses["loss"] = losses["loss"] + config.alignment_weight * align(run, examples, soft)
    return losses


def _read(
    run: Run, asked: Sequence[tuple[str, str]], soft: Float[Tensor, "B K D"], slots: Sequence[int]
) -> tuple[Tensor, Tensor]:
    layout = run.bridge.config.heads[run.receiver.name].layout
    rows = [
        compose(run.receiver, layout, prompt, latent=K, answer=answer, max_tokens=run.receiver.max_tokens)
        for (prompt, answer), K in zip(asked, slots, strict=True)
    ]
    return answer_logits(run.receiver, collate(rows, side="left").to(run.receiver.device), soft)


def _shorten(run: Run, source: str, slots: int) -> str:
    """The source, cut to what the receiver has room to repeat beside its soft tokens and the prompt."""
    room = run.receiver.max_tokens - slots - len(text_ids(run.receiver, run.task.reconstruction)) - 8
    ids = text_ids(run.receiver, source)
    return source if len(ids) <= room else str(run.receiver.tokenizer.decode(ids[: max(room, 1)]))


def schedule(config: TrainConfig, step: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to a tenth, in optimiser steps from 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def code_version() -> str:
    """The package's version, with the commit where the code runs from a checkout."""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    commit = done.stdout.strip() if (root / ".git").exists() and done.returncode == 0 else ""
    return version("latentwire") + (f"+{commit}" if commit else "")


def _save(run: Run, step: int) -> Manifest:
    """State first: killed between the two, the run goes on from the state and writes the checkpoint again."""
    if not all(bool(p.isfinite().all()) for p in run.bridge.parameters()):
        raise TrainingFailed(f"step {step}: a weight is not finite; what was saved before is kept")
    save_state(run.config.out, run.identity, step, run.bridge.parameters(), run.optimizers)
    return save_bridge(run.config.out, run.bridge)
