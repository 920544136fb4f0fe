"""How many answers of a bridge its gate lets through, and what is kept of the text's score on test examples.

Asked: retention .98 reached, with a coverage of at least .8. Several calibrations on examples of their own show how far
chance moves the threshold.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import typer

from benchmarks.record import command_of, record
from latentwire.bridge.bridge import Bridge
from latentwire.bridge.evaluation.evaluate import BridgeLender, context_of
from latentwire.bridge.evaluation.gated import retention_interval
from latentwire.bridge.evaluation.metrics import metrics_of
from latentwire.bridge.evaluation.statistics import interval, ratio
from latentwire.bridge.evaluation.tasks import load_task
from latentwire.bridge.gate import SIGNALS
from latentwire.training.calibration import answers, gate_of, latents_of, probability, unseen


def main(
    checkpoint: str = "builtin", task: str = "world", target: float = 0.98, examples: int = 500,
    calibrations: int = 5, limit: int = 500, name: str = "gate",
) -> None:  # fmt: skip
    """Calibrate several times, and hold each gate to LIMIT test examples; recorded as NAME."""
    bridge, asked_of = Bridge.load(checkpoint), load_task(task)
    metric = metrics_of(asked_of.kind)[0].name
    test = context_of(bridge, asked_of, BridgeLender(bridge), limit=limit)
    fresh = replace(test, examples=unseen(bridge, asked_of, test.receiver_name, examples * calibrations))
    signals, ours, texts = answers(fresh, metric, latents_of(fresh))
    asked, latent, direct = answers(test, metric, latents_of(test))
    rows: list[dict[str, Any]] = []
    for start in range(0, len(ours), examples):
        part = slice(start, start + examples)
        gate = gate_of(signals[part], ours[part], texts[part], target)
        weights = np.array([gate["weights"][name] for name in SIGNALS])
        trusted = np.nan_to_num(probability(asked @ weights + gate["intercept"])) >= gate["reached"].trust
        given = np.where(trusted, latent, direct)
        rows.append(
            {
                "weights": gate["weights"],
                "intercept": gate["intercept"],
                "trust": gate["reached"].trust,
                "calibrated": {
                    name: getattr(gate["reached"], name) for name in ("coverage", "retention", "low", "high")
                },
                "test": {
                    "coverage": float(trusted.mean()),
                    "coverage_interval": interval(trusted.astype(float).tolist()),
                    "retention": float(ratio(given, direct)),
                    "retention_interval": retention_interval(given, direct),
                },
            }
        )
        print(f"calibrated {rows[-1]['calibrated']}, test {rows[-1]['test']}")
    of = {} if checkpoint == "builtin" else {"checkpoint": "runs/bridge", "task": f"runs/{asked_of.name}.toml"}
    counts = {"target": target, "examples": examples, "calibrations": calibrations, "limit": limit}
    record(
        name,
        command_of("gate", **of, **counts),
        {
            "bridge_id": bridge.manifest.bridge_id,
            "target_retention": target,
            "examples": examples,
            "test_examples": len(test.examples),
            "test_scores": {"bridge": float(latent.mean()), "direct": float(direct.mean())},
            "calibrations": rows,
        },
    )


if __name__ == "__main__":
    typer.run(main)
