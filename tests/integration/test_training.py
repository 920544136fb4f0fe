"""A run: frozen models stay frozen, a killed run goes on as if nothing had happened, a bad one stops."""

import inspect
import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from bridge.checkpoint import load_bridge, read_manifest
from bridge.config import Manifest
from bridge.engine import answer_logits, token_losses
from bridge.errors import CorruptCheckpoint, InvalidRequest, TrainingFailed
from bridge.evaluation.tasks import Example
from bridge.models import FrozenLM, fingerprint_of, hidden_states, load_model
from bridge.prompt import IGNORE, Row, collate, compose
from tests.conftest import GATED, write_model
from training import loop
from training.config import TrainConfig, read_config
from training.data import Order, covered_words
from training.loop import Run, objectives, prepare, schedule, soft_tokens, take_step, train
from training.monitor import Monitor, StepRecord
from training.objectives import alignment_loss, answer_loss, answers_right
from training.state import load_state, save_state

ROOT = Path(__file__).resolve().parents[2]
MakeConfig = Callable[..., TrainConfig]


class Recorder(Monitor):
    """Keeps the records and shows nothing."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def log(self, record: StepRecord) -> None:
        self.records.append(record)


class Stopped(Exception):
    """The run was interrupted on purpose."""


@pytest.fixture
def make(model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeConfig:
    """A tiny run; keyword arguments change it."""
    monkeypatch.setattr(loop, "CHECKED", 20)  # two thousand scenes take longer than most of these runs

    def config(**changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "sender": str(model_folders["neox"]), "receiver": str(model_folders["llama"]), "task": "world",
            "out": tmp_path / "run", "ratio": 8, "latent_dim": 16, "hidden_dim": 32, "depth": 1, "max_steps": 6,
            "batch_size": 4, "warmup_steps": 2, "save_every": 2, "max_source_tokens": 48, "alignment_steps": 2,
            "reconstruction_weight": 0.0,
        }  # fmt: skip
        return TrainConfig(**{**values, **changes})

    return config


def quiet() -> Console:
    return Console(file=io.StringIO())


def said(console: Console) -> str:
    """What a quiet console took, in one line."""
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything a run keeps, by name, but for its log."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "log.jsonl"}


def parts(manifest: Manifest) -> list[str]:
    """Digests of all trained weights."""
    return [manifest.encoder.sha256, *(part.sha256 for part in manifest.heads.values())]


def log_of(folder: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def stop_before(monkeypatch: pytest.MonkeyPatch, fatal: int) -> None:
    """Interrupt a run when it takes step ``fatal``, counted from 0."""

    def stopping(run: Run, step: int, monitor: Monitor) -> None:
        if step == fatal:
            raise Stopped
        take_step(run, step, monitor)

    monkeypatch.setattr(loop, "take_step", stopping)


def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that the runs to come will take, as they take them."""
    taken: list[int] = []

    def counting(run: Run, step: int, monitor: Monitor) -> None:
        taken.append(step)
        take_step(run, step, monitor)

    monkeypatch.setattr(loop, "take_step", counting)
    return taken


def task_of(folder: Path, *rows: tuple[str, str, str]) -> str:
    """A task whose rows are (source, what follows the latent, answer)."""
    lines = [json.dumps({"t": source, "q": asked, "a": answer}) for source, asked, answer in rows]
    (folder / "rows.jsonl").write_text("".join(line + "\n" for line in lines))
    (folder / "task.toml").write_text(
        'name = "few"\nkind = "generation"\ntrain = "rows.jsonl"\ntest = "rows.jsonl"\n'
        'source = "{t}"\nprompt = "{latent}{q}"\nanswer = "{a}"\n'
    )
    return str(folder / "task.toml")


def examples_of(run: Run, count: int = 3) -> list[Example]:
    return [run.task.train[i] for i in range(count)]


def gradients(run: Run) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in run.bridge.parameters()]


def loss_and_gradients(run: Run, examples: list[Example]) -> tuple[dict[str, float], list[Tensor]]:
    for parameter in run.bridge.parameters():
        parameter.grad = None
    losses = objectives(run, examples, *soft_tokens(run, examples))
    torch.autograd.backward(losses["loss"])
    return {name: float(value.detach()) for name, value in losses.items()}, gradients(run)


PLAIN = {"learning_rate": 1.0, "matrix_learning_rate": 1.0, "warmup_steps": 0}


def plain(run: Run) -> Run:
    """The run under plain gradient descent, whose update shows the size of the gradient."""
    held = [optimizer.param_groups[0]["params"] for optimizer in run.optimizers]
    return replace(run, optimizers=[torch.optim.SGD(parameters, lr=1.0) for parameters in held])


