"""The scripts of ``examples/``, as a user runs them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from latentwire.service.cli.demo import running
from tests.ports import free_port

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: object, **variables: str) -> list[str]:
    command = [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_example_is_run_here() -> None:
    tested = {"ask_many", "two_models", "own_task", "own_encoder", "openai_client"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


def test_a_text_is_encoded_once_and_asked_about_many_times() -> None:
    lines = run("ask_many")
    assert "soft tokens in a message of" in lines[0]
    assert [line.partition("? ")[2] for line in lines[1:]] == [
        "Mara wants a cup of tea.", "Ben lives in Rome.", "Otto wants a silver ring.",
    ]  # fmt: skip


def test_two_models_in_two_processes_talk_in_latents() -> None:
    answers = [line.partition("? ")[2] for line in run("two_models")]
    assert answers == ["Mara wants a cup of tea.", "Mara lives in Oslo.", "Otto sings."]


def test_a_bridge_is_trained_and_measured_on_ones_own_data(tmp_path: Path) -> None:
    lines = run("own_task", "--folder", tmp_path, "--steps", 2, "--limit", 2)
    assert any("bridge" in line and "soft tokens from the sender" in line for line in lines)
    assert "orders" in (tmp_path / "report.html").read_text()


def test_a_bridge_is_trained_with_an_encoder_of_ones_own(tmp_path: Path) -> None:
    lines = run("own_encoder", "--out", tmp_path / "run", "--steps", 2, "--limit", 2)
    assert any("→ maximum (" in line for line in lines)
    assert any("bridge" in line and "soft tokens from the sender" in line for line in lines)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[str]:
    port = free_port()
    with running("builtin", port, tmp_path / "log"):
        yield f"http://127.0.0.1:{port}"


def test_openais_client_gets_both_kinds_of_answers(service: str) -> None:
    assert [line.strip() for line in run("openai_client", LATENTWIRE_URL=service)] == ["Ben lives in Rome."] * 2
