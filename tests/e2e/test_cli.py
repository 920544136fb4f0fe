"""The command line as a user meets it. Real processes where the process matters, ``main`` in this one elsewhere."""

import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from latentwire.bridge.checkpoint import load_bridge, make_bridge, read_manifest, save_bridge
from latentwire.bridge.evaluation.conditions import CONDITIONS, TRAINED
from latentwire.bridge.models import fingerprint_of
from latentwire.service.__main__ import app, main
from latentwire.service.cli.demo import check_free
from latentwire.service.client.client import Client
from latentwire.service.client.types import ServiceError
from latentwire.training import loop, prepare
from latentwire.training.prepare import code_version
from tests.ports import free_port

LATENTWIRE = Path(sys.executable).with_name("latentwire")
TEXT = "Mara lives in Rome."
START_SECONDS = 120.0

Run = Callable[..., str]
Refuse = Callable[..., str]


@pytest.fixture(autouse=True)
def few_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thousand scenes take longer to look at than these runs."""
    monkeypatch.setattr(prepare, "CHECKED", 20)


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["latentwire", *map(str, arguments)])
    monkeypatch.setenv("LW_FRONTENDS", "0")  # a process that runs tests is not to fork
    main()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; it must succeed. Returns what it printed."""

    def call(*arguments: object) -> str:
        with pytest.raises(SystemExit) as caught:
            run_main(monkeypatch, *arguments)
        said = capsys.readouterr()
        assert caught.value.code in (0, None), said.err
        return said.out

    return call


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Run a command that must end with code 2 and one line on stderr, and serve nothing. Returns that line."""
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: pytest.fail("it was served"))

    def call(*arguments: object) -> str:
        with pytest.raises(SystemExit) as caught:
            run_main(monkeypatch, *arguments)
        said = capsys.readouterr().err
        assert caught.value.code == 2
        assert said.startswith("latentwire: ") and said.endswith("\n") and said.count("\n") == 1, said
        assert "Traceback" not in said
        return said

    return call


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint with one byte of the encoder changed."""
    copy = Path(shutil.copytree(checkpoint, tmp_path / "damaged"))
    (weights,) = copy.glob("encoder-*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    return copy


@pytest.fixture
def changed(
    request: pytest.FixtureRequest, checkpoint: Path, model_folders: dict[str, Path], tmp_path: Path
) -> tuple[Path, Path]:
    """A copy of the checkpoint over copies of its models, and the folder of the one whose weights are others now."""
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    text = (copy / "config.json").read_text()
    for role, family in (("sender", "neox"), ("receiver", "llama")):
        shutil.copytree(model_folders[family], tmp_path / role)
        text = text.replace(str(model_folders[family]), str(tmp_path / role))
    (copy / "config.json").write_text(text)
    weights = tmp_path / request.param / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    return copy, weights.parent


@pytest.fixture
def message(checkpoint: Path, tmp_path: Path, run: Run) -> Path:
    """A message of the bridge in a file."""
    file = tmp_path / "text.latent"
    run("encode", checkpoint, "--text", TEXT, "--out", file)
    return file


def training(model_folders: dict[str, Path], out: Path, *more: object) -> list[object]:
    return [
        "train", "--sender", model_folders["neox"], "--receiver", model_folders["llama"], "--task", "world",
        "--out", out, "--max-steps", 2, "--batch-size", 2, "--latent-dim", 16, "--hidden-dim", 32, "--depth", 1,
        "--validation-examples", 2, *more,
    ]  # fmt: skip


HERE = "train plan plot export calibrate quantise evaluate report encode generate score read inspect".split()


@pytest.mark.parametrize("command", [[], *([command] for command in HERE)])
def test_every_command_explains_itself(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize("command", [["serve"], ["demo"], ["corpus", "export"], ["corpus", "check"]])
def test_the_other_commands_explain_themselves(command: list[str]) -> None:
    assert CliRunner().invoke(app, [*command, "--help"]).exit_code == 0


def test_documents_become_a_corpus_that_is_checked_and_what_is_wrong_is_one_line(
    run: Run, refuse: Refuse, checkpoint: Path, tmp_path: Path
) -> None:
    docs, out = tmp_path / "docs.jsonl", tmp_path / "docs.lw"
    docs.write_text('{"body": "Mara sings.", "n": 3}\n{"body": "Ben sings.", "n": 4}\n')
    encode = ["encode", checkpoint, "--input", docs, "--out", out]
    assert "line 1: the field 'text' is missing; it has body, n" in refuse(*encode)
    assert "2 documents, int8" in run(*encode, "--text-field", "body", "--id-field", "n", "--dtype", "int8")
    assert "2 documents of 23 sender tokens" in run("corpus", "check", out)
    assert "there is such a file; say --overwrite" in refuse(*encode, "--text-field", "body")
    assert "give exactly one of --text and --input" in refuse(*encode, "--text", "a")
    assert "give exactly one of --text and --input" in refuse("encode", checkpoint, "--out", out)
    assert "--input runs here" in refuse(*encode, "--url", "http://127.0.0.1:1")
    out.write_bytes(out.read_bytes()[:-1])
    assert "docs.lw: it is no whole corpus" in refuse("corpus", "check", out)
    assert "there is no such file" in refuse("corpus", "export", tmp_path / "no.lw", "--parquet", tmp_path / "p")


def test_help_lists_every_command_and_needs_no_torch() -> None:
    code = "import sys; from latentwire.service.__main__ import main; sys.argv = ['latentwire', '--help']\n"
    code += "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in (
        "train",
        "plan",
        "plot",
        "export",
        "evaluate",
        "report",
        "encode",
        "generate",
        "score",
        "read",
        "inspect",
        "serve",
        "demo",
    ):
        assert command in done.stdout


def test_a_bridge_is_trained_inspected_measured_and_asked(
    run: Run, refuse: Refuse, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    out, report, file = tmp_path / "bridge", tmp_path / "report.json", tmp_path / "text.latent"
    said = run(*training(model_folders, out))
    shown = run("inspect", out)
    manifest = json.loads((out / "config.json").read_text())
    assert manifest["bridge_id"] in said and manifest["bridge_id"] in shown
    assert manifest["bridge"]["provenance"]["steps"] == 2
    assert "every file matches its digest" in shown
    run("evaluate", out, "--task", "world", "--limit", 4, "--out", report)
    conditions = json.loads(report.read_text())
    assert {"direct", "mismatched", "none"} <= set(str(conditions).replace("'", " ").split())
    assert f"{len(file_bytes(run, out, file))} bytes" in run("encode", out, "--text", TEXT, "--out", file)
    ask = ["--prompt", "Where?", "--max-tokens", 8]
    assert run("generate", out, "--latent", file, *ask) == run("generate", out, "--text", TEXT, *ask)
    choices = ["--prompt", "Where?", "--choice", " Rome", "--choice", " Paris\\n"]
    scored = run("score", out, "--latent", file, *choices)
    assert scored == run("score", out, "--text", TEXT, *choices)
    assert sorted(line.split("tokens  ")[1] for line in scored.splitlines()) == ["' Paris\\n'", "' Rome'"]
    assert "give exactly one of --text and --latent" in refuse("score", out, *choices)
    check = ["--against", TEXT, "--max-tokens", 8]
    says, against = run("read", out, "--latent", file, *check).splitlines()
    assert run("read", out, "--text", TEXT, *check).splitlines() == [says, against]
    assert re.fullmatch(r"says     +-[\d.]+ nats    8 tokens  '.*'  cut at --max-tokens", says)
    assert re.fullmatch(rf"against  +-[\d.]+ nats  +\d+ tokens  {TEXT!r}", against)
    assert "give exactly one of --text and --latent" in refuse("read", out, *check)
    assert "2 originals for 1 inputs" in refuse("read", out, "--latent", file, *check, "--against", TEXT)
    sampled = ["--temperature", 1, "--seed", 3]
    assert run("generate", out, "--text", TEXT, *ask, *sampled) == run("generate", out, "--text", TEXT, *ask, *sampled)
    assert "already holds a checkpoint" in refuse(*training(model_folders, out))


def test_what_a_bridge_says_that_was_not_taught_to_repeat_is_called_no_evidence(
    checkpoint: Path, message: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_main(monkeypatch, "read", checkpoint, "--latent", message, "--max-tokens", 2)
    said = capsys.readouterr()
    assert caught.value.code in (0, None) and said.out.count("\n") == 1
    assert (
        "was not trained to repeat without mode tokens: what it says is no evidence" in said.err
        and said.err.count("\n") == 1
    )


def test_an_interrupted_run_ends_with_code_130_and_resumes_to_what_it_would_have_been(
    run: Run, model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, take_step = tmp_path / "bridge", loop.take_step

    def interrupted(state: Any, step: int, rows: Any, **rest: Any) -> Any:
        if step == 1:
            raise KeyboardInterrupt
        return take_step(state, step, rows, **rest)

    command = training(model_folders, out, "--save-every", 1)
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as caught:
        patched.setattr(loop, "take_step", interrupted)
        run_main(patched, *command)
    assert caught.value.code == 130
    assert "resumed after step 1" in " ".join(run(*command, "--resume").split())
    assert "resumed" not in run(*training(model_folders, tmp_path / "whole"))
    assert read_manifest(out).bridge_id == read_manifest(tmp_path / "whole").bridge_id


def test_a_report_holds_what_its_readers_were_promised(
    run: Run, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    out, file = tmp_path / "bridge", tmp_path / "reports" / "world.json"
    run(*training(model_folders, out))
    said = run("evaluate", out, "--task", "world", "--limit", 3, "--controls", "--out", file)
    report = json.loads(file.read_text())
    assert set(report) == {
        "checkpoint", "bridge_id", "task", "n", "conditions", "bytes", "source_tokens_per_soft_token",
        "receiver_tokens_per_soft_token", "truncated", "content_share", "content_share_interval", "sender_share",
        "sender_share_interval", "headline", "comparisons", "dropped", "checks", "about", "examples", "slots",
        "latents", "gate", "left_out",
    }  # fmt: skip
    assert (report["checkpoint"], report["task"], report["n"]) == (str(out), "world", 3)
    assert report["bridge_id"] == read_manifest(out).bridge_id
    assert set(report["bytes"]) == {"latent", "source", "receiver_kv"}
    assert list(report["conditions"]) == [*CONDITIONS, *(name for name in TRAINED if name != "probe")]
    for name, row in report["conditions"].items():
        assert set(row) == {"metric", "value", "low", "high", "ttft_ms", "token_f1"}
        assert name in said


def test_without_controls_only_the_bridge_asked_about_is_measured(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    run("evaluate", checkpoint, "--task", "world", "--limit", 2, "--out", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    conditions = report["conditions"]
    assert "bridge" in conditions and not {"prompt", "random_sender"} & set(conditions) and "latency" not in report


def test_latency_is_measured_shown_and_kept(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    said = run("evaluate", checkpoint, "--task", "world", "--limit", 2, "--latency", "--out", tmp_path / "report.json")
    assert "milliseconds until 16 tokens are written" in said and "prefix_cached" in said
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["latency"]["batches"]["1"]) == {"bridge", "stored", "direct", "prefix_cached", "relay"}
    assert "milliseconds until 16 tokens" in run("report", tmp_path / "report.json")
    page = (tmp_path / "report.html").read_text()
    assert "Time to answer" in page and "8 at once" in page and "the latent is at hand" in page


def test_a_task_may_be_called_anything(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"said": "Ben lives in Oslo.", "where": "Oslo"}\n')
    (tmp_path / "test.jsonl").write_text('{"said": "Mara lives in Rome.", "where": "Rome"}\n' * 2)
    (tmp_path / "task.toml").write_text(
        'name = "x[/b]"\nkind = "generation"\ntrain = "rows.jsonl"\ntest = "test.jsonl"\nsource = "{said}"\n'
        'prompt = "{latent}\\nWhere?"\nanswer = "{where}"\nmax_answer_tokens = 4\n'
    )
    assert "x[/b], 2 held-out examples" in run("evaluate", checkpoint, "--task", tmp_path / "task.toml")


@pytest.mark.parametrize("narrow", [["--top-k", 1], ["--top-p", 1e-6]], ids=str)
def test_top_k_and_top_p_leave_only_likely_tokens_to_choose_from(
    run: Run, checkpoint: Path, narrow: list[object]
) -> None:
    ask = ["generate", checkpoint, "--text", TEXT, "--prompt", "Where?", "--max-tokens", 8]
    greedy, hot = run(*ask), ["--temperature", 100, "--seed", 1]
    assert run(*ask, *hot) != greedy
    assert run(*ask, *hot, *narrow) == greedy


def test_an_answer_ends_before_the_first_stop_string(run: Run, checkpoint: Path) -> None:
    ask = ["generate", checkpoint, "--text", TEXT, "--prompt", "Where?", "--max-tokens", 24, "--temperature", 1]
    free = run(*ask, "--seed", 3)
    stop = next(letter for letter in free[1:] if letter.isascii() and letter.isprintable() and letter != free[0])
    assert run(*ask, "--seed", 3, "--stop", "never said", "--stop", stop) == free[: free.index(stop)] + "\n"


def file_bytes(run: Run, checkpoint: Path, file: Path) -> bytes:
    run("encode", checkpoint, "--text", TEXT, "--out", file)
    return file.read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "int8", "float32"])
def test_a_message_is_as_long_as_its_dtype_makes_it(run: Run, checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    file = tmp_path / "text.latent"
    said = run("encode", checkpoint, "--text", TEXT, "--out", file, "--dtype", dtype)
    sizes = {"float16": 36 + 5 * 16 * 2, "int8": 36 + 5 * 4 + 5 * 16, "float32": 36 + 5 * 16 * 4}
    assert file.stat().st_size == sizes[dtype]
    assert dtype in said


def test_backslash_n_in_a_prompt_is_a_new_line(run: Run, checkpoint: Path) -> None:
    ask = ["generate", checkpoint, "--text", TEXT, "--max-tokens", 6, "--prompt"]
    assert run(*ask, "Where?\\nAnswer:") == run(*ask, "Where?\nAnswer:")


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--task", "weather", "'weather'"),
        ("--sender", "builtin:nobody", "'builtin:nobody'"),
        ("--receiver", "/no/such/folder", "/no/such/folder"),
        ("--layer", "9", "--layer 9"),
        ("--encoder", "vq", "'vq'"),
        ("--max-steps", "0", "max_steps"),
        ("--learning-rate", "0", "learning_rate"),
        ("--hidden-dim", "65", "multiple of 32, got 65"),
        ("--out", "/proc/nowhere/bridge", "/proc/nowhere/bridge"),
    ],
)
def test_training_refuses_a_bad_value_and_names_it(
    refuse: Refuse, model_folders: dict[str, Path], tmp_path: Path, option: str, value: str, named: str
) -> None:
    assert named in refuse(*training(model_folders, tmp_path / "bridge", option, value))
    assert not (tmp_path / "bridge" / "config.json").exists()


def test_training_needs_a_sender(refuse: Refuse, tmp_path: Path) -> None:
    assert "sender and receiver are needed" in refuse("train", "--task", "world", "--out", tmp_path)


@pytest.mark.parametrize(
    ("toml", "named"),
    [("max_step = 5", "max_step"), ("max_steps = 'few'", "few"), ("max_steps =", "run.toml"), ("sender = 5", "sender")],
)
def test_a_wrong_file_is_refused_and_the_key_named(
    refuse: Refuse, model_folders: dict[str, Path], tmp_path: Path, toml: str, named: str
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(toml)
    flags = ["--receiver", model_folders["llama"], "--task", "world", "--out", tmp_path / "bridge"]
    sender = [] if toml.startswith("sender") else ["--sender", model_folders["neox"]]
    assert named in refuse("train", "--config", file, *sender, *flags)


def test_a_missing_file_of_settings_is_named(refuse: Refuse, tmp_path: Path) -> None:
    assert "absent.toml" in refuse("train", "--config", tmp_path / "absent.toml")


@pytest.mark.parametrize("command", ["inspect", "encode", "generate", "evaluate", "serve"])
@pytest.mark.parametrize("kind", ["absent", "damaged"])
def test_every_command_refuses_a_checkpoint_it_cannot_trust(
    refuse: Refuse, damaged: Path, tmp_path: Path, command: str, kind: str
) -> None:
    where = damaged if kind == "damaged" else tmp_path / "absent"
    arguments: dict[str, list[object]] = {
        "inspect": [where],
        "encode": [where, "--text", "a", "--out", tmp_path / "out"],
        "generate": [where, "--text", "a", "--prompt", "b"],
        "evaluate": [where, "--task", "world", "--limit", 2],
        "serve": ["--bridge", f"tiny={where}", "--port", 0],
    }
    said = refuse(command, *arguments[command])
    assert str(where) in said
    assert ("no checkpoint" in said) == (kind == "absent")
    assert ("damaged:" in said) == (kind == "damaged")


def test_an_unknown_control_is_refused_before_anything_is_looked_for(refuse: Refuse, tmp_path: Path) -> None:
    said = refuse("evaluate", tmp_path / "absent", "--task", "world", "--control", "lora")
    assert "no control is called 'lora'; there are direct_tuned, receiver_lora" in said


def test_a_damaged_config_is_refused(refuse: Refuse, checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text[: len(text) // 2])
    assert "config.json" in refuse("inspect", copy)


def test_a_model_that_has_gone_is_named(refuse: Refuse, checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    config = copy / "config.json"
    manifest = json.loads(config.read_text())
    sender = manifest["bridge"]["sender"]["name"]
    config.write_text(config.read_text().replace(sender, "/gone/away"))
    assert "/gone/away" in refuse("inspect", copy)
    assert "/gone/away" in refuse("encode", copy, "--text", "a", "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("command", "changed"),
    [
        (["inspect"], "sender"),
        (["inspect"], "receiver"),
        (["encode", "--text", TEXT], "sender"),
        (["generate", "--text", TEXT, "--prompt", "Where?"], "sender"),
        (["generate", "--text", TEXT, "--prompt", "Where?"], "receiver"),
        (["evaluate", "--task", "world", "--limit", 2], "sender"),
        (["evaluate", "--task", "world", "--limit", 2], "receiver"),
        (["serve"], "receiver"),
    ],
    indirect=["changed"],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_model_that_is_not_the_one_trained_with_is_refused_with_both_digests(
    refuse: Refuse, checkpoint: Path, changed: tuple[Path, Path], tmp_path: Path, command: list[object]
) -> None:
    copy, folder = changed
    bridge = read_manifest(checkpoint).bridge
    known = bridge.sender if folder.name == "sender" else next(iter(bridge.heads.values())).receiver
    name, *options = command
    where: list[object] = ["--bridge", f"tiny={copy}"] if name == "serve" else [copy]
    out = ["--out", tmp_path / "out"] if name == "encode" else []
    said = refuse(name, *where, *options, *out)
    assert f"{folder.name} {str(folder)!r}" in said
    assert f"weights is {known.fingerprint.weights}; this one's is {fingerprint_of(str(folder)).weights}" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["inspect", "encode", "generate", "evaluate", "serve"])
def test_a_name_longer_than_any_path_is_refused_in_one_short_line(refuse: Refuse, tmp_path: Path, command: str) -> None:
    name = "a" * 5000
    arguments: dict[str, list[object]] = {
        "inspect": [name],
        "encode": [name, "--text", "a", "--out", tmp_path / "out"],
        "generate": [name, "--text", "a", "--prompt", "b"],
        "evaluate": [name, "--task", "world"],
        "serve": ["--bridge", f"tiny={name}"],
    }
    said = refuse(command, *arguments[command])
    assert name[:100] in said and "File name too long" in said
    assert len(said) < 300


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--dtype", "float64"], "'float64'"),
        (["--out", "/proc/nowhere/latent"], "/proc/nowhere/latent"),
        (["--text", " "], "' '"),
        (["--text", "a" * 128], "129 sender tokens; this bridge reads at most 128"),
        (["--text", "\udcff"], "'\\udcff'"),
    ],
)
def test_encode_refuses_a_bad_value_and_names_it(
    refuse: Refuse, checkpoint: Path, tmp_path: Path, options: list[str], named: str
) -> None:
    assert named in refuse("encode", checkpoint, "--text", "a", "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], "--text and --latent"),
        (["--text", "a", "--latent", "b"], "--text and --latent"),
        (["--latent", "/no/such/file"], "/no/such/file"),
        (["--text", "a", "--receiver", "nobody"], "'nobody'"),
        (["--text", "a", "--max-tokens", "1000"], "receiver tokens"),
    ],
)
def test_generate_refuses_a_bad_value_and_names_it(
    refuse: Refuse, checkpoint: Path, options: list[str], named: str
) -> None:
    assert named in refuse("generate", checkpoint, "--prompt", "Where?", *options)


def test_a_truncated_message_is_refused(refuse: Refuse, checkpoint: Path, message: Path) -> None:
    whole = message.read_bytes()
    message.write_bytes(whole[:-1])
    said = refuse("generate", checkpoint, "--latent", message, "--prompt", "Where?")
    assert str(len(whole) - 1) in said and str(len(whole)) in said


@pytest.mark.parametrize(
    ("number", "right_checksum", "said"),
    [(b"\x00\x3c", False, "it was altered"), (b"\x00\x7e", True, "NaN"), (b"\x00\x7c", True, "infinite")],
    ids=["altered", "nan", "infinite"],
)
def test_a_message_no_encoder_sent_is_refused(
    refuse: Refuse, checkpoint: Path, message: Path, number: bytes, right_checksum: bool, said: str
) -> None:
    whole = message.read_bytes()
    changed = whole[:36] + number + whole[38:]
    crc = zlib.crc32(changed[36:], zlib.crc32(changed[:32] + bytes(4)))
    message.write_bytes(changed[:32] + (struct.pack("<I", crc) if right_checksum else whole[32:36]) + changed[36:])
    assert said in refuse("generate", checkpoint, "--latent", message, "--prompt", "Where?")


def test_a_message_of_another_bridge_is_refused_with_both_ids(
    refuse: Refuse, checkpoint: Path, message: Path, tmp_path: Path
) -> None:
    manifest, _ = load_bridge(str(checkpoint))
    torch.manual_seed(2)
    other = save_bridge(tmp_path / "other", make_bridge(manifest.bridge))
    said = refuse("generate", tmp_path / "other", "--latent", message, "--prompt", "Where?")
    assert manifest.bridge_id in said and other.bridge_id in said


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--task", "weather"], "'weather'"),
        (["--dtype", "float64"], "'float64'"),
        (["--receiver", "nobody"], "'nobody'"),
    ],
)
def test_evaluate_refuses_a_bad_value_and_names_it(
    refuse: Refuse, checkpoint: Path, options: list[str], named: str
) -> None:
    assert named in refuse("evaluate", checkpoint, "--task", "world", "--limit", 2, *options)


@pytest.mark.parametrize("place", ["/proc/nowhere/report.json", "."], ids=["unwritable", "folder"])
def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(
    refuse: Refuse, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr("latentwire.bridge.evaluation.measure.measure", lambda *_, **__: pytest.fail("it was measured"))
    file = tmp_path / place
    said = refuse("evaluate", checkpoint, "--task", "world", "--limit", 2, "--out", file)
    assert f"--out {file}: " in said
    assert ("is a folder; expected a file" in said) == (place == ".")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--bridge", "tiny"], "'tiny'"),
        (["--bridge", "=x"], "'=x'"),
        (["--bridge", "a=x", "--bridge", "a=y"], "'a=y'"),
        (["--port", "65536"], "65536"),
        (["--memory-budget", "a lot"], "a lot"),
    ],
)
def test_serve_refuses_a_bad_value_and_names_it(refuse: Refuse, options: list[str], named: str) -> None:
    assert named in refuse("serve", *options)


def test_serve_on_ray_refuses_what_cannot_be_there(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "'local' or 'ray', got 'dask'" in refuse("serve", "--engine", "dask")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # nobody is there, and nobody is asked before bridges are open
    assert "nowhere" in refuse("serve", "--engine", "ray", "--port", 0, "--bridge", "a=nowhere")
    monkeypatch.setenv("LW_TASKS", '{"news": "news.toml"}')
    assert "LW_TASKS: evaluations do not run on Ray" in refuse("serve", "--engine", "ray", "--port", 0)
    monkeypatch.delitem(sys.modules, "latentwire.service.ray.deployments")
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    said = refuse("serve", "--engine", "ray", "--port", 0)
    assert "ray is not installed; pip install 'latentwire[ray]'" in said


def test_serve_refuses_a_misspelt_variable_and_names_it(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LW_MEMORY_BUGDET", "24GB")
    assert "LW_MEMORY_BUGDET" in refuse("serve")


@pytest.mark.parametrize(
    ("name", "value"),
    [("REDIS_URL", "localhost:6379"), ("MEMORY_BUDGET", "0"), ("STORE_TTL", "inf"), ("THREADS", "1000000")],
)
def test_serve_refuses_a_bad_variable_and_names_it(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"LW_{name}", value)
    said = refuse("serve")
    assert name.lower() in said and f"'{value}'" in said


def test_serve_does_not_repeat_the_password_of_a_redis_it_refuses(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LW_REDIS_URL", "valkey://user:s3cret@redis:6379")
    said = refuse("serve")
    assert "'redis:6379'" in said and "s3cret" not in said


def test_the_demo_refuses_a_port_it_could_not_serve_on_before_it_trains(
    refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "train", lambda *_, **__: pytest.fail("it trained"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port} cannot be listened on" in refuse("demo", "--port", port, "--out", tmp_path)
    check_free(port)


@pytest.fixture
def no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a read-only root where nothing is mounted at /tmp."""
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/nowhere"])
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", "/proc/nowhere")


@pytest.mark.usefixtures("no_temporary_folder")
def test_without_a_temporary_folder_memory_is_one(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("latentwire.service.__main__.SHARED_MEMORY", tmp_path)
    run("key", "someone")
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(tmp_path)


@pytest.mark.usefixtures("no_temporary_folder")
def test_where_nothing_can_be_written_every_command_says_what_is_missing(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentwire.service.__main__.SHARED_MEMORY", Path("/proc/nowhere"))
    assert "mount one at /tmp" in refuse("serve")


def test_the_version_of_the_code_needs_no_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The image has none."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_version() == version("latentwire")


def test_an_interrupt_that_reaches_the_entry_point_ends_with_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("latentwire.service.__main__.app", interrupted)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as caught:  # what got out would end pytest itself
        main()
    assert isinstance(caught.value, SystemExit) and caught.value.code == 130


def test_a_port_in_use_is_named(refuse: Refuse, checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}" in refuse("serve", "--bridge", f"tiny={checkpoint}", "--port", port)


def test_a_process_given_bad_input_ends_with_code_2_and_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [LATENTWIRE, "inspect", tmp_path / "absent"], capture_output=True, text=True, check=False, env={**os.environ}
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("latentwire: no checkpoint at ") and done.stderr.count("\n") == 1


@pytest.fixture
def server(checkpoint: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Client, str]]:
    """``latentwire serve`` as a process of its own, ready, and a client of it."""
    port = free_port()
    log = tmp_path / "serve.log"
    command = [LATENTWIRE, "serve", "--bridge", f"tiny={checkpoint}", "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            deadline = time.monotonic() + START_SECONDS
            while not client.ready():
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield process, client, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def test_a_served_bridge_answers_as_the_command_line_does_and_stops_when_told(
    server: tuple[subprocess.Popen[bytes], Client, str], checkpoint: Path, message: Path, run: Run, tmp_path: Path
) -> None:
    process, client, url = server
    (described,) = client.bridges()
    assert described.name == "tiny"
    latent = client.encode([TEXT], store=True).latents[0]
    forms: list[Any] = [{"text": TEXT}, latent, {"latent_id": latent.id}]
    answers = client.generate(forms, "Where?", max_tokens=8).texts
    assert len(set(answers)) == 1
    local = run("generate", checkpoint, "--latent", message, "--prompt", "Where?", "--max-tokens", 8)
    assert local == answers[0] + "\n"
    sampled = client.generate(forms[:1], "Where?", max_tokens=8, temperature=1, seed=3).texts[0]
    free = ["--prompt", "Where?", "--max-tokens", 8, "--temperature", 1, "--seed", 3]
    assert run("generate", checkpoint, "--latent", message, *free) == sampled + "\n"
    assert run("generate", "tiny", "--latent", message, *free, "--url", url) == sampled + "\n"
    assert run("generate", "tiny", "--text", TEXT, *free, "--url", url) == sampled + "\n"
    choices = ["--prompt", "Where?", "--choice", " Rome", "--choice", " Paris"]
    there = run("score", "tiny", "--text", TEXT, *choices, "--url", url)
    assert there == run("score", checkpoint, "--latent", message, *choices)
    check = ["--against", TEXT, "--max-tokens", 8]
    assert run("read", "tiny", "--latent", message, *check, "--url", url) == run(
        "read", checkpoint, "--latent", message, *check
    )
    run("encode", "tiny", "--text", TEXT, "--out", tmp_path / "there", "--url", url)
    assert (tmp_path / "there").read_bytes() == message.read_bytes() == latent.data
    with pytest.raises(ServiceError) as caught:
        client.encode([" "])
    assert (caught.value.status, caught.value.type, caught.value.param) == (422, "InvalidRequest", "inputs.0")
    assert caught.value.request_id
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    log = (tmp_path / "serve.log").read_text()
    assert "Traceback" not in log and TEXT not in log
    assert not client.ready()
