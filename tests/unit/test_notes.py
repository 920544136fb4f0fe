"""The notes on training name behaviours by their tests; each of them must be there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOTES = (ROOT / "training" / "NOTES.md").read_text()


def test_every_known_failure_has_a_line_with_tests_that_exist() -> None:
    lines = re.findall(r"^\| (K\d+) \|(.*)\|$", NOTES, re.MULTILINE)
    assert [number for number, _ in lines] == [f"K{i}" for i in range(1, 16)]
    there = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    for _, line in lines:
        named = re.findall(r"`(test_\w+\.py)`", line)
        assert named and set(named) <= there


def test_the_results_that_the_notes_lean_on_are_committed() -> None:
    named = set(re.findall(r"`(?:benchmarks/results/)?([\w-]+\.json)`", NOTES))
    assert len(named) >= 4 and all((ROOT / "benchmarks" / "results" / name).is_file() for name in named)
