"""What the documents say to type works as written; only numbers that take minutes are made small."""

import gzip
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from click import Command, Group
from lm_eval._cli import HarnessCLI
from rich.console import Console
from typer.main import get_command

from latentwire.bridge.corpus import Corpus
from latentwire.bridge.evaluation.tasks import TaskFile, world_task
from latentwire.service.__main__ import app, main
from latentwire.service.cli.demo import ask, running
from latentwire.service.client.client import Client
from latentwire.training.config import TrainConfig
from tests.documents import PAGES, ROOT, blocks, commands
from tests.ports import free_port

QUICK = {"train": ["--max-steps", "2", "--batch-size", "2"], "evaluate": ["--limit", "4"]}
A_RUN = [*QUICK["train"], "--validation-examples", "2", "--max-source-tokens", "64", "--cache", "c"]
SMALL = {**QUICK, "train": A_RUN, "pretrain": A_RUN}
TRAINING = ROOT / "docs" / "training.md"
PROGRAMS = {
    "curl",
    "docker",
    "helm",
    "kubectl",
    "latentwire",
    "latentwire-lm-eval",
    "make",
    "ray",
    "sbatch",
    "serve",
    "torchrun",
    "vllm",
} | {f".venv/bin/{name}" for name in ("pytest", "python", "ruff")}
# What the guide names and a test cannot have: models and layers of the Hub.
HERE = {
    "Qwen/Qwen2.5-1.5B": "builtin:neox",
    "meta-llama/Llama-3.2-1B": "builtin:llama",
    "gpt2": "random:builtin:llama",
    "14": "2",
    "20": "3",
}
MARK = "— end of block —"
# What takes minutes in Python.
SHORT = {
    "max_steps=1000": "max_steps=2, batch_size=2, validation_examples=2",
    '"max_steps": 1000': '"max_steps": 2, "batch_size": 2, "validation_examples": 2',
    "limit=100": "limit=4",
}


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
    elsewhere = re.compile(r"runs/news|bridges/news|\b(?:news|run|job)\.toml|^serve$")  # those have a test of their own
    typed = [c for block in blocks(TRAINING) for c in block.commands if c[0] == "latentwire"]
    local = [c for c in typed if not any(elsewhere.search(word) for word in c)]
    assert [c[1] for c in local] == ["train", "evaluate", "inspect", "encode", "generate"]
    for command in local:
        latentwire(*command[1:], *QUICK.get(command[1], []), cwd=tmp_path)
    assert (tmp_path / "report.json").is_file() and (tmp_path / "m.lw").is_file()