def test_both_models_are_bit_identical_after_training_and_hold_no_gradients(make: MakeConfig) -> None:
    run = prepare(make(reconstruction_weight=1.0, alignment_steps=1))
    models = (run.sender, run.receiver)
    before = [{name: tensor.clone() for name, tensor in lm.model.state_dict().items()} for lm in models]
    trained = [p.detach().clone() for p in run.bridge.parameters()]
    for step in range(3):
        take_step(run, step, Recorder())
    for lm, weights in zip(models, before, strict=True):
        assert all(torch.equal(tensor, weights[name]) for name, tensor in lm.model.state_dict().items())
        assert all(p.grad is None and not p.requires_grad for p in lm.model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(trained, run.bridge.parameters(), strict=True))


@pytest.mark.parametrize("encoder", ["pooling", "linear", "perceiver", "mean", "prompt"])
def test_every_kind_of_encoder_trains_and_loads(make: MakeConfig, encoder: str) -> None:
    config = make(encoder=encoder, max_steps=2, num_latents=3, alignment_steps=None)
    manifest = train(config, quiet())
    loaded, bridge = load_bridge(config.out)
    assert loaded == manifest == read_manifest(config.out)
    assert bridge.config.encoder.kind == encoder and len(log_of(config.out)) == 2


def test_a_checkpoint_says_where_it_comes_from(make: MakeConfig) -> None:
    config = make(max_steps=1)
    origin = train(config, quiet()).bridge
    assert (origin.sender.fingerprint, origin.sender.name) == (fingerprint_of(config.sender), config.sender)
    assert origin.provenance.recipe == config.model_dump(mode="json", exclude={"out"})
    assert (origin.provenance.task, origin.provenance.seed, origin.provenance.steps) == ("world", 0, 1)
    assert origin.provenance.data_sha256 == loop.load_task("world").data_sha256
    number, _, commit = origin.provenance.code_version.partition("+")
    assert number == version("latentwire") and bool(commit) == (ROOT / ".git").exists()
    assert origin.layers == (2,) and origin.max_source_tokens == 48


def test_the_scale_in_a_checkpoint_is_the_one_measured_on_its_receiver(
    make: MakeConfig, lms: dict[str, FrozenLM]
) -> None:
    config = make(max_steps=1)
    train(config, quiet())
    head = load_bridge(config.out)[1].head(config.receiver)
    rows = lms["llama"].model.get_input_embeddings().weight
    assert head.embedding_rms == pytest.approx(float(rows.pow(2).mean(dim=1).sqrt().mean()), rel=1e-4)
    soft = head(torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0)))
    assert soft.pow(2).mean(dim=-1).sqrt().tolist()[0] == pytest.approx([head.embedding_rms] * 3, rel=1e-3)


@pytest.mark.parametrize("layer", [[1], [3], [3, 1]])
def test_the_layers_configured_are_the_layers_read(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch, layer: list[int]
) -> None:
    read: list[list[int]] = []

    def spying(lm: FrozenLM, ids: Tensor, mask: Tensor, layers: Any) -> Tensor:
        read.append(list(layers))
        return hidden_states(lm, ids, mask, layers)

    monkeypatch.setattr(loop, "hidden_states", spying)
    assert train(make(layer=layer, max_steps=2), quiet()).bridge.layers == tuple(layer)
    assert read == [layer, layer]


def test_the_seed_decides_everything(make: MakeConfig, tmp_path: Path) -> None:
    first, again, other = (
        parts(train(make(out=tmp_path / name, max_steps=2, seed=seed), quiet()))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again and first[0] != other[0]


@pytest.mark.parametrize("fatal", [0, 1, 2, 3, 5])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    make: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fatal: int
) -> None:
    straight = train(make(out=tmp_path / "straight"), quiet())
    config = make()
    with monkeypatch.context() as patch:
        stop_before(patch, fatal)
        with pytest.raises(Stopped):
            train(config, quiet())
    torch.manual_seed(123)  # whatever the new process did before
    resumed = train(config, quiet(), resume=True)
    assert parts(resumed) == parts(straight) and resumed.bridge_id == straight.bridge_id
    assert log_of(config.out) == log_of(tmp_path / "straight")
    assert [record["step"] for record in log_of(config.out)] == [1, 2, 3, 4, 5, 6]


def test_chance_goes_on_where_it_stopped(make: MakeConfig) -> None:
    run = prepare(make())
    run.config.out.mkdir()
    save_state(run.config.out, run.identity, 5, run.bridge.parameters(), run.optimizers)
    drawn = torch.rand(4)
    torch.manual_seed(99)
    assert load_state(run.config.out, run.identity, run.bridge.parameters(), run.optimizers) == 5
    assert torch.equal(torch.rand(4), drawn)


