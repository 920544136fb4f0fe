"""Evaluations written, shown again and compared on the command line; and their pages in a real Chromium."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from latentwire.service.__main__ import main
from latentwire.service.cli.report import COMPARISON
from tests.e2e.conftest import sideways
from tests.reports import document, written

Call = Callable[..., tuple[int, str, str]]
HEADINGS = ["Score against size", "Latents", "What each slot reads", "Where the bridge and direct differ", "About"]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command in this process: its exit code, and what it printed on either side."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["latentwire", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return (int(caught.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def checkpoints(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same bridge in two folders, as of two seeds of a recipe."""
    made = []
    for seed in (0, 1):
        folder = Path(shutil.copytree(checkpoint, tmp_path_factory.mktemp("runs") / f"seed{seed}"))
        manifest = json.loads((folder / "config.json").read_text())
        manifest["bridge"]["provenance"] |= {"seed": seed, "recipe": {"ratio": 4, "seed": seed}}
        (folder / "config.json").write_text(json.dumps(manifest))
        made.append(folder)
    return made


def test_several_checkpoints_are_measured_and_compared_by_one_command(
    call: Call, checkpoints: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "reports"
    code, said, problem = call("evaluate", *checkpoints, "--task", "world", "--limit", 2, "--out", out)
    assert (code, problem) == (0, "")
    files = [out / f"{folder.name}.json" for folder in checkpoints]
    assert sorted(out.iterdir()) == [out / COMPARISON, *files]
    for file, folder in zip(files, checkpoints, strict=True):
        assert json.loads(file.read_text())["checkpoint"] == str(folder) and f"wrote {file}\n" in said
    assert "seed0 (2 seeds)" in said and f"wrote {out / COMPARISON}\n" in said
    assert "2 seeds are too few for an interval" in (out / COMPARISON).read_text()
    again = call("report", *files, "--out", tmp_path / "again.html")
    assert again[0] == 0 and "seed0 (2 seeds)" in again[1]
    assert (tmp_path / "again.html").read_text() == (out / COMPARISON).read_text()


def test_a_page_is_written_where_the_name_says_so_and_the_same_comes_of_the_report(
    call: Call, checkpoint: Path, tmp_path: Path
) -> None:
    ask = ("evaluate", checkpoint, "--task", "world", "--limit", 3, "--out")
    assert call(*ask, tmp_path / "a.html")[0] == 0 and call(*ask, tmp_path / "b.json")[0] == 0
    code, said, _ = call("report", tmp_path / "b.json")
    assert code == 0 and "world, 3 held-out examples" in said and said.endswith(f"wrote {tmp_path / 'b.html'}\n")
    for page in (tmp_path / "a.html", tmp_path / "b.html"):
        assert [f"<h2>{heading}</h2>" in page.read_text() for heading in HEADINGS] == [True] * 5


def test_what_evaluate_cannot_write_or_read_is_refused_before_anything_is_measured(
    call: Call, checkpoints: list[Path], tmp_path: Path
) -> None:
    first, second = checkpoints
    (tmp_path / "file").touch()
    for arguments, why in (
        ((first, second, "--out", tmp_path / "file"), f"--out {tmp_path / 'file'}: expected a folder"),
        ((first, second, "--out", tmp_path / "a.json"), f"--out {tmp_path / 'a.json'}: expected a folder"),
        ((first, first), f"the checkpoint '{first}' is named twice"),
        ((first, tmp_path / "nowhere"), f"{tmp_path / 'nowhere'}"),
    ):
        code, said, problem = call("evaluate", *arguments, "--task", "world", "--limit", 2)
        assert (code, said, problem.count("\n")) == (2, "", 1) and why in problem, problem


@pytest.mark.parametrize(
    ("files", "options", "why"),
    [
        ({"a.json": "not"}, (), "a.json: not JSON"),
        ({"a.json": {"task": "world"}}, (), "a.json: no report of an evaluation: "),
        ({"a.json": {k: v for k, v in document().items() if k != "about"}}, (), "a.json: a report without about, as"),
        ({"a.json": document(), "b.json": document(task="towns")}, (), "they cannot be compared"),
        ({"a.json": document()}, ("--out", "a.pdf"), "--out a.pdf: expected a name that ends in .html"),
    ],
    ids=["no JSON", "no report", "older", "other data", "no page"],
)  # fmt: skip
def test_what_cannot_be_shown_is_one_line_and_code_2(
    call: Call, tmp_path: Path, files: dict[str, Any], options: tuple[str, ...], why: str
) -> None:
    paths = [written(tmp_path / name, report) for name, report in files.items()]
    code, said, problem = call("report", *paths, *options)
    assert (code, said, problem.count("\n")) == (2, "", 1) and problem.startswith("latentwire: ") and why in problem
    assert sorted(tmp_path.iterdir()) == paths


def test_a_report_that_is_not_there_or_named_twice_is_one_line_and_code_2(call: Call, tmp_path: Path) -> None:
    file = written(tmp_path / "a.json", document())
    code, _, problem = call("report", tmp_path / "nowhere.json")
    assert code == 2 and "nowhere.json" in problem and "No such file" in problem
    assert call("report", file, file)[2] == "latentwire: a report is named twice\n"


@pytest.fixture
def opened(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open a file. At the end: no word in the console, and nothing was asked for but the file."""
    wrong: list[str] = []

    def call(file: Path, **options: Any) -> Page:
        page = browser.new_context(**options).new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: None if asked.url == file.as_uri() else wrong.append(asked.url))
        page.goto(file.as_uri())
        return page

    yield call
    for context in browser.contexts:
        context.close()
    assert wrong == []


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_a_report_shows_its_plots_at_any_width_and_in_both_schemes(
    opened: Callable[..., Page], call: Call, tmp_path: Path, width: int, scheme: str
) -> None:
    assert call("report", written(tmp_path / "a.json", document()))[0] == 0
    options = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    page = opened(tmp_path / "a.html", **options)
    assert page.locator("h2").all_text_contents() == HEADINGS
    assert page.locator("svg[role=img]").count() == 4 and sideways(page) <= 0
    for plot in page.locator("svg[role=img]").all():
        box = plot.bounding_box()
        assert box is not None and box["width"] > 100 and box["height"] > 70
    ink, back = (
        page.locator("body").evaluate(f"body => getComputedStyle(body).{name}") for name in ("color", "backgroundColor")
    )
    assert (sum(map(int, ink[4:-1].split(","))) > sum(map(int, back[4:-1].split(",")))) == (scheme == "dark")
    cell = page.locator(".cell rect").first
    assert cell.evaluate("cell => getComputedStyle(cell).fill") not in ("rgb(0, 0, 0)", "none")
    page.locator("pre").click()
    assert page.evaluate("getSelection().toString()").strip() == document()["about"]["command"]


def test_the_page_of_a_comparison_shows_its_plots(opened: Callable[..., Page], call: Call, tmp_path: Path) -> None:
    files = [written(tmp_path / f"r{ratio}.json", document(ratio=float(ratio))) for ratio in (2, 4, 8)]
    assert call("report", *files)[0] == 0
    page = opened(tmp_path / COMPARISON, viewport={"width": 360, "height": 800})
    assert page.locator("svg[role=img]").count() == 2 and sideways(page) <= 0
    for ratio in (2, 4, 8):
        assert page.get_by_text(f"r{ratio}", exact=True).count() == 4  # two plots, two tables
