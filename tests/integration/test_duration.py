"""How long a run takes is measured on its own steps, and said before and as it goes."""

from typing import Any

import pytest

from latentwire.training import duration, loop
from latentwire.training.duration import MEASURED, Duration, Part, measure, words
from tests.integration.conftest import MakeConfig
from tests.integration.runs import quiet, said


@pytest.mark.parametrize(
    "seconds, said",
    [
        (0.034, "0.034 s"),
        (2.54, "2.5 s"),
        (42.0, "42 s"),
        (119.0, "119 s"),
        (120.0, "2 min"),
        (2500.0, "42 min"),
        (9e3, "2.5 h"),
    ],
)
def test_a_time_is_said_in_the_unit_of_its_size(seconds: float, said: str) -> None:
    assert words(seconds) == said


def test_a_duration_adds_up_its_steps_and_what_is_read_before_them() -> None:
    made = Duration((Part("align", 100, 0.5), Part("answer", 1000, 2.5)), reading_seconds=20.0)
    assert made.seconds == 20 + 50 + 2500
    assert str(made) == (
        "about 43 min: the sender reads for 20 s, 100 steps of the warm start of 0.5 s, 1,000 steps of 2.5 s "
        "(measured on 3)"
    )
    assert str(Duration((Part("answer", 1, 3.0),))) == "about 3 s: 1 step of 3 s (measured on 3)"


def test_a_run_is_measured_on_a_few_steps_of_each_kind_and_leaves_nothing(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    real = duration.take_step

    def counting(run: Any, step: int, rows: Any) -> Any:
        taken.append(step)
        return real(run, step, rows)

    monkeypatch.setattr(duration, "take_step", counting)
    config = make(max_steps=50, alignment_steps=10)
    made = measure(config, quiet())
    assert taken == [*range(MEASURED), *range(10, 10 + MEASURED)]
    assert [(part.phase, part.steps) for part in made.parts] == [("align", 10), ("answer", 40)]
    assert all(part.seconds > 0 for part in made.parts) and made.reading_seconds == 0
    assert not config.out.exists()


def test_cached_features_are_read_once_before_the_steps(make: MakeConfig) -> None:
    config = make(max_steps=50, alignment_steps=0, cache_features=True)
    made = measure(config, quiet())
    assert 0 < made.reading_seconds < made.seconds and "the sender reads for" in str(made)
    assert not (config.cache / "features").exists()


def test_a_run_says_once_in_each_phase_how_long_it_takes(make: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duration, "WORTH_SAYING", 0.0)
    console = quiet()
    loop.train(make(max_steps=9, alignment_steps=4), console)
    assert said(console).count("to go: about") == 2
    assert "1 step of the warm start of" in said(console) and " 2 steps of" in said(console)


def test_a_run_that_is_soon_over_does_not_say_so(make: MakeConfig) -> None:
    console = quiet()
    loop.train(make(max_steps=5), console)
    assert "to go" not in said(console)