KILLED = """
import os, signal, sys
from pathlib import Path
from rich.console import Console
from training.config import read_config
from training.loop import train
from training.monitor import Monitor

def log(self, record, log=Monitor.log):
    log(self, record)
    if record.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

Monitor.log = log
train(read_config(Path(sys.argv[1]), {}), Console())
"""


def write_toml(path: Path, config: TrainConfig) -> Path:
    values = config.model_dump(mode="json", exclude_none=True)
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    return path


def test_a_run_killed_with_signal_9_is_resumed_bit_for_bit(make: MakeConfig, tmp_path: Path) -> None:
    config = make()
    command = [sys.executable, "-c", KILLED, str(write_toml(tmp_path / "run.toml", config))]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == -9
    assert [record["step"] for record in log_of(config.out)] == [1, 2, 3, 4, 5]
    straight = train(make(out=tmp_path / "straight"), quiet())
    assert parts(train(config, quiet(), resume=True)) == parts(straight)
    assert log_of(config.out) == log_of(tmp_path / "straight")


@pytest.mark.parametrize("fatal, left", [(3, [2, 3, 4, 5]), (1, [0, 1, 2, 3, 4, 5])])
def test_resuming_repeats_no_saved_step(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch, fatal: int, left: list[int]
) -> None:
    config = make()
    with monkeypatch.context() as patch:
        stop_before(patch, fatal)
        with pytest.raises(Stopped):
            train(config, quiet())
    taken, console = steps_taken(monkeypatch), quiet()
    train(config, console, resume=True)
    assert taken == left and ("resumed after step 2" in said(console)) == (fatal == 3)


