"""Watching a run: true numbers, shown where there is a terminal, written wherever it runs."""

import importlib
import importlib.util
import io
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.prompt import IGNORE
from latentwire.training.loop import train
from latentwire.training.monitor import (
    EVENTS,
    LOG,
    PLAIN_LINES,
    AnswerStats,
    StepRecord,
    read_jsonl,
    records_of,
    watch,
)
from latentwire.training.said import Said
from tests.integration.conftest import make
from tests.integration.runs import log_of, quiet, said

__all__ = ["make"]  # a fixture of the runs

X = IGNORE
RECORD = StepRecord(
    step=1, phase="answer", receiver="r", loss=2.0, losses={"answer": 1.234, "kd": 0.567}, accuracy=0.25,
    first_token_top1=0.31, first_token_top5=0.62, entropy_nats=3.4, wanted_entropy_nats=2.5, distinct_ratio=0.75,
    top_share=0.5, wanted_top_share=0.25, delta_nats=0.42, gradient_norm=1.5, learning_rate=0.003, seconds=0.5,
    data_wait_seconds=0.05, tokens=1000, allocated_bytes=10, reserved_bytes=20, inactive_bytes=0,
    peak_bytes=7_300_000_000, device_bytes=80_000_000_000, micro_batch=4, out_of_memory_count=0, refused=False,
    flops_per_second=2e12, mfu=0.25,
)  # fmt: skip
ANSWER_FIELDS = (
    "accuracy", "first_token_top1", "first_token_top5", "entropy_nats", "wanted_entropy_nats", "distinct_ratio",
    "top_share", "wanted_top_share",
)  # fmt: skip
NO_ANSWERS: dict[str, Any] = dict.fromkeys(ANSWER_FIELDS)
ALIGNING = replace(RECORD, phase="align", losses={"alignment": 0.8}, loss=0.8, delta_nats=None, **NO_ANSWERS)


def answered(logits: torch.Tensor, labels: torch.Tensor) -> Said:
    """An answer with these logits, which are their own states."""
    return Said(logits, labels, lambda states: states)


def logits_of(*rows: list[dict[int, float]], width: int = 7) -> torch.Tensor:
    """Logits (B, A, V) from shares by token; what a row leaves over goes to the others evenly."""
    made = torch.zeros(len(rows), len(rows[0]), width)
    for i, columns in enumerate(rows):
        for j, shares in enumerate(columns):
            left = (1 - sum(shares.values())) / (width - len(shares))
            made[i, j] = torch.tensor([shares.get(token, left) for token in range(width)]).log()
    return made


def test_the_measures_of_answers_are_those_counted_by_hand_over_all_passes() -> None:
    stats = AnswerStats()
    # Column t predicts the label of column t + 1; the last column predicts nothing.
    sure = {0: 0.9}
    stats.add(
        answered(
            logits_of([{3: 0.4}, {4: 0.7}, sure], [{3: 0.4}, {5: 0.7}, sure]),
            torch.tensor([[X, 3, 4], [X, 3, 4]]),  # right; right at first, wrong at last
        )
    )
    stats.add(
        answered(
            logits_of([sure, {1: 0.3, 2: 0.25, 3: 0.2, 4: 0.15, 5: 0.06}, {4: 0.7}]),
            torch.tensor([[X, X, 5]]),  # wrong, and fifth at its only token
        )
    )
    stats.add(
        answered(
            logits_of([{6: 0.9}, {1: 0.3, 2: 0.25, 3: 0.2, 4: 0.15, 5: 0.06}, {4: 0.7}]),
            torch.tensor([[X, X, 6]]),  # wrong, and not among the five; the same output but where nothing is asked
        )
    )
    first = torch.tensor([0.2 / 6] * 3 + [0.2]).new_zeros(7)
    for shares in ([0.1, 0.1, 0.1, 0.4, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.4, 0.1, 0.1, 0.1]):
        first += torch.tensor(shares) / 4
    for _ in range(2):
        first += torch.tensor([0.02, 0.3, 0.25, 0.2, 0.15, 0.06, 0.02]) / 4
    assert stats.summary() == pytest.approx(
        {
            "accuracy": 1 / 4,
            "first_token_top1": 2 / 4,
            "first_token_top5": 3 / 4,
            "entropy_nats": float(-(first * first.log()).sum()),
            "wanted_entropy_nats": -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25)),  # 3 twice, 5, 6
            "distinct_ratio": 3 / 4,  # (3, 4), (3, 5), (1) twice
            "top_share": 2 / 4,
            "wanted_top_share": 2 / 4,  # (3, 4) twice
        },
        rel=1e-5,
    )


