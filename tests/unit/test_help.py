"""What ``--help`` shows at 80 columns: every flag by its whole name, every word of what it is, in panels."""

import re
from collections.abc import Iterator

import pytest
from pydantic import BaseModel, Field
from typer.main import get_command
from typer.testing import CliRunner

from latentwire.service.__main__ import app
from latentwire.training.config import TrainConfig
from latentwire.training.flags import flags_of

COLUMNS = 80
FLAGS = re.compile(r"--[\w-]+…?")


def commands(command: object, *path: str) -> Iterator[tuple[str, ...]]:
    """Every command, by the words that call it; the one without words is all of them."""
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, *path, name)


ALL = list(commands(get_command(app)))
each_command = pytest.mark.parametrize("path", ALL, ids=" ".join)


def options(path: tuple[str, ...]) -> list[tuple[list[str], str | None]]:
    """The names of each option of a command, and its help text."""
    command = get_command(app)
    for name in path:
        command = command.commands[name]  # type: ignore[attr-defined]
    named = [parameter for parameter in command.params if parameter.opts[0].startswith("--")]
    return [([*option.opts, *option.secondary_opts], getattr(option, "help", None)) for option in named]


def shown(path: tuple[str, ...]) -> str:
    done = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": str(COLUMNS)})
    assert done.exit_code == 0
    return done.output


def sections(text: str) -> dict[str, list[str]]:
    """The words shown of each flag, by its name."""
    found: dict[str, list[str]] = {}
    words: list[str] = []
    for line in text.splitlines():
        if match := re.match(r"│ (?:\*  |   )?(--[\w-]+…?)", line):
            words = found[match[1]] = []
        words += line.strip("│╭╰─ ").split()
    return found


def test_there_are_commands_within_commands() -> None:
    assert {(), ("train",), ("serve",), ("slurm", "render")} <= set(ALL)


@each_command
def test_no_name_of_a_flag_is_cut(path: tuple[str, ...]) -> None:
    text = shown(path)
    assert all(len(line) <= COLUMNS for line in text.splitlines())
    assert {name for names, _ in options(path) for name in names} <= set(FLAGS.findall(text))
    assert [name for name in FLAGS.findall(text) if name.endswith("…")] == []


@each_command
def test_every_flag_says_what_it_is_and_no_word_of_that_is_lost(path: tuple[str, ...]) -> None:
    """Brackets get lost: they are markup, unless they are escaped."""
    found = sections(shown(path))
    for (name, *_), text in options(path):
        assert text, name
        rest = iter(found[name])
        assert all(word in rest for word in text.replace("\\[", "[").split()), (text, found[name])


@pytest.mark.parametrize("command", ["train", "plan"])
def test_the_flags_of_a_run_stand_in_panels_in_the_order_of_its_fields(command: str) -> None:
    titles = re.findall(r"╭─ (.*?) ─+╮", shown((command,)))
    panels = [field.json_schema_extra["panel"] for field in TrainConfig.model_fields.values()]  # type: ignore[index, call-overload]
    assert titles == ["Options", *dict.fromkeys(panels)]
    assert len(titles) > 5


@pytest.mark.parametrize(
    ("name", "default"),
    [("margin-weight", "0.0]"), ("group-by-length", "on]"), ("layer", "two thirds up]"), ("encoder", "pooling]")],
)
def test_help_says_what_holds_where_a_flag_is_not_typed(name: str, default: str) -> None:
    assert f"[default: {default}" in " ".join(sections(shown(("train",)))[f"--{name}"])


def test_a_field_that_stands_in_no_panel_is_refused() -> None:
    class Odd(BaseModel):
        lone: int = Field(1, description="Somewhere.")

    with pytest.raises(TypeError, match="'lone'"):
        flags_of(Odd)
