"""A learning-rate range test suggests rates below those at which the loss blows up, and keeps nothing but its curve."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from latentwire.bridge.errors import InvalidRequest
from latentwire.service.__main__ import app
from latentwire.training import find_lr as module
from latentwire.training.find_lr import STEPS, beside, blew_up, find_lr, judged
from latentwire.training.run import Run
from tests.integration.conftest import MakeConfig
from tests.integration.runs import quiet

FACTORS = np.geomspace(1e-3, 1e2, STEPS).tolist()


def losses_of(falls: int, rises: int | None, count: int = STEPS) -> list[float]:
    """4 nats, and 2 from a decade after step ``falls`` on; they double every two steps after ``rises``."""
    fall = [4 - 2 * min(max(step - falls, 0), 16) / 16 for step in range(count)]
    return [loss * 2 ** (max(step - (rises or count), 0) / 2) for step, loss in enumerate(fall)]


@pytest.mark.parametrize("falls, rises, best", [(20, None, 28), (20, 60, 28), (30, 44, None)])
def test_the_suggestion_is_where_the_loss_falls_most_or_a_tenth_of_where_it_blew_up(
    make: MakeConfig, falls: int, rises: int | None, best: int | None
) -> None:
    whole = losses_of(falls, rises)
    end = next((i for i in range(1, STEPS + 1) if blew_up(whole[:i])), STEPS)
    found = judged(make(), FACTORS, whole[:end])
    assert found.blown_up == (rises is not None)
    if best is not None:
        assert found.best == pytest.approx(best, abs=1)
    else:
        assert found.learning_rates[found.best] <= found.learning_rates[-1] / 10 < found.learning_rates[found.best + 1]
    ratio = np.array(found.matrix_learning_rates) / np.array(found.learning_rates)
    assert np.allclose(ratio, make().matrix_learning_rate / make().learning_rate)
    assert f"--matrix-learning-rate {found.matrix_learning_rates[found.best]:.2g}" in found.flags


def test_a_loss_that_is_noisy_or_flat_does_not_blow_up_and_one_that_is_not_finite_does() -> None:
    noisy = [4 + (-1) ** step for step in range(STEPS)]
    assert not any(blew_up([float(loss) for loss in noisy[: i + 1]]) for i in range(STEPS))
    assert blew_up([4.0, float("nan")])
    assert not blew_up([4.0, 40.0]), "too early to say"


def test_a_loss_that_is_never_finite_is_refused(make: MakeConfig) -> None:
    with pytest.raises(InvalidRequest, match="the loss is inf after 1 steps"):
        judged(make(), FACTORS, [float("inf")])


def test_the_test_runs_under_growing_rates_behind_a_short_warm_start_and_leaves_its_curve_alone(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[str, float]] = []
    real = module.take_step

    def noting(run: Run, step: int, rows: Any) -> Any:
        taken.append((run.phase(step), run.optimizers[0].param_groups[0]["lr"]))
        record = real(run, step, rows)
        taken[-1] = (record.phase, run.optimizers[0].param_groups[0]["lr"])
        return record

    monkeypatch.setattr(module, "take_step", noting)
    config = make(alignment_steps=3, matrix_learning_rate=0.02)
    found = find_lr(config, quiet())
    assert [phase for phase, _ in taken[:4]] == ["align", "align", "align", "answer"]
    assert [rate for _, rate in taken[:3]] == [0.02] * 3
    assert [rate for _, rate in taken[3:]] == pytest.approx(found.matrix_learning_rates)
    assert found.matrix_learning_rates[0] == pytest.approx(2e-5)
    left = sorted(path.name for path in config.out.parent.iterdir() if "cache" not in path.name)
    assert left == ["run.find-lr.json", "run.find-lr.png"]
    assert json.loads(beside(config.out, ".json").read_text())["losses"] == found.losses
    assert beside(config.out, ".png").read_bytes()[:4] == b"\x89PNG" and len(found.curve) == len(found.losses)


@pytest.mark.parametrize("other", ["--resume", "--overwrite"])
def test_a_range_test_that_should_go_on_or_replace_is_refused(tmp_path: Path, other: str) -> None:
    pair = ["--sender", "builtin:neox", "--receiver", "builtin:llama", "--task", "world"]
    done = CliRunner().invoke(app, ["train", *pair, "--out", str(tmp_path / "x"), "--find-lr", other])
    assert isinstance(done.exception, InvalidRequest) and other in str(done.exception)
    assert list(tmp_path.iterdir()) == []
