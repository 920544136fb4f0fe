"""``latentwire calibrate``: from which trust on a bridge answers from latents, and what latents are like.

Importing this module needs no torch.
"""

from typing import Annotated

import typer
from rich.console import Console

from latentwire.bridge.errors import CorruptCheckpoint, IncompatibleBridge
from latentwire.bridge.files import writable_folder


def calibrate(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder, which gets the gate.")],
    task: Annotated[str, typer.Option(help="'world' or a task file (.toml).")],
    target_retention: Annotated[
        float, typer.Option(help="Least share of the text's score that all answers together keep.")
    ] = 0.98,
    examples: Annotated[int, typer.Option(min=50, help="Most examples to use.")] = 500,
    metric: Annotated[
        str | None, typer.Option(help=r"What scores an answer: em, accuracy or token_f1. \[default: the task's own]")
    ] = None,
    receiver: Annotated[
        str | None, typer.Option(help="Which receiver answers; the checkpoint's first when absent.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help=r"Where models compute; as in 'train'. \[default: the best there is]")
    ] = None,
    precision: Annotated[str | None, typer.Option(help=r"bf16, fp16 or fp32. \[default: bf16; fp32 on a CPU]")] = None,
) -> None:
    """Find out which answers from latents can be trusted, on examples that the bridge was not trained on.

    What their latents are like is kept too: the service tells by it whether those of its requests drift.
    """
    from latentwire.bridge.bridge import Bridge
    from latentwire.bridge.drift import save_statistics
    from latentwire.bridge.evaluation.evaluate import progress_bar
    from latentwire.bridge.evaluation.report import spread
    from latentwire.bridge.gate import GATE, load_gates, save_gates
    from latentwire.training.calibration import calibrate as run

    out, folder = Console(), writable_folder(checkpoint, "a gate is")
    bridge = Bridge.load(folder, device=device, precision=precision)
    with progress_bar(out) as progress:
        made = run(
            bridge, task, target_retention=target_retention, examples=examples, metric=metric, receiver=receiver,
            progress=progress,
        )  # fmt: skip
    try:
        others = load_gates(folder, bridge.manifest)
    except (CorruptCheckpoint, IncompatibleBridge):  # what it held serves nobody
        others = {}
    save_gates(folder, bridge.manifest.bridge_id, {**others, made.receiver: made.gate})
    if made.statistics is not None:
        save_statistics(folder, bridge.manifest.bridge_id, made.statistics)
    gate, reached = made.gate, made.gate.reached
    for line in (
        f"{gate.examples} examples not trained on, {made.metric}: {made.bridge:.3f} from latents, {made.direct:.3f} "
        "from texts",
        f"latents answer from a trust of {reached.trust:.3f} on: {reached.coverage:.1%} of the examples "
        f"({spread(gate.coverage_low, gate.coverage_high)})",
        f"all answers together keep {reached.retention:.3f} of the text's score ({spread(reached.low, reached.high)}); "
        f"asked for: {target_retention:g}",
        f"{folder / GATE} holds the gate of {made.receiver}",
    ):
        out.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)
