"""What the README says to type works as written; only numbers that take minutes are made small."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from typer.main import get_command

from latentwire.bridge.evaluation.tasks import world_task
from latentwire.service.__main__ import app
from latentwire.service.cli.demo import ask, running
from latentwire.service.client.client import Client
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for kind, block in BLOCKS
    if kind == "sh"
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]
QUICK = {"train": ["--max-steps", "2", "--batch-size", "2"], "evaluate": ["--limit", "4"]}


def latentwire(*arguments: str, cwd: Path) -> str:
    """Run the command line in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "latentwire", *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service of the built-in bridge: its address."""
    port = free_port()
    with running("builtin", port, tmp_path_factory.mktemp("serve") / "log"):
        yield f"http://127.0.0.1:{port}"


def test_the_block_of_local_commands_works_from_top_to_bottom(tmp_path: Path) -> None:
    elsewhere = re.compile(r"runs/news|bridges/news|\b(?:news|run|job)\.toml|^serve$")  # needs models or data we lack
    local = [c for c in COMMANDS if c[0] == "latentwire" and not any(elsewhere.search(word) for word in c)]
    assert [c[1] for c in local] == ["train", "evaluate", "inspect", "encode", "generate"]
    for command in local:
        latentwire(*command[1:], *QUICK.get(command[1], []), cwd=tmp_path)
    assert (tmp_path / "report.json").is_file() and (tmp_path / "m.lw").is_file()


def test_every_flag_in_the_readme_exists() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for command in (c for c in COMMANDS if c[0] == "latentwire"):
        commands[command[1]].make_context(command[1], command[2:])


def test_the_curl_commands_are_answered(service: str) -> None:
    curls = [c for c in COMMANDS if c[0] == "curl"]
    answers = []
    for command in curls:
        typed = [part.replace("http://127.0.0.1:8000", service) for part in command]
        if shutil.which("curl") is None:
            pytest.skip("curl is not installed")
        answers.append(subprocess.run(typed, capture_output=True, text=True, check=True).stdout)
    assert '"latents":' in answers[0] and '"id":' in answers[0]
    assert "Ben lives in Rome." in answers[1]
    assert answers[2].startswith("event: token") and "Mara wants a cup of tea." in answers[2].split("event: done")[1]


@pytest.mark.parametrize(
    "number, said", [(0, "Mara wants a cup of tea."), (1, "Ben lives in Rome.\n Ben lives in Rome.")]
)
def test_the_python_examples_print_what_the_receiver_says(
    service: str, capsys: pytest.CaptureFixture[str], number: int, said: str
) -> None:
    code = [block for kind, block in BLOCKS if kind == "python"][number]
    exec(code.replace("http://127.0.0.1:8000", service).replace('"builtin"', '"demo"'), {})
    assert capsys.readouterr().out.strip() == said


def answers(shown: str) -> list[dict[str, Any]]:
    """What the demo printed of /encode and of /generate."""
    return [json.loads(line) for line in shown.splitlines() if line.startswith("  {")]


def test_the_demo_and_the_readme_show_what_the_service_sends(service: str) -> None:
    said, example = io.StringIO(), world_task().test[0]
    ask(Console(file=said), int(service.rpartition(":")[2]), example)
    encoded, generated = answers(said.getvalue())
    (sent,) = httpx.post(f"{service}/encode", json={"inputs": [example.source]}).json()["latents"]
    assert encoded == {**sent, "data": encoded["data"]} and sent["data"].startswith(encoded["data"].removesuffix("…"))
    prompt = example.prompt.replace("{latent}", "").lstrip("\n")
    asked = {"inputs": [{"text": example.source}], "prompt": prompt}
    assert [generated] == httpx.post(f"{service}/generate", json=asked).json()["outputs"]
    (block,) = [block for kind, block in BLOCKS if not kind and "POST /encode" in block]
    assert [list(answer) for answer in answers(block)] == [list(encoded), list(generated)]


def test_the_demo_trains_measures_serves_and_ends(tmp_path: Path) -> None:
    port = str(free_port())
    shown = latentwire("demo", "--no-serve", "--max-steps", "3", "--limit", "4", "--port", port, cwd=tmp_path)
    for expected in ("step 3/3", "mismatched", "POST /encode", "POST /generate", "together"):
        assert expected in shown


def test_the_demo_stays_up_until_interrupted_and_leaves_nothing_behind(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "latentwire", "demo", "--max-steps", "2", "--limit", "2", "--port", str(port)]
    started = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True)
    with started, Client(f"http://127.0.0.1:{port}", trust_env=False) as client:
        assert started.stdout is not None
        assert any("Ctrl-C ends it" in line for line in started.stdout)
        assert client.ready()
        os.killpg(started.pid, signal.SIGINT)  # as a terminal does: to all of them
        assert started.wait(timeout=60) == 0
        assert not client.ready()


def test_make_demo_is_that_demo() -> None:
    typed = subprocess.run(["make", "-n", "demo", "SERVE=0"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ".venv/bin/latentwire demo --no-serve\n" in typed.stdout


def test_the_readme_has_no_blanks_left_to_fill() -> None:
    assert re.findall(r"@[A-Z]+@", (ROOT / "README.md").read_text()) == []


def test_the_readmes_tree_names_every_module_and_nothing_else() -> None:
    text = (ROOT / "README.md").read_text()
    tree = text[text.index("## Tree") : text.index("## Limits")]
    named = set(re.findall(r"[\w_]+\.py", tree))
    there = {path.name for name in ("bridge", "training", "service") for path in (ROOT / name).rglob("*.py")}
    assert there - {"__init__.py", "documents.py", "recipe.py"} <= named
    everywhere = {path.name for path in ROOT.glob("*/**/*.py") if ".venv" not in path.parts}
    assert named <= everywhere
