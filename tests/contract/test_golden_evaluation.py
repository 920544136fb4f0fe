"""An evaluation of the built-in bridge, number by number: a change of any must be meant."""

import json
from pathlib import Path
from typing import Any

import pytest

from latentwire.bridge.evaluation.context import open_context
from latentwire.bridge.evaluation.measure import measure

GOLDEN = Path(__file__).with_name("golden_evaluation.json")
RENEW = (
    "a change that is meant is committed with: python -c "
    '"from tests.contract.test_golden_evaluation import *; GOLDEN.write_text(rendered(measured()))"'
)
LIMIT = 40
EXACT = 1e-9  # of figures; pictures of latents are rounded to 3 and 4 places
PICTURES = {"slots": 2e-3, "latents": 2e-3, "gate": 2e-3}  # the trust of 40 answers is a picture too


def measured() -> dict[str, Any]:
    """The report without what no two runs share: times, versions, the command."""
    context = open_context("builtin", "world", limit=LIMIT, dtype="float16", receiver=None, device="cpu")
    report = measure(context, keep_examples=True)
    rows = {
        name: {key: value for key, value in row.items() if key != "ttft_ms"}
        for name, row in report["conditions"].items()
    }
    about = {key: value for key, value in report["about"].items() if key not in ("versions", "command")}
    made: dict[str, Any] = json.loads(json.dumps({**report, "conditions": rows, "about": about}))
    return made


def rendered(report: dict[str, Any]) -> str:
    """JSON with a line for each part, and for each example."""
    parts = {
        name: "[\n" + ",\n".join(json.dumps(row) for row in part) + "\n]"
        if isinstance(part, list)
        else json.dumps(part)
        for name, part in report.items()
    }
    return "{\n" + ",\n".join(f'"{name}": {text}' for name, text in parts.items()) + "\n}\n"


def same(value: Any, golden: Any, where: str, within: float) -> None:
    """Fail where two documents differ, saying where: numbers by more than ``within``, anything else at all."""
    if isinstance(golden, dict):
        assert list(value) == list(golden), where
        for key in golden:
            same(value[key], golden[key], f"{where}.{key}", PICTURES.get(key, within))
    elif isinstance(golden, list):
        assert len(value) == len(golden), where
        for i, both in enumerate(zip(value, golden, strict=True)):
            same(*both, f"{where}[{i}]", within)
    elif isinstance(golden, float):
        assert value == pytest.approx(golden, abs=within), where
    else:
        assert value == golden, where


def test_the_built_in_bridge_is_measured_as_it_was() -> None:
    report, golden = measured(), json.loads(GOLDEN.read_text())
    said = [(e["said"], e["scores"]) for e in report["examples"]]
    assert said == [(e["said"], e["scores"]) for e in golden["examples"]], RENEW
    same(report, golden, "report", EXACT)


def test_a_difference_is_found_and_named() -> None:
    golden = json.loads(GOLDEN.read_text())
    bridge = golden["conditions"]["bridge"]
    changed = {**golden, "conditions": {**golden["conditions"], "bridge": {**bridge, "low": bridge["low"] + 1e-8}}}
    with pytest.raises(AssertionError, match=r"report\.conditions\.bridge\.low"):
        same(changed, golden, "report", EXACT)
