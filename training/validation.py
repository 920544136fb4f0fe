"""How good a bridge is by now, on examples held out of the training split."""

import statistics
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from latentwire.bridge import engine
from latentwire.bridge.evaluation.conditions import predict, soft_tokens
from latentwire.bridge.evaluation.context import PredictionContext, Reading, Tuned
from latentwire.bridge.evaluation.debug import shown
from latentwire.bridge.evaluation.metrics import METRICS, Metric, metrics_of
from latentwire.bridge.prompt import collate
from latentwire.bridge.reader import source_tokens
from latentwire.training.data import chunks
from latentwire.training.objectives import OBJECTIVES, answer_loss, weights_of
from latentwire.training.pretrain import PretrainConfig
from latentwire.training.run import Forward, Run


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
    metric, latents, values = METRICS[metric_of(run)], _latents(run), []
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


def _repeating(run: Run, receiver_name: str) -> float:
    """Mean loss of the first objective that is on, with its mode tokens, as a step computes it."""
    objective = OBJECTIVES[next(iter(weights_of(run.config, "answer")))]
    losses: list[float] = []
    with run.residency.use(receiver_name) as receiver:
        for part in chunks(list(run.validation), run.micro_batch):
            rows = [run.tokenisers[receiver_name](example) for example in part]
            losses += objective.loss(Forward(run, receiver, rows, lambda _: None)).tolist()
    return statistics.fmean(losses)


def _latents(run: Run) -> list[NDArray[np.float32]]:
    config, side = run.bridge.config, run.tokenisers[run.config.receivers[0]].sender
    found: list[NDArray[np.float32]] = []
    for part in chunks(list(run.validation), run.micro_batch):
        sources = [source_tokens(config, side, e.source, truncate=True) for e in part]
        latents, slots = run.bridge.encoder(*run.states.read(sources))
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
