"""The best checkpoint: only a better value replaces it, and a resumed run knows what the best one was."""

from pathlib import Path

import pytest

from latentwire.bridge.checkpoint import load_bridge
from latentwire.training import loop
from latentwire.training.loop import BEST, train
from tests.integration.conftest import MakeConfig
from tests.integration.runs import events_of, files_of, interrupted, quiet, same


def validating(patch: pytest.MonkeyPatch, *values: float, metric: str = "em") -> None:
    """Let the validations to come find these values."""
    found = iter(values)
    patch.setattr(loop, "validate", lambda run, say: (metric, next(found)))


@pytest.mark.parametrize("metric, values, best", [("em", [0.1, 0.5, 0.3], 2), ("loss", [2.0, 2.5, 1.0], 3)])
def test_only_a_better_value_replaces_the_best_checkpoint(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, metric: str, values: list[float], best: int
) -> None:
    config = make(max_steps=3, validate_every=1, alignment_steps=0, metric=metric)
    validating(monkeypatch, *values, metric=metric)
    train(config, quiet())
    shorter = make(
        out=tmp_path / "shorter", max_steps=3, validate_every=1, alignment_steps=0, metric=metric, save_every=1
    )
    validating(monkeypatch, *values, metric=metric)
    interrupted(shorter, best) if best < 3 else train(shorter, quiet())
    weights = [[p.detach() for p in load_bridge(folder)[1].parameters()] for folder in (config.out / BEST, shorter.out)]
    assert same(*weights)


def test_the_best_value_outlives_a_resume(make: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(max_steps=4, save_every=2, validate_every=1, alignment_steps=0)
    validating(monkeypatch, 0.1, 0.5, 0.4, 0.3)
    interrupted(config, 2)
    best = files_of(config.out / BEST)
    validating(monkeypatch, 0.4, 0.3)
    train(config, quiet(), resume=True)
    assert [event["best"] for event in events_of(config.out, "validation")] == [True, True, False, False]
    assert files_of(config.out / BEST) == best


def test_overwriting_a_run_leaves_no_best_checkpoint_of_the_one_before(make: MakeConfig) -> None:
    config = make(max_steps=1, validate_every=1, alignment_steps=0, validation_examples=2)
    train(config, quiet())
    assert load_bridge(config.out / BEST)
    train(make(max_steps=1, alignment_steps=0), quiet(), overwrite=True)
    assert not (config.out / BEST / "config.json").exists()


def test_the_last_step_is_validated_whenever_any_is(make: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    validating(monkeypatch, 0.1, 0.2)
    config = make(max_steps=3, validate_every=2, alignment_steps=0)
    train(config, quiet())
    assert [event["step"] for event in events_of(config.out, "validation")] == [2, 3]
