"""How good a bridge is by now, on examples held out of the training split; and what is usual of those trained on."""

import statistics
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from latentwire.bridge import engine
from latentwire.bridge.drift import LatentStatistics
from latentwire.bridge.evaluation.conditions import predict, soft_tokens
from latentwire.bridge.evaluation.context import PredictionContext, Reading, Tuned
from latentwire.bridge.evaluation.debug import shown
from latentwire.bridge.evaluation.metrics import METRICS, Metric, metrics_of
from latentwire.bridge.prompt import collate
from latentwire.bridge.reader import SourceTokens, source_tokens
from latentwire.training.data import GROUPED, chunks
from latentwire.training.objectives import OBJECTIVES, answer_loss, weights_of
from latentwire.training.prepare import sampler_of
from latentwire.training.pretrain import PretrainConfig
from latentwire.training.run import Forward, Run

USUAL_TEXTS = 128  # of which a checkpoint keeps what latents are like


def metric_of(run: Run) -> str:
    """Name of the metric asked for, or of the task's own."""
    return run.config.metric or metrics_of(run.task.kind)[0].name


@torch.inference_mode()
def validate(run: Run, say: Callable[[str], None] = print) -> tuple[str, float]:
    """Name and value of the validation metric, averaged over receivers; prints generations when asked to.

    In a pretraining that is the loss of repeating, in nats per token (of going on, where that alone is on).
    """
    if isinstance(run.config, PretrainConfig):
        return "loss", statistics.fmean(_repeating(run, name) for name in run.config.receivers)
    side = run.tokenisers[run.config.receivers[0]].sender
    texts = [source_tokens(run.bridge.config, side, e.source, truncate=True) for e in run.validation]
    metric, latents, values = METRICS[metric_of(run)], _latents(run, texts), []
    readings: list[Reading] = [*latents]
    if run.config.source_text:
        sources = [example.source for example in run.validation]
        readings = [Tuned(*both) for both in zip(latents, sources, strict=True)]
    for name in run.config.receivers:
        with run.residency.use(name) as receiver:
            context = PredictionContext(
                task=run.task, examples=run.validation, bridge=run.bridge, receiver_name=name, receiver=receiver
            )
            for line in shown(context, readings, run.config.debug_print_first, run.config.debug_topk):
                say(line)
            values.append(_score(run, metric, context, readings) if metric.score else _loss(run, context, readings))
    return metric.name, statistics.fmean(values)


@torch.inference_mode()
def usual(run: Run) -> LatentStatistics | None:
    """What the latents of the first training texts of the run are like by now; None where that says nothing."""
    sources = [run.sample(run.config.receivers[0], i).source for i in first_texts(run)]
    return LatentStatistics.of(_latents(run, sources), run.task.name, run.task.data_sha256)


def first_texts(run: Run) -> list[int]:
    """Training examples of its first steps, whose states are there also where the sender's are cached.

    Of whole groups of steps: one step alone may have texts of one length.
    """
    sampler, groups = sampler_of(run), -(-USUAL_TEXTS // (GROUPED * run.rows_per_step))
    steps = range(min(groups * GROUPED, run.config.max_steps))
    drawn = list(dict.fromkeys(i for step in steps for i in sampler.batch(step)))
    return drawn[:: -(-len(drawn) // USUAL_TEXTS)]


def _repeating(run: Run, receiver_name: str) -> float:
    """Mean loss of the first objective that is on, with its mode tokens, as a step computes it."""
    objective = OBJECTIVES[next(iter(weights_of(run.config, "answer")))]
    losses: list[float] = []
    with run.residency.use(receiver_name) as receiver:
        for part in chunks(list(run.validation), run.micro_batch):
            rows = [run.tokenisers[receiver_name](example) for example in part]
            losses += objective.loss(Forward(run, receiver, rows, lambda _: None)).tolist()
    return statistics.fmean(losses)


def _latents(run: Run, sources: Sequence[SourceTokens]) -> list[NDArray[np.float32]]:
    found: list[NDArray[np.float32]] = []
    for part in chunks(sources, run.micro_batch):
        latents, slots = run.bridge.encoder(*run.states.read(part))
        found += [row[real].float().cpu().numpy() for row, real in zip(latents, slots, strict=True)]
    return found


def _score(run: Run, metric: Metric, context: PredictionContext, readings: Sequence[Reading]) -> float:
    texts: list[str] = []
    for chosen in chunks(range(len(readings)), run.micro_batch):
        texts += predict(context, chosen, [readings[i] for i in chosen])
    return statistics.fmean(metric.scores(texts, [example.right for example in context.examples]))


def _loss(run: Run, context: PredictionContext, readings: Sequence[Reading]) -> float:
    losses: list[float] = []
    for chosen in chunks(range(len(readings)), run.micro_batch):
        read = [readings[i] for i in chosen]
        rows = context.rows(chosen, read, [context.examples[i].answer for i in chosen])
        with context.lender.lend(context.receiver) as receiver:
            soft = soft_tokens(context, receiver, read)
            batch = collate(rows, side="left").to(receiver.device)
            losses += answer_loss(*engine.answer_logits(receiver, batch, soft)).tolist()
    return statistics.fmean(losses)
