"""Benchmarks record the whole command of each part, and measure again what is recorded when asked to."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality, real, record
from benchmarks.record import command_of


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    for module in (record, quality, real):
        monkeypatch.setattr(module, "RESULTS", folder)
    return folder


def recorded(folder: Path) -> Any:
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())


def test_a_command_names_every_option_that_says_something() -> None:
    said = command_of("real", models="models", ratio=[4, 8], limit=200, extra="--gain 2", keep=None, again=True)
    assert (
        said == "python -m benchmarks.real --models models --ratio 4 --ratio 8 --limit 200 --extra '--gain 2' --again"
    )


def test_a_part_that_is_recorded_is_measured_again_only_when_asked(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = {"em": 1.0}
    calls: list[int] = []

    def several(limit: int) -> dict[str, Any]:
        calls.append(limit)
        return {"shipped": [{"sources": 2, "bridge": shown, "direct": shown}]}

    monkeypatch.setattr(quality, "several", several)
    for again in (False, False, True):
        quality.main(steps=7, limit=len(calls) + 1, part=["several"], again=again)
    assert calls == [1, 2]
    made = "python -m benchmarks.quality --steps 7 --limit 2 --part several --again"
    assert recorded(results)["parts"]["several"]["command"] == made == recorded(results)["command"]


def test_a_run_between_models_is_made_again_in_its_place_only_when_asked(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    calls: list[int] = []

    def run_once(*_: Any, **how: Any) -> dict[str, Any]:
        calls.append(how["limit"])
        return {"report": {"conditions": {"bridge": {"metric": "accuracy", "value": float(len(calls))}}}}

    monkeypatch.setattr(real, "run_once", run_once)
    for again in (False, False, True):
        real.main(models=tmp_path, task=["sst2"], sender=["a"], control=["probe"], limit=len(calls) + 1, again=again)
    (run,) = recorded(results)["runs"]
    assert calls == [1, 2] and run["report"]["conditions"]["bridge"]["value"] == 2.0
    made = "--models models --limit 2 --control probe --again --sender a --task sst2 --ratio 4 --seeds 1"
    assert run["command"] == f"python -m benchmarks.real {made}"
