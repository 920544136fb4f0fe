"""A bridge trained on plain text, and what may begin with it."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from latentwire.bridge.checkpoint import load_bridge, read_manifest
from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.evaluation.context import open_context
from latentwire.bridge.evaluation.measure import measure
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.readback import taught
from latentwire.bridge.reader import text_ids
from latentwire.service.__main__ import app
from latentwire.training.base import completed
from latentwire.training.config import TrainConfig, read_config
from latentwire.training.controls import control_config
from latentwire.training.loop import train
from latentwire.training.objectives import said_loss
from latentwire.training.prepare import prepare
from latentwire.training.pretrain import ANSWERING, PretrainConfig
from latentwire.training.run import Forward
from latentwire.training.text import pieces
from latentwire.training.validation import validate
from tests.integration.runs import prepared, quiet, said, step_of

WORDS = "The red boat of Mara sails to the far island in the early morning light".split()
PARAGRAPHS = [f"{i} " + " ".join(WORDS[i % 7 : 3 + i % 9]) for i in range(24)]
Pretraining = Callable[..., PretrainConfig]


@pytest.fixture
def pretraining(make: Any, tmp_path: Path) -> Pretraining:
    """A tiny pretraining on some paragraphs; keyword arguments change it."""
    file = tmp_path / "corpus.txt"
    file.write_text("\n\n".join(PARAGRAPHS))

    def config(**changes: Any) -> PretrainConfig:
        told = make().model_dump(exclude={*ANSWERING, "reconstruction_weight", "continuation_weight", "mode_tokens"})
        return PretrainConfig.model_validate({**told, "text": str(file), "out": tmp_path / "pretrained", **changes})

    return config


def test_a_text_is_cut_between_words_and_no_word_is_lost(lms: dict[str, FrozenLM]) -> None:
    llama = lms["llama"]
    text = "  ".join(WORDS) + "\n\tand " + "x" * 50 + " end."
    made = pieces(llama, text, 12)
    assert len(made) > 6 and max(len(text_ids(llama, piece)) for piece in made) <= 12
    assert "".join("".join(made).split()) == "".join(text.split())
    whole = [word for piece in made for word in piece.split()]
    assert [word for word in whole if not set(word) <= {"x"}] == [*WORDS, "and", "end."]
    assert pieces(llama, "short", 12) == ["short"]


def test_files_of_every_kind_become_sources_and_blank_texts_are_counted(
    pretraining: Pretraining, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "One two."}\n\n{"body": " "}\n{"body": ""}\n')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps({"body": " ".join(WORDS)}).encode() + b"\n"))
    (tmp_path / "c.txt").write_text("﻿Three\r\nfour.\r\n  \r\nFive.\n\n\n")
    console, files = quiet(), [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.txt")]
    run = prepare(pretraining(text=files, text_field="body", max_source_tokens=20), console)
    assert "4 texts (2 blank ones left out)" in said(console) and "7 sources of at most 20" in said(console)
    sources = [example.source for example in run.task.train]
    assert [sources[0], *sources[-2:]] == ["One two.", "Three\nfour.", "Five."]
    assert " ".join(sources[1:-2]) == " ".join(WORDS)
    assert run.task.name == "a.jsonl, b.jsonl.gz, c.txt"


def test_a_text_is_read_once_without_the_blanks_around_it_and_with_a_byte_order_mark(
    pretraining: Pretraining, tmp_path: Path
) -> None:
    line = json.dumps({"text": " " * 9000 + "Rain."})
    (tmp_path / "a.jsonl").write_text(f"\ufeff{line}\n{line}\n" + '{"text": "Snow."}\n')
    run = prepare(pretraining(text=[str(tmp_path / "a.jsonl")] * 2, validation_examples=1), console := quiet())
    assert "2 texts (4 repeated ones left out)" in said(console)
    assert sorted(example.source for example in run.task.train) == ["Rain.", "Snow."]


@pytest.mark.parametrize(
    "name, data, named",
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "Mara \\ud83d"}\n', r"a\.jsonl, line 2: the text holds '\\ud83d' at"),
        ("a.jsonl", b'{"text": "No\xebl"}\n', r"a\.jsonl: it is not UTF-8 \(invalid continuation byte at byte 12\)"),
        ("a.txt", b"No\xebl", r"a\.txt: it is not UTF-8 \(invalid continuation byte at byte 2\)"),
    ],
)
def test_what_is_no_unicode_is_named_with_its_place(
    pretraining: Pretraining, tmp_path: Path, name: str, data: bytes, named: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InvalidRequest, match=named):
        prepare(pretraining(text=str(tmp_path / name)), quiet())


def test_it_learns_to_repeat_and_to_go_on_and_nothing_else(pretraining: Pretraining) -> None:
    run = prepared(completed(pretraining(alignment_steps=0, probe_every=2)))
    records = [step_of(run, step) for step in range(3)]
    assert [record.losses.keys() for record in records] == [{"reconstruction", "continuation"}] * 3
    assert [record.delta_nats is not None for record in records] == [False, True, False]
    assert {name.split("·")[-1] for name in run.modes} == {"reconstruction", "continuation"}
    rows = [run.sample(run.config.receivers[0], i) for i in range(3)]
    assert [row.reconstruction.labels[-4:] for row in rows if row.reconstruction] == [
        row.answer.labels[-4:] for row in rows
    ]


def test_validation_is_the_loss_of_repeating_texts_that_were_held_out(pretraining: Pretraining) -> None:
    run = prepared(completed(pretraining(validate_every=2, validation_examples=5)))
    assert len(run.validation) == 5 and len(run.train) == 19
    name, value = validate(run)
    (receiver,) = run.config.receivers
    with run.residency.use(receiver) as lm, torch.no_grad():
        rows = [run.tokenisers[receiver](example) for example in run.validation]
        one_by_one = [
            float(said_loss((f := Forward(run, lm, [row], lambda _: None)).read_mode("reconstruction", *f.soft)))
            for row in rows
        ]
    assert name == "loss" and value == pytest.approx(sum(one_by_one) / 5, rel=1e-5)


def test_a_run_for_a_task_begins_with_it_remembers_it_and_has_mode_tokens_of_its_own(
    pretraining: Pretraining, make: Any, tmp_path: Path
) -> None:
    before = pretraining()
    base = train(before, quiet()).bridge
    assert base.provenance.task == "corpus.txt" and base.provenance.recipe["text"] == before.text
    assert taught(base, before.receiver[0]) is None  # its mode tokens are in no checkpoint
    for mode_tokens in (0, 3):
        out = tmp_path / f"then-{mode_tokens}"
        then = TrainConfig(
            task="world", init=str(before.out), out=out, max_steps=2, batch_size=4, validate_every=0,
            mode_tokens=mode_tokens, cache=before.cache,
        )  # fmt: skip
        run, (_, trained) = prepared(completed(then)), load_bridge(before.out, device=torch.device("cpu"))
        for mine, theirs in zip(run.bridge.parameters(), trained.parameters(), strict=True):
            torch.testing.assert_close(mine.detach().cpu(), theirs, rtol=0, atol=0)
        assert [len(tokens) for tokens in run.modes.values()] == [mode_tokens] * bool(mode_tokens)
        assert train(then, quiet()).bridge.earlier == (base.provenance,)


def test_one_without_mode_tokens_can_be_read_back(pretraining: Pretraining) -> None:
    config = pretraining(mode_tokens=0, max_steps=1)
    assert taught(train(config, quiet()).bridge, config.receiver[0]) == "{latent}\nRepeat:"


def test_it_can_be_measured_on_a_task_and_no_control_be_trained_by_its_recipe(
    pretraining: Pretraining, tmp_path: Path
) -> None:
    config = pretraining(max_steps=1)
    train(config, quiet())
    context = open_context(config.out, "world", limit=4, dtype="float16", receiver=None)
    assert {"bridge", "none"} <= measure(context)["conditions"].keys()
    with pytest.raises(InvalidRequest, match=r"was pretrained on corpus.txt and trained for no task: .* --init"):
        control_config("random_sender", context, tmp_path / "control")


def test_a_stopped_one_goes_on_to_the_same_weights_and_only_on_the_same_text(
    pretraining: Pretraining, tmp_path: Path
) -> None:
    whole = train(pretraining(out=tmp_path / "whole"), quiet())
    train(pretraining(), quiet())
    (tmp_path / "pretrained" / "state-00000006.json").unlink()
    again = train(pretraining(), quiet(), resume=True)
    assert (again.encoder, again.heads) == (whole.encoder, whole.heads)
    (tmp_path / "corpus.txt").write_text("\n\n".join([*PARAGRAPHS, "One more."]))
    with pytest.raises(InvalidRequest, match="--resume: data_sha256 was"):
        train(pretraining(), quiet(), resume=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n\n \n", "--text: there is no text in a.txt; expected at least one"),
        ("a.jsonl", b'{"text": " "}', r"there is no text in a.jsonl \(1 blank ones left out\); expected at least one"),
        ("a.txt", b"\xff\xfe\x00", "--text .*a.txt: it is not UTF-8"),
        ("a.txt", b"One text.", "1 training example is too few to hold one out; --validate-every 0 does without"),
        ("a.txt", None, "--text .*a.txt: No such file or directory"),
        ("folder.txt", "folder", "--text .*folder.txt is a folder; expected a file"),
        ("a.csv", b"text", "--text .*a.csv: expected a file that ends in .txt, .jsonl, .jsonl.gz"),
        ("a.jsonl", b'{"body": "a"}\n', "--text .*a.jsonl, line 1: the field 'text' is missing; it has body"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 5}\n', "line 2: the field 'text' is 5; expected a text"),
        ("a.jsonl", b"text\n", "--text .*a.jsonl, line 1: it is not JSON"),
        ("a.jsonl.gz", b"text\n", "--text .*a.jsonl.gz: Not a gzipped file"),
    ],
)
def test_text_that_cannot_be_had_is_one_sentence_and_nothing_is_written(
    pretraining: Pretraining, tmp_path: Path, name: str, content: bytes | str | None, message: str
) -> None:
    file = tmp_path / name
    if content == "folder":
        file.mkdir()
    elif isinstance(content, bytes):
        file.write_bytes(content)
    with pytest.raises(InvalidRequest, match=message):
        train(pretraining(text=str(file), validate_every=1), quiet())
    assert not (tmp_path / "pretrained").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kd_weight": 1.0}, "kd_weight is about answers, which plain text has none of"),
        ({"task": "world"}, "task is about answers"),
        ({"metric": "em"}, "metric is about answers"),
        ({"reconstruction_weight": 0, "continuation_weight": 0}, "one of reconstruction_weight and continuation_weigh"),
        ({"text": []}, "text: List should have at least 1 item"),
        ({"text": None}, "text: Field required"),
    ],
)
def test_settings_of_answers_are_refused(settings: dict[str, Any], message: str) -> None:
    told = {"sender": "a", "receiver": "b", "out": "c", "text": "d.txt", **settings}
    with pytest.raises(InvalidRequest, match=message):
        read_config(None, told, PretrainConfig)


def test_the_command_has_every_flag_but_those_of_answers_and_a_plan_reads_its_file(
    pretraining: Pretraining, tmp_path: Path
) -> None:
    config = pretraining()
    file = tmp_path / "pretrain.toml"
    told = {"sender": config.sender, "receiver": config.receiver, "text": config.text, "out": str(config.out)}
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in told.items()) + "max_steps = 1\n")
    assert read_config(file, {}, PretrainConfig).continuation_weight == 1.0
    runner = CliRunner()
    assert "No such option" in runner.invoke(app, ["pretrain", "--kd-weight", "1"]).output
    planned = runner.invoke(app, ["plan", "--config", str(file), "--device-memory", "1GB", "--source-tokens", "32"])
    assert planned.exit_code == 0 and "peak memory" in planned.output
    with pytest.raises(InvalidRequest, match=r"^text: Extra inputs are not permitted"):
        read_config(file, {"task": "world"})
    options = ["--max-steps", "1", "--validate-every", "0", "--batch-size", "2"]
    done = runner.invoke(app, ["pretrain", "--config", str(file), *options])
    assert done.exit_code == 0 and "holds bridge" in done.output
    assert read_manifest(config.out).bridge.provenance.recipe["mode_tokens"] == 1
