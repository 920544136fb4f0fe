"""Steps that go wrong: one that is not finite changes nothing, one that does not fit in memory is taken in parts."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from latentwire.bridge.checkpoint import load_bridge
from latentwire.bridge.errors import TrainingFailed
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.prompt import Batch
from latentwire.training import loop
from latentwire.training import run as running
from latentwire.training.loop import train
from latentwire.training.monitor import StepRecord
from latentwire.training.run import Run
from latentwire.training.said import Said, say
from latentwire.training.step import REFUSED_IN_A_ROW, take_step
from tests.integration.conftest import MakeConfig
from tests.integration.runs import (
    events_of,
    files_of,
    log_of,
    parts,
    prepared,
    quiet,
    same,
    states_of,
    step_of,
    weights_of_run,
)


def passes(patch: pytest.MonkeyPatch, change: Callable[[int, Tensor], Tensor]) -> list[int]:
    """Let the states of each pass of the receiver go through ``change``, told its number from 1; the passes' rows."""
    rows: list[int] = []

    def changing(lm: FrozenLM, batch: Batch, soft: Tensor | None, **rest: Any) -> Said:
        rows.append(len(batch.ids))
        said = say(lm, batch, soft, **rest)
        return replace(said, states=change(len(rows), said.states))

    patch.setattr(running, "say", changing)
    return rows


