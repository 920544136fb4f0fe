"""Reports as an evaluation writes them, made up: what stands in them is known."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentwire.bridge.evaluation.measure import _summary
from latentwire.bridge.evaluation.statistics import interval


def document(
    *, bridge: Sequence[float] = (1, 1, 1, 0, 1, 0), direct: Sequence[float] = (1, 0, 1, 1, 1, 0), seed: int = 0,
    ratio: float = 4.0, recipe: dict[str, Any] | None = None, answers: Sequence[str] = ("Rome", "Oslo"), **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    """A report on as many examples as there are scores; the bridge's id follows from its seed and ratio."""
    n = len(bridge)
    given = {"bridge": bridge, "direct": direct, "same_budget": [0, 1, *[0] * (n - 2)], "none": [0] * n}
    scores = {name: [float(value) for value in values] for name, values in given.items()}
    rows = {}
    for name, values in scores.items():
        low, high = interval(values) or (None, None)
        rows[name] = {"metric": "em", "value": sum(values) / n, "low": low, "high": high, "ttft_ms": 12.0}
        rows[name]["token_f1"] = 0.5
    examples = [
        {
            "source": f"Fact {i}: Mara lives in {answers[i % len(answers)]}.",
            "prompt": "{latent}\nQuestion: Where?\nAnswer:",
            "wanted": f" {answers[i % len(answers)]}",
            "said": {name: f" {name} says {i}" for name in scores},
            "scores": {name: values[i] for name, values in scores.items()},
        }
        for i in range(n)
    ]
    made = {
        "checkpoint": "tiny", "bridge_id": f"{seed:031x}{ratio:.0f}", "task": "cities", "n": n, "dropped": {},
        "left_out": {},
        "conditions": rows,
        "bytes": {"latent": 400.0 / ratio, "source": 30.0, "receiver_kv": 3000.0},
        "source_tokens_per_soft_token": ratio, "receiver_tokens_per_soft_token": ratio, "truncated": 1,
        **_summary(scores),
        "checks": {"inputs": 6, "answers": 6},
        "about": {
            "command": "latentwire evaluate tiny --task cities.toml",
            "versions": {"python": "3.11", "torch": "2.13"},
            "data_sha256": "d" * 64, "dtype": "float16",
            "sender": {"name": "small/sender", "fingerprint": "1/2/3"},
            "receiver": {"name": "small/receiver", "fingerprint": "4/5/6"},
            "encoder": {"kind": "pooling", "ratio": int(ratio)},
            "provenance": {
                "task": "cities", "data_sha256": "d" * 64, "seed": seed, "steps": 100, "code_version": "0.1",
                "recipe": {"ratio": int(ratio), "seed": seed} if recipe is None else recipe,
            },
        },
        "examples": examples,
        "slots": [
            {
                "example": 1, "tokens": ["<s>", " Mara", "\n", " lives"], "source_tokens": 9, "slots": 3,
                "reads": [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.25, 0.75]],
            }
        ],
        "latents": {"pca": [[float(i), float(i % 2)] for i in range(n)], "explained": [0.6, 0.25]},
    }  # fmt: skip
    return {**made, **changes}


def written(path: Path, report: Any) -> Path:
    """The file of a report."""
    path.write_text(report if isinstance(report, str) else json.dumps(report))
    return path
