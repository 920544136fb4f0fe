"""How many answers of the built-in bridge its gate lets through, and what is kept of the text's score on test examples.

Asked: retention .98 reached, with a coverage of at least .8. Several calibrations on examples of their own show how far
chance moves the threshold.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import typer

from benchmarks.record import record
from latentwire.bridge.bridge import Bridge
from latentwire.bridge.evaluation.evaluate import BridgeLender, context_of
from latentwire.bridge.evaluation.gated import retention_interval
from latentwire.bridge.evaluation.statistics import interval, ratio
from latentwire.bridge.evaluation.tasks import load_task
from latentwire.bridge.gate import SIGNALS
from latentwire.training.calibration import answers, gate_of, probability, unseen


def main(target: float = 0.98, examples: int = 500, calibrations: int = 5, limit: int = 500) -> None:
    """Calibrate several times, and hold each gate to LIMIT test examples."""
    bridge, task = Bridge.load("builtin"), load_task("world")
    test = context_of(bridge, task, BridgeLender(bridge), limit=limit)
    fresh = replace(test, examples=unseen(bridge, task, test.receiver_name, examples * calibrations))
    signals, ours, texts = answers(fresh, "em")
    asked, latent, direct = answers(test, "em")
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
    record(
        "gate",
        f"python -m benchmarks.gate --target {target} --examples {examples} --calibrations {calibrations} "
        f"--limit {limit}",
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