def held(optimizers: list[Optimizer]) -> list[Tensor]:
    """Everything the optimisers remember, counters included."""
    states = [state for optimizer in optimizers for state in optimizer.state_dict()["state"].values()]
    return [torch.as_tensor(value).clone() for state in states for value in state.values()]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_no_weight_and_no_optimiser_and_says_so(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    run = prepared(make(alignment_steps=0))
    step_of(run, 0)
    weights, optimisers = weights_of_run(run), held(run.optimizers)
    assert len(optimisers) > len(weights)
    with monkeypatch.context() as patch:
        passes(patch, lambda _, made: made * bad)
        record = step_of(run, 1)
    assert record.refused and not math.isfinite(record.gradient_norm) and not math.isfinite(record.loss)
    assert same(weights, weights_of_run(run)) and same(optimisers, held(run.optimizers))
    assert all(p.grad is None for p in run.parameters)
    after = step_of(run, 2)
    assert not after.refused and math.isfinite(after.loss) and not same(weights, weights_of_run(run))


def test_one_bad_row_in_one_of_several_passes_refuses_the_whole_step(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(make(alignment_steps=0, batch_size=2, accumulate=2))
    weights = weights_of_run(run)
    passes(monkeypatch, lambda number, made: made * (math.nan if number == 1 else 1))
    assert step_of(run, 0).refused and same(weights, weights_of_run(run))


def test_a_refused_step_is_logged_and_the_run_goes_on(make: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(alignment_steps=0)
    passes(monkeypatch, lambda number, made: made * (math.nan if number == 3 else 1))
    train(config, quiet())
    assert [record["refused"] for record in log_of(config.out)] == [False, False, True, False, False, False]
    assert [event["name"] for event in events_of(config.out, "alarm")] == ["non_finite"]
    assert all(p.isfinite().all() for p in load_bridge(config.out)[1].parameters())


def test_so_many_refused_steps_in_a_row_end_the_run_and_a_good_one_between_begins_the_count_again(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = {2, 2 + REFUSED_IN_A_ROW}
    config = make(alignment_steps=0, max_steps=30, save_every=2)
    passes(monkeypatch, lambda number, made: made * (1 if number in good else math.nan))
    with pytest.raises(TrainingFailed, match=r"step 12: 5 steps in a row were not finite, none applied"):
        train(config, quiet())
    steps = [record["step"] for record in log_of(config.out) if not record["refused"]]
    assert steps == sorted(good) and states_of(config.out)[-1] == "state-00000010.json"
    assert load_bridge(config.out)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(make: MakeConfig) -> None:
    huge = {"learning_rate": 1e25, "matrix_learning_rate": 1e25, "warmup_steps": 0, "alignment_steps": None}
    config = make(save_every=1, max_steps=12, encoder="perceiver", **huge)
    with pytest.raises(TrainingFailed, match=r"step ([6-9]|1[0-2]): 5 steps in a row were not finite, none applied"):
        train(config, quiet())
    _, bridge = load_bridge(config.out)
    assert all(p.isfinite().all() for p in bridge.parameters())
    assert all(math.isfinite(record["loss"]) or record["refused"] for record in log_of(config.out))


def test_weights_that_are_not_finite_are_not_saved_and_what_was_saved_is_kept(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make()
    kept: dict[str, bytes] = {}

    def poisoning(run: Run, step: int, rows: Any, **rest: Any) -> StepRecord:
        record = take_step(run, step, rows, **rest)
        if step == 3:  # the update overflowed although loss and gradient were finite
            kept.update(files_of(config.out))
            with torch.no_grad():
                run.parameters[-1].view(-1)[0] = math.inf
        return record

    monkeypatch.setattr(loop, "take_step", poisoning)
    with pytest.raises(TrainingFailed, match="step 4: a weight is not finite"):
        train(config, quiet())
    assert len(kept) == 5 and files_of(config.out) == kept


def no_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore about it")


def too_much() -> None:
    torch.empty(1 << 55)  # what a CPU says


def only_at(*fatal: int, how: Callable[[], None] = no_memory) -> Callable[[int, Tensor], Tensor]:
    def failing(number: int, made: Tensor) -> Tensor:
        if number in fatal:
            how()
        return made

    return failing


@pytest.mark.parametrize(
    "how, fatal, micro_batch, rows",
    [
        (no_memory, [1], 2, [4, 2, 2]),
        (too_much, [1], 2, [4, 2, 2]),
        (no_memory, [1, 3], 1, [4, 2, 2, 1, 1, 1, 1]),
    ],
)
def test_a_step_that_does_not_fit_is_taken_again_in_halves_as_a_run_of_that_size_would(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch, how: Callable[[], None], fatal: list[int], micro_batch: int,
    rows: list[int],
) -> None:  # fmt: skip
    config = make(alignment_steps=0, max_steps=2)
    small = make(out=config.out / "small", alignment_steps=0, max_steps=2, batch_size=micro_batch,
                 accumulate=4 // micro_batch)  # fmt: skip
    wanted = train(small, quiet())
    seen = passes(monkeypatch, only_at(*fatal, how=how))
    assert parts(train(config, quiet())) == parts(wanted)
    assert seen == rows + [micro_batch] * (4 // micro_batch)  # the next step does not try the whole again
    records = log_of(config.out)
    assert [record["out_of_memory_count"] for record in records] == [len(fatal)] * 2
    assert [record["micro_batch"] for record in records] == [micro_batch] * 2
    assert [record["loss"] for record in records] == [record["loss"] for record in log_of(small.out)]
    assert not any(record["refused"] for record in records)


def test_the_same_rows_are_read_again_after_running_out_of_memory(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, again = prepared(make(alignment_steps=0)), prepared(make(alignment_steps=0, batch_size=2, accumulate=2))
    with monkeypatch.context() as patch:
        passes(patch, only_at(2))  # once half of the gradients are there
        run.micro_batch = 3
        with caplog.at_level(logging.WARNING):
            record = step_of(run, 0)
    assert "step 1: out of memory (CUDA out of memory. Tried to allocate 20.00 GiB)" in caplog.text
    assert "the same rows again in passes of 2" in caplog.text
    assert record.losses == step_of(again, 0).losses and same(weights_of_run(run), weights_of_run(again))


def test_running_out_of_memory_is_an_event(make: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(alignment_steps=0, max_steps=2)
    passes(monkeypatch, only_at(1))
    train(config, quiet())
    (event,) = events_of(config.out, "out_of_memory")
    assert (event["step"], event["micro_batch"]) == (1, 2) and "out of memory" in event["message"]


def test_one_row_that_does_not_fit_ends_the_run_and_says_what_would_fit(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(alignment_steps=0, save_every=1)
    passes(monkeypatch, only_at(*range(3, 100)))
    with pytest.raises(
        TrainingFailed, match=r"step 3: one row does not fit in memory \(CUDA.*GiB\); see 'latentwire plan'"
    ):
        train(config, quiet())
    assert states_of(config.out) == ["state-00000001.json", "state-00000002.json"]
    assert load_bridge(config.out)


def test_another_error_of_a_forward_pass_is_not_taken_for_a_lack_of_memory(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong() -> None:
        raise RuntimeError("shapes do not match")

    run = prepared(make(alignment_steps=0))
    seen = passes(monkeypatch, only_at(1, how=wrong))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        step_of(run, 0)
    assert seen == [4] and run.out_of_memory_count == 0


def test_a_resumed_run_keeps_to_the_size_that_fitted(make: MakeConfig) -> None:
    config = make(alignment_steps=0, max_steps=4)
    with pytest.MonkeyPatch.context() as patch:
        passes(patch, only_at(1, 4))
        whole = train(make(out=config.out / "whole", alignment_steps=0, max_steps=4), quiet())
    with pytest.MonkeyPatch.context() as patch:
        passes(
            patch, lambda number, made: only_at(1, 4)(number, made) if number < 9 else (_ for _ in ()).throw(KeyError)
        )
        with pytest.raises(KeyError):
            train(config, quiet())
    resumed = train(config, quiet(), resume=True)
    assert parts(resumed) == parts(whole)
    assert [record["micro_batch"] for record in log_of(config.out)][-2:] == [1, 1]