def test_a_receiver_that_says_one_thing_shows_in_every_measure() -> None:
    stats = AnswerStats()
    for wanted in (1, 2, 3, 4):
        stats.add(answered(logits_of([{1: 1 - 6e-9}, {0: 0.9}]), torch.tensor([[X, wanted]])))
    found = stats.summary()
    assert found["entropy_nats"] == pytest.approx(0.0, abs=1e-6)
    assert found["wanted_entropy_nats"] == pytest.approx(math.log(4))
    assert (found["distinct_ratio"], found["top_share"], found["wanted_top_share"]) == (0.25, 1.0, 0.25)
    assert (found["accuracy"], found["first_token_top1"]) == (0.25, 0.25)


def test_measures_do_not_depend_on_how_the_rows_are_cut() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 4, 11), torch.randint(0, 3, (8, 4))
    labels[:, 0], labels[3, 1] = X, X
    whole, cut = AnswerStats(), AnswerStats()
    whole.add(answered(logits, labels))
    for start, stop in ((0, 1), (1, 5), (5, 8)):
        cut.add(answered(logits[start:stop], labels[start:stop]))
    assert cut.summary() == pytest.approx(whole.summary())


def test_a_step_without_answers_has_no_measure_of_them() -> None:
    without = {name: value for name, value in asdict(RECORD).items() if name not in ANSWER_FIELDS}
    record = StepRecord(**without, **AnswerStats().summary())
    assert {name: getattr(record, name) for name in ANSWER_FIELDS} == dict.fromkeys(ANSWER_FIELDS)
    assert list(asdict(record)) == list(asdict(RECORD)) and tuple(asdict(record))[5:13] == ANSWER_FIELDS


def terminal() -> Console:
    return Console(force_terminal=True, width=120, file=io.StringIO())


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_terminal_shows_the_parts_of_the_loss_and_what_tells_a_live_run_from_a_dead_one(tmp_path: Path) -> None:
    console = terminal()
    with watch(tmp_path, console, total=10, start=0) as monitor:
        monitor.log(ALIGNING)
        monitor.log(replace(RECORD, step=2))
        monitor.say("a line [with] brackets")
    text = shown(console)
    parts = (
        "answer",
        "1.234",
        "kd",
        "0.567",
        "Δ",
        "+0.42",
        "first token",
        "0.31",
        "entropy",
        "3.4",
        "distinct",
        "0.75",
    )
    rest = (
        "gradient",
        "1.50",
        "tokens/s",
        "2,000",
        "MFU",
        "25%",
        "waiting",
        "10%",
        "memory",
        "7.3 GB",
        "2/10",
        "loss 2.000",
    )
    for part in (*parts, *rest, "answers right 0.250", "a line [with] brackets"):
        assert part in text, part


def test_the_last_difference_measured_stays_in_sight(tmp_path: Path) -> None:
    for deltas, wanted in (([None], "–"), ([None, -0.07, None], "-0.07")):
        console = terminal()
        with watch(tmp_path, console, total=10, start=0) as monitor:
            for step, delta in enumerate(deltas, start=1):
                monitor.log(replace(RECORD, step=step, delta_nats=delta))
        assert wanted in shown(console).splitlines()[-2], "what stays when the view closes"


def test_the_loss_shown_is_smoothed_and_begins_anew_with_each_phase(tmp_path: Path) -> None:
    console = quiet()
    with watch(tmp_path, console, total=4, start=0) as monitor:
        monitor.log(ALIGNING)
        monitor.log(replace(ALIGNING, step=2, loss=0.4))
        monitor.log(replace(RECORD, step=3, loss=5.0))
        monitor.log(replace(RECORD, step=4, loss=float("nan"), refused=True))
    lines = [line.split("gradient")[0].split() for line in shown(console).splitlines()]
    assert [line[line.index("loss") + 1] for line in lines] == ["0.800", "0.780", "5.000", "nan"]


def test_a_refused_step_leaves_no_trace_in_the_smoothed_loss(tmp_path: Path) -> None:
    console = quiet()
    with watch(tmp_path, console, total=3, start=0) as monitor:
        monitor.log(RECORD)
        monitor.log(replace(RECORD, step=2, loss=math.inf, refused=True))
        monitor.log(replace(RECORD, step=3))
    assert "step 3/3 answer loss 2.000" in said(console)


def test_a_phase_that_begins_with_a_refused_step_begins_anew_as_well(tmp_path: Path) -> None:
    console = quiet()
    with watch(tmp_path, console, total=3, start=0) as monitor:
        monitor.log(ALIGNING)
        monitor.log(replace(RECORD, step=2, loss=math.nan, refused=True))
        monitor.log(replace(RECORD, step=3, loss=5.0))
    assert "step 3/3 answer loss 5.000" in said(console)


