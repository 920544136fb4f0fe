"""The benchmark that is prepared for a GPU, in small on a CPU: on the day there is one, it must not fail for a typo."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_parts
from benchmarks.gpu import PARTS, asked
from benchmarks.gpu_models import Bench
from benchmarks.record import RESULTS
from tests.documents import ROOT


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a dry run records."""
    before, folder = set(RESULTS.iterdir()), tmp_path_factory.mktemp("dry")
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(RESULTS.iterdir()) == before
    (path,) = folder.iterdir()
    assert path.name.startswith("gpu-tiny-") and str(path) in done.stdout
    return dict(json.loads(path.read_bytes()))


def numbers(value: Any) -> Iterator[float]:
    """Every number in figures."""
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from numbers(one)
    elif isinstance(value, int | float):
        yield value


def test_every_part_of_a_dry_run_gives_figures_and_none_an_error(figures: dict[str, Any]) -> None:
    parts = figures["parts"]
    assert list(parts) == list(PARTS)
    assert {name: part["error"] for name, part in parts.items() if "error" in part} == {}
    assert all(len(list(numbers(part))) > 1 for part in parts.values())
    assert figures["scale"] == "tiny" and figures["versions"]["torch"] == torch.__version__


def test_a_dry_run_measures_every_kind_of_step_and_compares_answers(figures: dict[str, Any]) -> None:
    parts = figures["parts"]
    steps = parts["decode"]["steps"]
    assert parts["decode"]["not_run"] == [] and len(steps) == 2 * 3 * 2 * 3
    assert {step["switch"] for step in steps} == {"plain", "paged"}
    assert all(step["median_ms"] > 0 and step["over_weights"] > 0 and step["measured_steps"] for step in steps)
    for name in ("race", "beside"):
        assert parts[name]["mismatches"] == {"beside": 0, "alone_again": 0} and parts[name]["encodes"] > 0
        assert parts[name]["encodes_with_other_latents"] == 0
    for role in ("exact", "receiver"):
        assert parts["answers"][role]["greedy_equal"] == "16 of 16"
        assert parts["answers"][role]["sampled_alone_equal"] == "4 of 4"
    assert parts["fp8"] | {"part_seconds": 0} == {
        "named": {"outcome": "right", "largest_difference": 0.0},
        "unnamed": {"outcome": "refused", "says": parts["fp8"]["unnamed"]["says"]},
        "part_seconds": 0,
    }
    refused = parts["oversized"]["required"]
    assert refused.get("error") == "InsufficientMemory" or refused["capacity_tokens"] < parts["oversized"]["kv_tokens"]
    assert parts["oversized"]["next_engine_generates"] == 4
    assert [step["batch_size"] for step in parts["training"]["steps"]] == [2, 4]
    assert all(step["mfu"] > 0 and step["planned_bytes"] > 0 for step in parts["training"]["steps"])


def test_the_parts_that_are_given_time_are_the_parts_there_are() -> None:
    starts = len(PARTS) * gpu.START_SECONDS / 2
    assert PARTS.keys() == gpu_parts.PARTS.keys() and sum(PARTS.values()) + starts < gpu.TOTAL_SECONDS


def test_what_was_not_measured_is_asked_all_the_same() -> None:
    lines = asked({name: {"error": "not run"} for name in PARTS})
    assert len(lines) == 2 and all(line["found"] is None for line in lines)


def test_a_part_that_fails_is_recorded_with_its_error_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[dict[str, Any]] = []

    def fails(bench: Bench) -> dict[str, Any]:
        bench.keep({"first": 1})
        kept.append(json.loads((tmp_path / "decode.json").read_bytes()))
        raise ValueError("as it should")

    monkeypatch.setitem(gpu_parts.PARTS, "decode", fails)
    gpu_parts.main("tiny", tmp_path, {"decode": 1.0, "fp8": 10.0})
    assert kept == [{"first": 1, "error": "ended before it was whole"}]
    assert json.loads((tmp_path / "decode.json").read_bytes())["error"] == "ValueError: as it should"
    assert json.loads((tmp_path / "fp8.json").read_bytes())["named"]["outcome"] == "right"


def test_a_part_that_runs_on_is_ended_and_one_without_time_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.measured("tiny", {"decode": 90.0}, 3.0) == {"decode": {"error": "not run: 3 s were left"}}
    monkeypatch.setattr(gpu, "START_SECONDS", 0.0)
    assert gpu.measured("tiny", {"fp8": 0.4}, 100.0) == {"fp8": {"error": "its process was ended after 0 s"}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_benchmark_says_so_and_what_can_be_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("a GPU is needed, but ") and "--tiny" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_tests_are_collected_and_skipped_with_the_reason() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" not in done.stdout and " skipped" in done.stdout and "a GPU is needed, but " in done.stdout
