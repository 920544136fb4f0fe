"""What crosses the built-in bridge, on facts never seen in training.

Asked: bridge EM at least 0.90 of direct, mismatched at most none + 0.03, four sender tokens per soft token.
"""

import typer
from rich.console import Console

from benchmarks.record import record
from latentwire.bridge.evaluation.conditions import TRAINED
from latentwire.bridge.evaluation.context import open_context
from latentwire.bridge.evaluation.measure import measure
from latentwire.bridge.evaluation.report import table
from latentwire.training.controls import train_controls


def main(checkpoint: str = "builtin", limit: int = 500, controls: bool = True) -> None:
    """Evaluate CHECKPOINT on the world task and record the report."""
    context = open_context(checkpoint, "world", limit=limit, dtype="float16", receiver=None)
    report = measure(context, trained=train_controls(context, Console()) if controls else None)
    Console(width=130).print(table(report))
    value = {name: row["value"] for name, row in report["conditions"].items()}
    command = f"python -m benchmarks.world --checkpoint {checkpoint} --limit {limit}"
    record(
        "world",
        command + ("" if controls else " --no-controls"),
        {
            "bridge_over_direct": value["bridge"] / value["direct"],
            "mismatched_minus_none": value["mismatched"] - value["none"],
            "steps": context.bridge.config.provenance.steps,
            "controls": list(TRAINED) if controls else [],
            "report": report,
        },
    )


if __name__ == "__main__":
    typer.run(main)