@pytest.mark.parametrize("total", [1, 7, 20, 39, 1000])
def test_elsewhere_a_run_of_any_length_says_a_few_lines_and_its_last(tmp_path: Path, total: int) -> None:
    console = quiet()
    with watch(tmp_path, console, total=total, start=0) as monitor:
        for step in range(1, total + 1):
            monitor.log(replace(RECORD, step=step))
    lines = shown(console).splitlines()
    assert min(total, PLAIN_LINES) <= len(lines) < 2 * PLAIN_LINES
    assert lines[-1].startswith(f"step {total}/{total}") and "answers right 0.250" in lines[-1]
    assert all(line.startswith("step ") for line in lines)


def test_every_step_and_event_is_written_as_it_comes(tmp_path: Path) -> None:
    with watch(tmp_path, quiet(), total=2, start=0) as monitor:
        monitor.log(ALIGNING)
        assert json.loads((tmp_path / LOG).read_text()) == asdict(ALIGNING), "at once, not at the end"
        monitor.event(1, "validation", metric="em", value=0.5, best=True)
        assert json.loads((tmp_path / EVENTS).read_text()) == {
            "step": 1, "event": "validation", "metric": "em", "value": 0.5, "best": True,
        }  # fmt: skip
        monitor.log(replace(RECORD, step=2, loss=math.inf, refused=True))
    assert list(records_of(tmp_path)) == [ALIGNING, replace(RECORD, step=2, loss=math.inf, refused=True)]


def test_a_run_that_goes_on_drops_the_lines_of_the_steps_it_takes_again(tmp_path: Path) -> None:
    with watch(tmp_path, quiet(), total=6, start=0) as monitor:
        for step in range(1, 6):
            monitor.log(replace(RECORD, step=step, loss=1.0))
            monitor.event(step, "save", seconds=0.1)
    with (tmp_path / LOG).open("a") as log:
        log.write('{"step": 6, "pha')  # what a kill left
    with watch(tmp_path, quiet(), total=6, start=3) as monitor:
        monitor.log(replace(RECORD, step=4, loss=2.0))
        monitor.event(4, "save", seconds=0.2)
    assert [(r.step, r.loss) for r in records_of(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]
    assert [(e["step"], e["seconds"]) for e in read_jsonl(tmp_path / EVENTS)] == [
        (1, 0.1),
        (2, 0.1),
        (3, 0.1),
        (4, 0.2),
    ]


def test_a_fresh_run_keeps_nothing_of_the_one_it_replaces(tmp_path: Path) -> None:
    for _ in range(2):
        with watch(tmp_path, quiet(), total=1, start=0) as monitor:
            monitor.log(RECORD)
    assert len(list(records_of(tmp_path))) == 1


def test_lines_that_are_no_records_are_left_out(tmp_path: Path) -> None:
    (tmp_path / LOG).write_bytes(b'null\n[1]\n{"step": "1"}\n{"loss": 1}\n\xff\n' + json.dumps(asdict(RECORD)).encode())
    assert list(records_of(tmp_path)) == [RECORD]
    assert list(read_jsonl(tmp_path / "none.jsonl")) == []


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with watch(None, quiet(), total=1, start=0) as monitor:
        monitor.log(RECORD)
        monitor.event(1, "save", seconds=0.1)
    assert not any(tmp_path.iterdir())


def scalars_of(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard would draw, by name and step."""
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    found: dict[str, dict[int, float]] = {}
    for path in folder.rglob("events.out.tfevents.*"):
        events = reader.EventAccumulator(str(path))
        events.Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, {}).update({event.step: event.value for event in events.Scalars(name)})
    return found


def test_tensorboard_draws_the_numbers_of_the_log(make: Any) -> None:
    config = make(log_with=["tensorboard"], max_steps=4, validate_every=2, validation_examples=2, kd_weight=0.5)
    train(config, quiet())
    drawn, records = scalars_of(config.out), log_of(config.out)
    for name in ("loss", "gradient_norm", "learning_rate", "tokens"):
        assert drawn[name] == pytest.approx({record["step"]: record[name] for record in records}, rel=1e-5), name
    answering = [record for record in records if record["phase"] == "answer"]
    assert answering and drawn["accuracy"] == {record["step"]: record["accuracy"] for record in answering}
    for part in ("answer", "kd"):
        wanted = {record["step"]: record["losses"][part] for record in answering}
        assert drawn[f"loss/{part}"] == pytest.approx(wanted, rel=1e-5)
    assert set(drawn["validation/em"]) == {2, 4}


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed here")
def test_a_tracker_that_is_not_installed_is_named_before_the_first_step(make: Any) -> None:
    config = make(log_with=["tensorboard", "wandb"])
    with pytest.raises(InvalidRequest, match=r"--log-with wandb: its package is not installed"):
        train(config, quiet())
    assert not (config.out / LOG).exists()