@pytest.fixture
def news(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the files that the guide shows, and a few lines of news."""
    for block in blocks(TRAINING):
        if block.file:
            code = block.code
            for there, here in HERE.items():
                code = code.replace(there, here)
            (tmp_path / block.file).write_text(code)
    shutil.copy(ROOT / "deploy" / "slurm" / "job.toml", tmp_path)
    topics = ("world", "sports", "business", "technology")
    for split in ("train", "test"):
        rows = [
            {"text": f"{split} {number}: news of {topic}.", "label": topic} for number in range(6) for topic in topics
        ]
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (tmp_path / f"news.{split}.jsonl.gz").write_bytes(gzip.compress(data))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_block_about_corpora_works_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = [block for block in blocks(ROOT / "docs" / "serving.md") if "--input" in block.code]
    lines = [json.dumps({"id": name, "title": name, "text": f"{name} lives in Rome."}) for name in ("Ben", "Mara")]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    for command in block.commands[:-1]:
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code in (0, None), command
    assert block.commands[-1] == ["latentwire", "serve", "--corpus", "corpora"]
    (served,) = (tmp_path / "corpora").iterdir()
    assert list(Corpus(served)) == ["Ben", "Mara"] and (tmp_path / "facts.parquet").is_file()


@pytest.mark.parametrize("part", ["latentwire serve --bridge news=runs", "latentwire plan", "latentwire pretrain"])
def test_the_blocks_about_a_task_of_ones_own_work_from_top_to_bottom(
    news: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    (block,) = [block for block in blocks(TRAINING) if block.kind == "sh" and part in block.code]
    for command in block.commands:
        if command[0] != "latentwire" or command[1] == "serve" or command[1:3] == ["slurm", "check"]:
            continue  # they serve for ever, take eight processes, or ask a cluster
        typed = [HERE.get(word, word) for word in command] + SMALL.get(command[1], [])
        monkeypatch.setattr(sys, "argv", typed)
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code in (0, None), typed
    assert (news / "runs" / "news" / "config.json").is_file()


def test_every_toml_file_in_the_guide_is_a_task_or_a_run() -> None:
    shown = {block.file: tomllib.loads(block.code) for block in blocks() if block.file}
    assert {"news.toml", "capitals.toml", "run.toml"} == set(shown)
    for fields in shown.values():
        (TaskFile if "kind" in fields else TrainConfig).model_validate(fields)


def test_every_program_in_the_documents_is_one_that_a_test_looks_at() -> None:
    assert {words[0] for block in blocks() for words in block.commands} == PROGRAMS


def parsed(command: Command, arguments: list[str]) -> None:
    """Refuse a flag or a subcommand that is not there."""
    if isinstance(command, Group):
        parsed(command.commands[arguments[0]], arguments[1:])
    else:
        command.make_context(command.name, arguments)


def test_every_flag_in_the_documents_exists() -> None:
    typed = commands("latentwire") + [words[words.index("-m") + 1 :] for words in commands("torchrun")]
    assert len(typed) >= 20
    for command in typed:
        parsed(get_command(app), command[1:])


def test_ray_is_called_as_the_documents_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for program, module in (("ray", "ray.scripts.scripts"), ("serve", "ray.serve.scripts")):
        cli = pytest.importorskip(module).cli
        typed = commands(program)
        assert typed
        for _, name, *arguments in typed:
            cli.commands[name].make_context(name, arguments)


def test_the_harness_is_called_as_the_documents_say() -> None:
    (command,) = commands("latentwire-lm-eval")
    asked = HarnessCLI()._parser.parse_args(command[1:])
    assert asked.model == "latentwire" and asked.model_args == {"checkpoint": "builtin", "condition": "bridge"}


def test_every_make_target_in_the_documents_exists() -> None:
    for command in commands("make"):
        subprocess.run([command[0], "-n", *command[1:]], cwd=ROOT, capture_output=True, check=True)


def test_every_file_that_a_command_of_the_documents_reads_is_there() -> None:
    typed = commands("docker") + commands(".venv/bin/pytest")
    named = [word for command in typed for word in command if re.fullmatch(r"(deploy|tests)/.*", word)]
    assert len(named) >= 4 and all((ROOT / word).is_file() for word in named)
    for command in commands(".venv/bin/python"):
        assert find_spec(command[command.index("-m") + 1])


def test_a_test_is_run_as_the_documents_say() -> None:
    typed = [command for command in commands(".venv/bin/pytest") if "-k" in command]
    assert typed
    for command in typed:
        subprocess.run([sys.executable, "-m", *command[0].split("/")[-1:], *command[1:], "-q"], cwd=ROOT, check=True)


def test_a_key_is_made_as_the_documents_say(tmp_path: Path) -> None:
    typed = [command for command in commands("latentwire") if command[1] == "key"]
    made = [json.loads(latentwire(*command[1:], cwd=tmp_path)) for command in typed]
    assert {(key["name"], *key["scopes"]) for key in made} == {("team-a", "infer"), ("prometheus",)}


def test_the_curl_commands_are_answered(service: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    answers = []
    for command in commands("curl"):
        typed = [part.replace("http://127.0.0.1:8000", service).replace("builtin", "demo") for part in command]
        done = subprocess.run([*typed, "--fail-with-body"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        answers.append(done.stdout)
    assert '"latents":' in answers[0] and '"id":' in answers[0]
    assert "Ben lives in Rome." in answers[1]
    assert answers[2].startswith("event: token") and "Mara wants a cup of tea." in answers[2].split("event: done")[1]
    assert '"best":' in answers[3] and answers[4].count('"text":"Ben lives in Oslo. Mara wants a cup of tea."') == 2
    assert '"freed_bytes":' in answers[6] and '"queued"' in answers[7]
    assert '"answered_from":"latent"' in answers[8] and '"trust":0.9' in answers[8]
    assert len(answers) == 11 and answers[9].count('"expires":null') == 2 and '"next":' in answers[10]


SCRIPTS = [page for page in PAGES if any(block.kind == "python" for block in blocks(page))]


@pytest.mark.parametrize("page", SCRIPTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_of_a_page_works_from_top_to_bottom_and_prints_what_the_page_says(
    page: Path, service: str, tmp_path: Path
) -> None:
    shown = [block for block in blocks(page) if block.kind == "python"]
    lines = [code for block in shown for code in (block.code, f"print({MARK!r})")]
    code = "\n".join(lines).replace("http://127.0.0.1:8000", service).replace('model="builtin"', 'model="demo"')
    for there, here in SHORT.items():
        code = code.replace(there, here)
    if "gguf_file" in code:  # needs a file of gigabytes
        compile(code, page, "exec")
        return
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for block, printed in zip(shown, done.stdout.split(MARK), strict=False):
        assert block.prints is None or printed.strip() == block.prints.strip()


def answers(shown: str) -> list[dict[str, Any]]:
    """What the demo printed of /encode and of /generate."""
    return [json.loads(line) for line in shown.splitlines() if line.startswith("  {")]


def test_the_demo_and_the_guide_show_what_the_service_sends(service: str) -> None:
    said, example = io.StringIO(), world_task().test[0]
    ask(Console(file=said), int(service.rpartition(":")[2]), example)
    encoded, generated = answers(said.getvalue())
    (sent,) = httpx.post(f"{service}/encode", json={"inputs": [example.source]}).json()["latents"]
    assert encoded == {**sent, "data": encoded["data"]} and sent["data"].startswith(encoded["data"].removesuffix("…"))
    prompt = example.prompt.replace("{latent}", "").lstrip("\n")
    asked = {"inputs": [{"text": example.source}], "prompt": prompt}
    assert [generated] == httpx.post(f"{service}/generate", json=asked).json()["outputs"]
    (block,) = [block for block in blocks(ROOT / "docs" / "index.md") if "POST /encode" in block.code]
    assert [list(answer) for answer in answers(block.code)] == [list(encoded), list(generated)]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_has_no_blanks_left_to_fill(page: Path) -> None:
    assert re.findall(r"@[A-Z]+@", page.read_text()) == []
