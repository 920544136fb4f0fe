"""Train the conditions that are bridges of their own, by the recipe of the bridge they stand beside."""

import tempfile
from pathlib import Path

from rich.console import Console

from latentwire.bridge.config import RANDOM
from latentwire.bridge.evaluation.conditions import TRAINED, EvaluationContext
from latentwire.training.config import TrainConfig, read_config
from latentwire.training.loop import train


def train_controls(context: EvaluationContext, console: Console) -> dict[str, EvaluationContext]:
    """A context for each of ``TRAINED`` on the same examples; the checkpoints are not kept."""
    contexts: dict[str, EvaluationContext] = {}
    for name in TRAINED:
        with tempfile.TemporaryDirectory() as folder:
            console.print(f"control {name!r}:", highlight=False)
            manifest = train(control_config(name, context, Path(folder) / name), console)
            contexts[name] = context.with_bridge(Path(folder) / name, manifest)
    return contexts


def control_config(name: str, context: EvaluationContext, out: Path) -> TrainConfig:
    """The recipe of a bridge changed into that of a control.

    ``random_sender`` reads a sender of the same shape with untrained weights: what it reaches needs no
    understanding. ``prompt`` learns as many soft tokens as the bridge sends on average, and reads nothing.
    """
    device = context.where.get("device")
    here = {"out": out, "device": None if device is None else str(device)}
    config = read_config(None, {**context.bridge.config.provenance.recipe, **here})
    if name == "random_sender":
        return config.model_copy(update={"sender": RANDOM + config.sender.removeprefix(RANDOM)})
    slots = [len(latent) for latent in context.recall(range(min(64, len(context.examples))))]
    without = {"alignment_steps": None, "alignment_weight": 0.0}  # there are no words to learn
    count = max(1, round(sum(slots) / len(slots)))
    return config.model_copy(update={"encoder": "prompt", "num_latents": count, **without})