def test_a_torn_last_line_of_the_log_stops_no_resuming_and_is_dropped(
    make: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train(make(out=tmp_path / "straight"), quiet())
    config = make()
    with monkeypatch.context() as patch:
        stop_before(patch, 2)
        with pytest.raises(Stopped):
            train(config, quiet())
    with (config.out / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert parts(train(config, quiet(), resume=True)) == parts(straight)
    assert log_of(config.out) == log_of(tmp_path / "straight")


def test_resuming_a_finished_run_changes_nothing(make: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(max_steps=2)
    first = train(config, quiet())
    taken = steps_taken(monkeypatch)
    assert parts(train(config, quiet(), resume=True)) == parts(first) and len(log_of(config.out)) == 2
    assert not taken


def test_a_checkpoint_without_a_state_is_not_resumed_and_not_touched(make: MakeConfig) -> None:
    config = make(max_steps=2)
    train(config, quiet())
    (config.out / "state.json").unlink()
    before, log = files_of(config.out), log_of(config.out)
    with pytest.raises(InvalidRequest, match=r"holds a checkpoint but no state\.json to go on from; --overwrite"):
        train(config, quiet(), resume=True)
    assert files_of(config.out) == before and log_of(config.out) == log


def test_resuming_where_nothing_was_begun_begins(make: MakeConfig) -> None:
    assert len(log_of(train(make(max_steps=1), quiet(), resume=True) and make().out)) == 1


@pytest.mark.parametrize(
    "key, was, now", [("learning_rate", 0.003, 0.5), ("max_steps", 2, 3), ("seed", 0, 4), ("ratio", 8, 4)]
)
def test_resuming_another_configuration_is_refused_with_both_values(
    make: MakeConfig, key: str, was: object, now: object
) -> None:
    train(make(**{"max_steps": 2, key: was}), quiet())
    with pytest.raises(InvalidRequest, match=f"--resume: {key} was {was}, now {now}") as caught:
        train(make(**{"max_steps": 2, key: now}), quiet(), resume=True)
    assert caught.value.param == key


def test_resuming_with_other_data_is_refused_with_both_digests(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(make(max_steps=2), quiet())
    before = loop.load_task("world")
    monkeypatch.setattr(loop, "load_task", lambda name: replace(before, data_sha256="f" * 64))
    with pytest.raises(InvalidRequest, match=f"data_sha256 was '{before.data_sha256}', now 'ffff"):
        train(make(max_steps=2), quiet(), resume=True)


@pytest.mark.parametrize("role, family", [("sender", "neox"), ("receiver", "llama")])
def test_resuming_with_another_model_under_the_same_name_is_refused_with_both_fingerprints(
    make: MakeConfig, tmp_path: Path, role: str, family: str
) -> None:
    folder = write_model(tmp_path / "model", family)
    config = make(max_steps=2, **{role: str(folder)})
    train(config, quiet())
    was, files = fingerprint_of(str(folder)), files_of(config.out)
    now = fingerprint_of(str(write_model(folder, family, seed=1)))
    with pytest.raises(InvalidRequest, match=f"{role}_fingerprint was '{was}', now '{now}'"):
        train(config, quiet(), resume=True)
    assert files_of(config.out) == files


def test_saving_more_often_is_no_other_run(make: MakeConfig) -> None:
    first = train(make(max_steps=2), quiet())
    assert parts(train(make(max_steps=2, save_every=1), quiet(), resume=True)) == parts(first)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"step": 1}', b"[]"])
def test_a_damaged_state_is_refused(make: MakeConfig, content: bytes) -> None:
    config = make(max_steps=2)
    train(config, quiet())
    (config.out / "state.json").write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=r"state\.json"):
        train(config, quiet(), resume=True)


def test_damaged_state_weights_are_refused(make: MakeConfig) -> None:
    config = make(max_steps=2)
    train(config, quiet())
    path = next(config.out.glob("state-*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpoint, match=path.name):
        train(config, quiet(), resume=True)


def test_one_state_is_kept(make: MakeConfig) -> None:
    config = make(save_every=1, max_steps=3)
    train(config, quiet())
    assert len(list(config.out.glob("*.safetensors"))) == 3  # encoder, head, state


def test_a_folder_with_a_checkpoint_is_not_written_over_unasked(make: MakeConfig) -> None:
    config = make(max_steps=1)
    first = train(config, quiet())
    with pytest.raises(InvalidRequest, match="already holds a checkpoint; give --resume, --overwrite"):
        train(config, quiet())
    assert read_manifest(config.out) == first
    second = train(make(max_steps=1, seed=1), quiet(), overwrite=True)
    assert parts(second) != parts(first) and len(log_of(config.out)) == 1


def test_a_folder_that_cannot_be_made_is_named(make: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match=r"--out .*file/run"):
        train(make(out=tmp_path / "file" / "run"), quiet())


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(make: MakeConfig) -> None:
    huge = {"learning_rate": 1e25, "matrix_learning_rate": 1e25, "warmup_steps": 0, "alignment_steps": None}
    config = make(save_every=1, encoder="perceiver", **huge)
    with pytest.raises(TrainingFailed, match=r"step [2-6]: the loss is .* not applied"):
        train(config, quiet())
    _, bridge = load_bridge(config.out)
    assert all(p.isfinite().all() for p in bridge.parameters())
    assert all(math.isfinite(record["loss"]) for record in log_of(config.out))


def test_weights_that_are_not_finite_are_not_saved_and_what_was_saved_is_kept(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make()
    kept: dict[str, bytes] = {}

    def poisoning(run: Run, step: int, monitor: Monitor) -> None:
        take_step(run, step, monitor)
        if step == 3:  # the update overflowed although loss and gradient were finite
            kept.update(files_of(config.out))
            with torch.no_grad():
                run.bridge.parameters()[-1].view(-1)[0] = math.inf

    monkeypatch.setattr(loop, "take_step", poisoning)
    with pytest.raises(TrainingFailed, match="step 4: a weight is not finite"):
        train(config, quiet())
    assert len(kept) == 5 and files_of(config.out) == kept


def test_the_state_is_there_before_the_checkpoint(make: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(max_steps=1)

    def killed(*_: object) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_bridge", killed)
        with pytest.raises(Stopped):
            train(config, quiet())
    assert sorted(path.suffix for path in config.out.iterdir()) == [".json", ".jsonl", ".safetensors"]
    assert train(config, quiet(), resume=True) == read_manifest(config.out)


def test_training_on_a_few_examples_brings_the_loss_down(make: MakeConfig, tmp_path: Path) -> None:
    task = task_of(tmp_path, *((f"Mara has {w}.", " What?", w) for w in ("cats", "a dog", "tea", "no idea")))
    config = make(task=task, max_steps=30, save_every=100, alignment_steps=0)
    train(config, quiet())
    losses = [record["answer_loss"] for record in log_of(config.out)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_alignment_brings_its_own_loss_down(make: MakeConfig) -> None:
    config = make(max_steps=20, alignment_steps=20, save_every=100)
    train(config, quiet())
    losses = [record["loss"] for record in log_of(config.out)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("kind, steps", [("pooling", 2), ("linear", 2), ("perceiver", 0), ("mean", 0), ("prompt", 0)])
def test_encoders_with_windows_are_aligned_for_a_third_of_the_steps_unless_told(
    make: MakeConfig, kind: str, steps: int
) -> None:
    run = prepare(make(encoder=kind, alignment_steps=None))
    assert run.alignment_steps == steps
    assert replace(run, config=make(encoder=kind, alignment_steps=0)).alignment_steps == 0
    if steps:
        assert replace(run, config=make(encoder=kind, alignment_steps=5)).alignment_steps == 5


@pytest.mark.parametrize("kind", ["perceiver", "mean", "prompt"])
@pytest.mark.parametrize("asked", [{"alignment_steps": 1}, {"alignment_steps": None, "alignment_weight": 0.5}])
def test_alignment_asked_for_where_slots_cover_no_words_is_refused(
    make: MakeConfig, kind: str, asked: dict[str, Any]
) -> None:
    config = make(encoder=kind, **asked)
    with pytest.raises(InvalidRequest, match=f"alignment was asked for, but {kind} slots cover no words") as caught:
        train(config, quiet())
    assert caught.value.param == "alignment_steps" and not config.out.exists()


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer is written in Python, and tells no character offsets."""
    folder, tokenizer = tmp_path_factory.mktemp("slow"), ByT5Tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **GATED)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert not load_model(str(folder)).tokenizer.is_fast
    return folder


@pytest.mark.parametrize("role", ["sender", "receiver"])
def test_a_tokenizer_without_offsets_trains_without_alignment_and_refuses_it_when_asked(
    make: MakeConfig, slow: Path, role: str
) -> None:
    config = make(max_steps=3, alignment_steps=None, **{role: str(slow)})
    train(config, quiet())
    lines = (config.out / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["phase"] for line in lines] == ["answer"] * 3
    for asked in ({"alignment_steps": 1}, {"alignment_steps": None, "alignment_weight": 0.5}):
        with pytest.raises(InvalidRequest, match=f"tokenizer of '{slow}' gives no character offsets"):
            train(make(**{role: str(slow), "out": config.out / "other", **asked}), quiet())


def test_an_example_that_does_not_fit_the_receiver_is_refused_before_the_first_step(
    make: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = steps_taken(monkeypatch)
    rows = [("Mara sings.", " Q?", "yes"), ("Ben", " " * 100 + "Q?", "y" * 200), ("Mara is no cook.", " Q?", "no")]
    config = make(task=task_of(tmp_path, *rows), encoder="mean", num_latents=3, alignment_steps=None)
    # BOS, three slots, 102 bytes of prompt, 201 of answer, EOS
    with pytest.raises(InvalidRequest, match="takes 308 receiver tokens; 256 fit"):
        train(config, quiet())
    assert not taken and not config.out.exists()


def test_the_slots_of_the_longest_source_are_counted_before_the_first_step(make: MakeConfig, tmp_path: Path) -> None:
    rows = [("Mara sings.", " Q?", "yes"), ("s" * 95, " Q?", "y" * 244), ("Ben", " Q?", "no")]
    task = task_of(tmp_path, *rows)
    loop.check_examples(prepare(make(task=task)), quiet())  # 48 tokens in 6 slots leave exactly enough
    with pytest.raises(InvalidRequest, match="takes 257 receiver tokens; 256 fit"):
        loop.check_examples(prepare(make(task=task, max_source_tokens=56)), quiet())


@pytest.mark.parametrize("encoder", ["perceiver", "mean", "prompt"])
def test_more_slots_than_the_receiver_reads_are_refused_before_the_first_step(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch, encoder: str
) -> None:
    taken = steps_taken(monkeypatch)
    with pytest.raises(InvalidRequest, match=r"takes \d+ receiver tokens; 256 fit"):
        train(make(encoder=encoder, num_latents=257, alignment_steps=None), quiet())
    assert not taken


def test_the_number_of_sources_that_will_be_cut_is_said(make: MakeConfig, tmp_path: Path) -> None:
    # BOS and 47 characters fit in 48 tokens.
    task = task_of(tmp_path, *((("s" * length), " Q?", "a") for length in (47, 48, 10, 60)))
    for limit, line in [(48, "2 of the first 4 sources are longer than 48 sender tokens"), (61, "")]:
        console = quiet()
        loop.check_examples(prepare(make(task=task, max_source_tokens=limit)), console)
        assert said(console).startswith(line) and bool(said(console)) == bool(line)


def test_a_row_has_the_loss_and_gradients_it_has_alone(make: MakeConfig) -> None:
    run = prepare(make(reconstruction_weight=0.5))
    examples = examples_of(run)
    assert len({len(e.source) for e in examples}) == 3  # padding is needed
    together, gradient = loss_and_gradients(run, examples)
    each = [loss_and_gradients(run, [example]) for example in examples]
    for name, value in together.items():
        assert value == pytest.approx(sum(losses[name] for losses, _ in each) / 3, rel=1e-4, abs=1e-5)
    for i, wanted in enumerate(gradient):
        mean = sum((grads[i] for _, grads in each), torch.zeros_like(wanted)) / 3
        torch.testing.assert_close(wanted, mean, rtol=2e-3, atol=2e-5)


def test_the_loss_is_the_answers_and_the_weighted_reconstruction(make: MakeConfig) -> None:
    losses, _ = loss_and_gradients(prepare(make(reconstruction_weight=0.5)), examples_of(prepare(make())))
    assert losses["reconstruction_loss"] > 0
    assert losses["loss"] == pytest.approx(losses["answer_loss"] + 0.5 * losses["reconstruction_loss"])


def composed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, Row]]:
    """(template, answer, row) of what the receiver will be given."""
    rows: list[tuple[str, str, Row]] = []

    def spying(lm: FrozenLM, layout: Any, template: str, **rest: Any) -> Row:
        row = compose(lm, layout, template, **rest)
        rows.append((template, rest["answer"], row))
        return row

    monkeypatch.setattr(loop, "compose", spying)
    return rows


def test_reconstruction_repeats_the_source(make: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run, rows = prepare(make(reconstruction_weight=1.0)), composed(monkeypatch)
    examples = examples_of(run, 2)
    loss_and_gradients(run, examples)
    asked = [(e.prompt, e.answer) for e in examples]
    assert [row[:2] for row in rows] == asked + [(run.task.reconstruction, f" {e.source}") for e in examples]
    rows.clear()
    loss_and_gradients(replace(run, config=make(reconstruction_weight=0.0)), examples)
    assert [row[:2] for row in rows] == asked


def test_a_source_too_long_to_be_repeated_is_cut_to_what_the_receiver_has_room_for(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, rows = prepare(make(reconstruction_weight=1.0)), composed(monkeypatch)
    source = "".join(chr(97 + i % 26) for i in range(600))
    losses, _ = loss_and_gradients(run, [Example(source, "{latent} Q?", " x")])
    repeated, row = rows[-1][1:]
    assert source.startswith(repeated[1:]) and 230 <= len(row) <= run.receiver.max_tokens
    assert math.isfinite(losses["reconstruction_loss"])


def test_the_first_tokens_weight_is_that_of_the_configuration(make: MakeConfig) -> None:
    run = prepare(make())
    (example,) = examples_of(run, 1)
    layout = run.bridge.config.heads[run.receiver.name].layout
    with torch.no_grad():
        soft, (slots,) = soft_tokens(run, [example])
        row = compose(run.receiver, layout, example.prompt, latent=slots, answer=example.answer)
        losses = token_losses(*answer_logits(run.receiver, collate([row], side="left"), soft))[0]
        first, *rest = losses[losses > 0].tolist()
        for weight in (1.0, 8.0):
            changed = replace(run, config=make(first_token_weight=weight))
            made = objectives(changed, [example], soft, [slots])["answer_loss"]
            assert float(made) == pytest.approx((weight * first + sum(rest)) / (weight + len(rest)), rel=1e-4)


def test_alignment_may_stay_on_with_its_weight(make: MakeConfig) -> None:
    run = prepare(make(alignment_steps=0))
    examples = examples_of(run)
    plain, _ = loss_and_gradients(run, examples)
    both, gradient = loss_and_gradients(replace(run, config=make(alignment_weight=0.5)), examples)
    with torch.no_grad():
        aligned = float(loop.align(run, examples, soft_tokens(run, examples)[0]))
    assert aligned > 0.1 and both["loss"] == pytest.approx(plain["loss"] + 0.5 * aligned, rel=1e-5)
    assert both["answer_loss"] == pytest.approx(plain["answer_loss"])
    unaligned = loss_and_gradients(run, examples)[1]
    assert not all(torch.allclose(a, b) for a, b in zip(gradient, unaligned, strict=True))


@pytest.mark.parametrize("alignment", [0, 1])
def test_two_passes_of_a_half_batch_are_one_of_the_whole(make: MakeConfig, alignment: int) -> None:
    def stepped(**shape: int) -> tuple[StepRecord, list[Tensor]]:
        run = plain(prepare(make(clip_norm=1e9, alignment_steps=alignment, **PLAIN, **shape)))
        monitor = Recorder()
        take_step(run, 0, monitor)
        return monitor.records[0], [p.detach() for p in run.bridge.parameters()]

    whole, one = stepped(batch_size=4)
    halves, two = stepped(batch_size=2, accumulate=2)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for name in ("loss", "answer_loss", "accuracy", "gradient_norm"):
        assert getattr(halves, name) == pytest.approx(getattr(whole, name), rel=1e-4)


def test_gradients_do_not_pile_up_from_step_to_step_and_are_clipped(make: MakeConfig) -> None:
    run = plain(prepare(make(clip_norm=1e-3, alignment_steps=0, **PLAIN)))
    before = [p.detach().clone() for p in run.bridge.parameters()]
    monitor = Recorder()
    take_step(run, 0, monitor)
    moved = math.sqrt(
        sum(float((a - b).detach().pow(2).sum()) for a, b in zip(before, run.bridge.parameters(), strict=True))
    )
    assert moved == pytest.approx(1e-3, rel=1e-2) and monitor.records[0].gradient_norm > 1e-3
    assert all(p.grad is None for p in run.bridge.parameters())


def test_the_learning_rate_warms_up_and_falls_to_a_tenth(make: MakeConfig) -> None:
    config = make(warmup_steps=4, max_steps=24)
    shares = [schedule(config, step) for step in range(25)]
    assert shares[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert shares[14] == pytest.approx(0.55) and shares[24] == pytest.approx(0.1)
    assert shares[4:] == sorted(shares[4:], reverse=True)
    assert schedule(make(warmup_steps=0), 0) == 1.0
    assert 0 < schedule(make(warmup_steps=6, max_steps=6), 5) <= 1.0


def test_the_rate_of_a_step_reaches_each_optimiser(make: MakeConfig) -> None:
    run, monitor = prepare(make(learning_rate=0.5, matrix_learning_rate=0.25, warmup_steps=4)), Recorder()
    take_step(run, 1, monitor)
    assert [group["lr"] for optimizer in run.optimizers for group in optimizer.param_groups] == [0.125, 0.25]
    assert monitor.records[0].learning_rate == 0.25


def test_every_trained_weight_belongs_to_exactly_one_optimiser(make: MakeConfig) -> None:
    run = prepare(make())
    held = [id(p) for o in run.optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in run.bridge.parameters())


def test_weight_decay_reaches_each_optimiser(make: MakeConfig) -> None:
    def size(decay: float) -> list[float]:
        run = prepare(make(weight_decay=decay, warmup_steps=0, learning_rate=0.1, matrix_learning_rate=0.1))
        for parameter in run.bridge.parameters():
            torch.nn.init.ones_(parameter)
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in run.optimizers:
            optimizer.step()
        return [float(p.detach().mean()) for o in run.optimizers for p in o.param_groups[0]["params"]]

    assert size(0.0) == pytest.approx([1.0] * len(size(0.0)))
    assert size(0.5) == pytest.approx([0.95] * len(size(0.0)))


def labelled(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def test_the_first_tokens_weight_acts_on_the_first_token_of_the_answer_alone() -> None:
    labels = labelled([IGNORE, IGNORE, 3, 4, 5], [IGNORE, 3, 4, 1, IGNORE])
    logits = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    for row, (first, others) in enumerate([(1, [2, 3]), (0, [1, 2])]):
        rest = sum(float(losses[row, i]) for i in others)
        weighted = answer_loss(logits, labels, first_token_weight=8.0)[row]
        assert float(weighted) == pytest.approx((8 * float(losses[row, first]) + rest) / 10, rel=1e-5)
        plain = answer_loss(logits, labels)[row]
        assert float(plain) == pytest.approx((float(losses[row, first]) + rest) / 3, rel=1e-5)


def test_a_row_without_labels_has_loss_zero_and_gives_no_gradient() -> None:
    logits = torch.randn(2, 4, 8, requires_grad=True)
    losses = answer_loss(logits, labelled([IGNORE] * 4, [IGNORE, IGNORE, 2, 3]))
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert losses.tolist()[0] == 0 < losses.tolist()[1]
    assert logits.grad is not None and not logits.grad[0].any() and logits.grad.isfinite().all()


def test_an_answer_is_right_when_its_every_token_is_the_likeliest() -> None:
    labels = labelled([IGNORE, 1, 2], [IGNORE, 1, 2], [IGNORE, IGNORE, 2])
    logits = torch.zeros(3, 3, 4)
    for row, said in enumerate([(1, 2), (1, 3), (3, 2)]):
        for at, token in enumerate(said):
            logits[row, at, token] = 1
    assert answers_right(logits, labels).tolist() == [1, 0, 1]


def test_windows_cover_the_words_whose_tokens_end_in_them(lms: dict[str, FrozenLM]) -> None:
    sender, receiver = lms["neox"], lms["llama"]
    texts = ["abcdefgh", "xy"]
    words, covered = covered_words(sender, receiver, texts, ratio=4, max_source_tokens=48)
    byte = {c: receiver.embed(torch.tensor([receiver.tokenizer.convert_tokens_to_ids(c)]))[0] for c in "abcdefghxy"}
    # BOS takes the first place of the first window.
    for row, slot, held in [(0, 0, "abc"), (0, 1, "defg"), (0, 2, "h"), (1, 0, "xy")]:
        torch.testing.assert_close(words[row, slot], torch.stack([byte[c] for c in held]).sum(dim=0))
    assert covered.tolist() == [[True, True, True], [True, False, False]]


def test_words_beyond_the_cut_are_no_target(lms: dict[str, FrozenLM]) -> None:
    _, covered = covered_words(lms["neox"], lms["llama"], ["abcdefgh"], ratio=4, max_source_tokens=4)
    assert covered.tolist() == [[True]]


def test_alignment_is_measured_over_covered_windows_and_never_nan() -> None:
    words = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    soft = words.clone()
    soft[0, 2] *= -1
    covered = torch.tensor([[True, True, False], [False, False, False]])
    losses = alignment_loss(soft, words, covered)
    assert losses.tolist() == pytest.approx([0, 0], abs=1e-6)
    assert float(alignment_loss(soft, words, torch.ones(2, 3, dtype=torch.bool))[0]) == pytest.approx(2 / 3)


def test_the_order_of_examples_is_a_function_of_the_step() -> None:
    order = Order(10, batch_size=4, seed=3)
    seen = [i for number in range(5) for i in order.batch(number)]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10)) and seen[:10] != seen[10:20]
    assert Order(10, batch_size=4, seed=3).batch(4) == order.batch(4)
    assert Order(10, batch_size=4, seed=4).batch(0) != order.batch(0)
    assert [*Order(10, batch_size=2, seed=3).batch(0), *Order(10, batch_size=2, seed=3).batch(1)] == order.batch(0)


def test_a_file_and_flags_mean_the_same(make: MakeConfig, tmp_path: Path) -> None:
    config = make(layer=[1, 2], seed=7)
    file = write_toml(tmp_path / "run.toml", config)
    assert read_config(file, {}) == read_config(None, config.model_dump()) == config
    assert read_config(file, {"seed": 9, "depth": None}) == config.model_copy(update={"seed": 9})


def test_every_key_is_a_flag_and_every_flag_a_key() -> None:
    from service.__main__ import train as command

    flags = {name.rstrip("_") for name in inspect.signature(command).parameters} - {"config", "resume", "overwrite"}
    assert flags == set(TrainConfig.model_fields)


@pytest.mark.parametrize(
    "line, words",
    [
        ("lerning_rate = 1.0", "lerning_rate"),
        ("learning_rate = -1.0", "learning_rate.*-1.0"),
        ('encoder = "vq"', "encoder.*'vq'"),
        ("max_steps = 1.5", "max_steps.*1.5"),
        ("batch_size = 0", "batch_size.*0"),
        ("latent_dim = 17000", "latent_dim.*17000"),
        ("num_latents = 70000", "num_latents.*70000"),
        (f"seed = {2**70}", f"seed.*{2**70}"),
        ("x = ", "run.toml"),
    ],
)
def test_a_wrong_key_is_named_with_its_value(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "run.toml").write_text(f'sender = "a"\nreceiver = "b"\ntask = "world"\nout = "c"\n{line}\n')
    with pytest.raises(InvalidRequest, match=words):
        read_config(tmp_path / "run.toml", {})


def test_one_layer_needs_no_list(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('sender = "a"\nreceiver = "b"\ntask = "world"\nout = "c"\nlayer = 2\n')
    assert read_config(tmp_path / "run.toml", {}).layer == [2]


def test_a_missing_key_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="sender: Field required"):
        read_config(None, {"receiver": "b", "task": "world", "out": "c"})
    with pytest.raises(InvalidRequest, match=r"gone\.toml"):
        read_config(tmp_path / "gone.toml", {})


def test_a_layer_the_sender_does_not_have_is_refused(make: MakeConfig) -> None:
    with pytest.raises(InvalidRequest, match=r"--layer 9: .* has layers 0 to 3"):
        prepare(make(layer=[2, 9]))


def test_several_layers_are_read_side_by_side(make: MakeConfig) -> None:
    run = prepare(make(layer=[1, 3]))
    assert run.bridge.config.layers == (1, 3) and run.bridge.config.encoder.sender_width == 64
    take_step(run, 5, Recorder())


def test_a_record_is_written_as_it_was_measured(make: MakeConfig) -> None:
    config = make(max_steps=3, alignment_steps=1)
    train(config, quiet())
    lines = (config.out / "log.jsonl").read_text().splitlines()
    names = {field.name for field in fields(StepRecord)}
    assert len(lines) == 3 and all(set(json.loads(line)) == names for line in lines)
