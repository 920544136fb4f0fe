"""The command line as a user meets it. Real processes where the process matters, ``main`` in this one elsewhere."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bridge.checkpoint import load_bridge, make_bridge, save_bridge
from service.__main__ import app, main
from service.client import Client, ServiceError

LATENTWIRE = Path(sys.executable).with_name("latentwire")
TEXT = "Mara lives in Rome."
START_SECONDS = 120.0

Run = Callable[..., str]
Refuse = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; it must succeed. Returns what it printed."""

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["latentwire", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        said = capsys.readouterr()
        assert caught.value.code in (0, None), said.err
        return said.out

    return call


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Run a command that must end with code 2 and one line on stderr. Returns that line."""

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["latentwire", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
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
def message(checkpoint: Path, tmp_path: Path, run: Run) -> Path:
    """A message of the bridge in a file."""
    file = tmp_path / "text.latent"
    run("encode", checkpoint, "--text", TEXT, "--out", file)
    return file


def training(model_folders: dict[str, Path], out: Path, *more: object) -> list[object]:
    return [
        "train", "--sender", model_folders["neox"], "--receiver", model_folders["llama"], "--task", "world",
        "--out", out, "--max-steps", 2, "--batch-size", 2, "--latent-dim", 16, "--hidden-dim", 32, "--depth", 1, *more,
    ]  # fmt: skip


@pytest.mark.parametrize("command", [[], *([c] for c in ("train", "evaluate", "encode", "generate", "inspect"))])
def test_every_command_explains_itself(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_the_serving_commands_explain_themselves(command: str) -> None:
    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_help_lists_every_command_and_needs_no_torch() -> None:
    code = "import sys; from service.__main__ import main; sys.argv = ['latentwire', '--help']\n"
    code += "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("train", "evaluate", "encode", "generate", "inspect", "serve", "demo"):
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
    sampled = ["--temperature", 1, "--seed", 3]
    assert run("generate", out, "--text", TEXT, *ask, *sampled) == run("generate", out, "--text", TEXT, *ask, *sampled)
    assert "already holds a checkpoint" in refuse(*training(model_folders, out))


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
    assert "sender: Field required" in refuse("train", "--task", "world", "--out", tmp_path)


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


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(
    refuse: Refuse, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.evaluation.report.evaluate", lambda *_, **__: pytest.fail("it was measured"))
    said = refuse("evaluate", checkpoint, "--task", "world", "--limit", 2, "--out", "/proc/nowhere/report.json")
    assert "/proc/nowhere/report.json" in said


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


def test_serve_refuses_a_misspelt_variable_and_names_it(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LW_MEMORY_BUGDET", "24GB")
    assert "LW_MEMORY_BUGDET" in refuse("serve")


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
def server(checkpoint: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Client]]:
    """``latentwire serve`` as a process of its own, ready, and a client of it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
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
            yield process, client
    finally:
        process.kill()
        process.wait()


def test_a_served_bridge_answers_as_the_command_line_does_and_stops_when_told(
    server: tuple[subprocess.Popen[bytes], Client], checkpoint: Path, message: Path, run: Run, tmp_path: Path
) -> None:
    process, client = server
    (described,) = client.bridges()
    assert described["name"] == "tiny"
    latent = client.encode([TEXT], store=True)["latents"][0]
    forms = [{"text": TEXT}, {"latent": latent["data"]}, {"latent_id": latent["id"]}]
    answers = [output["text"] for output in client.generate(forms, "Where?", max_tokens=8)["outputs"]]
    assert len(set(answers)) == 1
    local = run("generate", checkpoint, "--latent", message, "--prompt", "Where?", "--max-tokens", 8)
    assert local == answers[0] + "\n"
    sampled = client.generate(forms[:1], "Where?", max_tokens=8, temperature=1, seed=3)["outputs"][0]["text"]
    free = ["--prompt", "Where?", "--max-tokens", 8, "--temperature", 1, "--seed", 3]
    assert run("generate", checkpoint, "--latent", message, *free) == sampled + "\n"
    with pytest.raises(ServiceError) as caught:
        client.encode([" "])
    assert (caught.value.status, caught.value.type, caught.value.param) == (422, "InvalidRequest", "inputs")
    assert caught.value.request_id
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    log = (tmp_path / "serve.log").read_text()
    assert "Traceback" not in log and TEXT not in log
    assert not client.ready()
