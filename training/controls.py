"""Train the conditions that must be trained, by the recipe of the bridge they stand beside and as long."""

import tempfile
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from latentwire.bridge.config import RANDOM
from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.evaluation.conditions import TRAINED
from latentwire.bridge.evaluation.context import EvaluationContext
from latentwire.bridge.evaluation.evaluate import progress_bar
from latentwire.bridge.evaluation.probe import fit_probe
from latentwire.bridge.models import FrozenLM
from latentwire.training.config import TrainConfig, read_config
from latentwire.training.data import split_off
from latentwire.training.loop import train
from latentwire.training.lora import tuned_receiver
from latentwire.training.prepare import prepare

MOST_PROBED = 4096  # training examples whose states a probe is fitted to


def check_controls(names: Collection[str]) -> None:
    """Refuse a name that is none of ``TRAINED`` (InvalidRequest)."""
    if unknown := next((name for name in names if name not in TRAINED), None):
        known = ", ".join(TRAINED)
        raise InvalidRequest(f"no control is called {unknown!r}; there are {known}", param="control")


def train_controls(
    context: EvaluationContext, console: Console, names: Collection[str] = tuple(TRAINED)
) -> dict[str, EvaluationContext]:
    """A context for each of ``names`` out of ``TRAINED`` on the same examples; the checkpoints are not kept.

    A probe of a task without labels is not made, with a word on the console; ``measure`` says why it is missing.

    Raises:
        InvalidRequest: A name is none of ``TRAINED``.
    """
    check_controls(names)
    contexts: dict[str, EvaluationContext] = {}
    for name in (name for name in TRAINED if name in names):
        console.print(f"control {name!r}:", highlight=False)
        if name == "probe" and context.task.kind != "classification":
            console.print(f"left out: a probe needs labels, and {context.task.name!r} has none", highlight=False)
            contexts[name] = context
            continue
        with tempfile.TemporaryDirectory() as folder:
            contexts[name] = _trained(name, context, Path(folder) / name, console)
    return contexts


def _trained(name: str, context: EvaluationContext, out: Path, console: Console) -> EvaluationContext:
    config = control_config(name, context, out)
    if name == "probe":
        return _probe(context, config, console)
    if name == "receiver_lora":
        return _lora(context, config, console)
    return context.with_bridge(out, train(config, console))


def control_config(name: str, context: EvaluationContext, out: Path) -> TrainConfig:
    """The recipe of a bridge changed into that of a control.

    ``random_sender`` reads a sender of the same shape with untrained weights: what it reaches needs no
    understanding. ``prompt`` learns as many soft tokens as the bridge sends on average, and reads nothing;
    ``direct_tuned`` learns as many to stand before the source.
    """
    device, made = context.where.get("device"), context.bridge.config.provenance
    if "text" in made.recipe:
        raise InvalidRequest(
            f"the bridge at {context.checkpoint} was pretrained on {made.task} and trained for no task: "
            f"by its recipe no control can be; train it for one with --init",
            param="control",
        )
    # A control begins anew: what the bridge learnt in an earlier run is the bridge's.
    here = {"out": out, "device": None if device is None else str(device)}
    recipe = {**made.recipe, "init": None}
    config = read_config(None, {**recipe, **here})
    if name == "random_sender":
        return config.model_copy(update={"sender": RANDOM + config.sender.removeprefix(RANDOM)})
    if name == "probe":
        return config
    slots = [len(latent) for latent in context.recall(range(min(64, len(context.examples))))]
    # There are no words to learn, no other example's latent to hold its own against, and no sender that is read.
    without = {"alignment_steps": None, "alignment_weight": 0.0, "probe_every": 0, "sources_per_example": 1}
    without |= {"sender_lora": 0}
    count = max(1, round(sum(slots) / len(slots)))
    learnt = config.model_copy(update={"encoder": "prompt", "num_latents": count, **without})
    alone = {"reconstruction_weight": 0.0, "continuation_weight": 0.0}  # nor a text to repeat that is there to be read
    changes: dict[str, dict[str, Any]] = {
        "direct_tuned": {**alone, "source_text": True},
        "receiver_lora": {**alone, "kd_weight": 1.0, "kd_chunk": None, "cache_features": False},  # rows with the source
    }
    return learnt.model_copy(update=changes.get(name, {}))


def _probe(context: EvaluationContext, config: TrainConfig, console: Console) -> EvaluationContext:
    most = min(
        config.max_examples or MOST_PROBED, config.max_steps * config.batch_size * config.accumulate, MOST_PROBED
    )
    examples, _ = split_off(context.task.train, validation=0, limit=most, seed=config.seed)
    with progress_bar(console) as progress:
        return fit_probe(context, examples, lambda done, total: progress("the sender reads", done, total))


def _lora(context: EvaluationContext, config: TrainConfig, console: Console) -> EvaluationContext:
    weights = sum(weight.numel() for weight in context.bridge.parameters())
    run = prepare(config, console)
    assert isinstance(context.receiver, FrozenLM), "controls are trained where the models are in memory"
    with progress_bar(console) as progress:
        tuned = tuned_receiver(
            run, context.receiver, weights, lambda done, total: progress("receiver_lora", done, total)
        )
    return replace(context, receiver=tuned)
