"""Checkpoints travel through the Hub: pushed with a card, and loaded, served and pulled by name."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from latentwire.bridge.checkpoint import BUILTIN_BRIDGE
from tests.hub import TOKEN, Hub, running_hub
from tests.ports import free_port
from tests.reports import document, written

NAME = "someone/toy-bridge"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


def latentwire(home: Path, url: str, *words: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    where = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": token}
    environment = {**os.environ, **where, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(
        [sys.executable, "-m", "latentwire", *words], env=environment, capture_output=True, text=True, timeout=300
    )


def test_a_checkpoint_is_pushed_with_a_card_and_its_report_and_loaded_and_pulled_by_name(
    hub: Hub, tmp_path: Path
) -> None:
    bridge_id = json.loads((BUILTIN_BRIDGE / "config.json").read_text())["bridge_id"]
    report = document(bridge_id=bridge_id)
    measured, source = written(tmp_path / "report.json", report), report["examples"][0]["source"]
    words = ("push", "builtin", NAME, "--report", str(measured), "--message", "The first", "--private")
    pushed = latentwire(tmp_path / "here", hub.url, *words)
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.strip().endswith(NAME)
    repository = hub.repositories[NAME]
    assert repository.private and repository.messages == ["The first"]

    card = repository.files["README.md"].decode()
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "latentwire"
    assert f'Bridge.load("hf://{NAME}")' in text and "| none | 0.000 | 0.000-" in text and bridge_id in text
    assert source not in repository.files["report.json"].decode()
    weights = {path.name for path in BUILTIN_BRIDGE.iterdir()}
    assert set(repository.files) == {*weights, "README.md", "report.json", ".gitattributes"}

    asked = ("--text", "Mara wants a cup of tea.", "--prompt", "Question: What does Mara want?\nAnswer:")
    said = latentwire(tmp_path / "there", hub.url, "generate", f"hf://{NAME}", *asked)
    assert said.returncode == 0 and "a cup of tea" in said.stdout, said.stderr

    pulled = latentwire(tmp_path / "there", hub.url, "pull", NAME, "--out", str(tmp_path / "bridge"))
    assert pulled.returncode == 0 and bridge_id in pulled.stdout, pulled.stderr
    for file in BUILTIN_BRIDGE.glob("*.safetensors"):
        here, there = load_file(file), load_file(tmp_path / "bridge" / file.name)
        assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here), file
    again = latentwire(tmp_path / "there", hub.url, "pull", NAME, "--out", str(tmp_path / "bridge"))
    assert again.returncode == 2 and "already holds a checkpoint" in again.stderr


def test_what_the_repository_held_of_another_checkpoint_goes(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    for bridge in ("builtin", str(checkpoint)):
        pushed = latentwire(tmp_path, hub.url, "push", bridge, "someone/changed")
        assert pushed.returncode == 0, pushed.stderr
    wanted = {path.name for path in checkpoint.glob("*.safetensors") if path.name.startswith(("encoder-", "head-"))}
    files = hub.repositories["someone/changed"].files
    assert {name for name in files if name.endswith(".safetensors")} == wanted
    assert "gate.json" not in files and "Nothing was measured yet." in files["README.md"].decode()


def test_what_cannot_be_is_one_clear_line(hub: Hub, tmp_path: Path) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    other = str(written(tmp_path / "other.json", document(bridge_id="0" * 32)))
    for url, words, wanted in (
        (hub.url, ("push", "builtin", NAME, "--report", other), "is of bridge 0000"),
        (hub.url, ("push", "builtin", "no name/at all"), "'no name/at all' is no name of a repository"),
        (hub.url, ("push", str(tmp_path), NAME), "no checkpoint at"),
        (hub.url, ("pull", "hf://someone/nothing", "--out", str(tmp_path / "a")), "hf://someone/nothing cannot be had"),
        (nobody, ("push", "builtin", NAME), f"{NAME!r} cannot be written on the Hub"),
    ):
        done = latentwire(tmp_path, url, *words)
        assert done.returncode == 2 and done.stderr.startswith("latentwire: "), done.stderr
        assert wanted in done.stderr and done.stderr.count("\n") == 1, done.stderr
    refused = latentwire(tmp_path, hub.url, "push", "builtin", NAME, token="another")
    assert refused.returncode == 2 and "a token with write access is wanted" in refused.stderr
    assert not (tmp_path / "a").exists()
