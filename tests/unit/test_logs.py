"""Logs as they arrive: real files, real processes, nothing left behind in the root logger."""

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from latentwire.bridge.errors import InvalidRequest
from latentwire.service.cli import logs
from latentwire.service.cli.logs import CHATTY, configure, restore

ROOT = Path(__file__).resolve().parents[2]
log = logging.getLogger("latentwire.bridge.somewhere")


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The root logger, the libraries' levels and their variables, as they were."""
    root, levels = logging.getLogger(), {name: logging.getLogger(name).level for name in CHATTY}
    level, handlers = root.level, list(root.handlers)
    for variable in [logs.BARS, *filter(None, CHATTY.values())]:
        monkeypatch.setenv(variable, "")  # so that what the code sets is taken back too
        monkeypatch.delenv(variable)
    yield
    restore()
    assert root.handlers == handlers
    root.setLevel(level)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


def records(*files: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def said(stream: io.StringIO) -> list[str]:
    """Lines of a stream, without their times."""
    return [line.split(" ", 2)[2] for line in stream.getvalue().splitlines()]


def test_the_console_may_have_objects_that_name_the_request() -> None:
    stream = io.StringIO()
    configure("info", console=stream, as_json=True)
    log.info("POST /generate: 200 after 0.1 s", extra={"request_id": "abc", "trace_id": None})
    (line,) = map(json.loads, stream.getvalue().splitlines())
    assert line["message"] == "POST /generate: 200 after 0.1 s" and line["request_id"] == "abc"
    assert "trace_id" not in line


def test_the_console_has_lines_from_its_level_on_and_the_file_has_objects(tmp_path: Path) -> None:
    stream, file = io.StringIO(), tmp_path / "deep" / "run.log"
    configure("warning", file=file, console=stream)
    log.debug("nobody sees this")
    log.info("loaded %s", "a model", extra={"step": 7})
    log.warning("bräuchte mehr")
    assert said(stream) == ["WARNING latentwire.bridge.somewhere: bräuchte mehr"]
    first, second = records(file)
    time = datetime.fromisoformat(first.pop("time"))
    assert time.utcoffset() == timedelta(0) and abs(datetime.now(UTC) - time) < timedelta(minutes=1)
    assert first == {"level": "info", "logger": "latentwire.bridge.somewhere", "message": "loaded a model", "step": 7}
    assert (second["level"], second["message"]) == ("warning", "bräuchte mehr") and "step" not in second


def test_debug_reaches_both(tmp_path: Path) -> None:
    stream = io.StringIO()
    configure("debug", file=tmp_path / "run.log", console=stream)
    log.debug("seen")
    assert said(stream) == ["DEBUG latentwire.bridge.somewhere: seen"]
    assert [record["message"] for record in records(tmp_path / "run.log")] == ["seen"]


def test_an_exception_is_in_the_object_and_the_object_is_one_line(tmp_path: Path) -> None:
    configure("error", file=tmp_path / "run.log", console=io.StringIO())
    try:
        raise KeyError("gone")
    except KeyError:
        log.exception("a batch\nwas lost")
    (record,) = records(tmp_path / "run.log")
    assert record["message"] == "a batch\nwas lost"
    assert record["exception"].startswith("Traceback") and record["exception"].endswith("KeyError: 'gone'")


@pytest.mark.parametrize("times, counts", [(1, []), (9, [9]), (10, [10]), (12, [10, 12]), (100, [10, 100])])
def test_a_repeated_warning_is_shown_at_powers_of_ten_and_its_total_at_the_end(
    tmp_path: Path, times: int, counts: list[int]
) -> None:
    stream, file = io.StringIO(), tmp_path / "run.log"
    configure("info", file=file, console=stream)
    for _ in range(times):
        log.warning("the queue is %d%% full", 90, extra={"step": 1})
    restore()
    wanted = ["the queue is 90% full"]
    for count in counts:
        total = "" if count in (10, 100) else " in all"
        wanted.append(f"the queue is 90% full ({count} times{total})")
    assert [record["message"] for record in records(file)] == wanted
    assert said(stream) == [f"WARNING latentwire.bridge.somewhere: {line}" for line in wanted]


def test_only_the_same_warning_of_the_same_logger_is_folded() -> None:
    stream = io.StringIO()
    configure("info", console=stream)
    for number in (1, 1, 2):
        log.warning("step %d", number)
        log.error("step %d", number)
        log.info("said each time")
    logging.getLogger("other").warning("step 1")
    assert [line for line in said(stream) if "step" in line] == [
        "WARNING latentwire.bridge.somewhere: step 1", "ERROR latentwire.bridge.somewhere: step 1",
        "WARNING latentwire.bridge.somewhere: step 2", "ERROR latentwire.bridge.somewhere: step 2",
        "WARNING other: step 1",
    ]  # fmt: skip
    assert sum("said each time" in line for line in said(stream)) == 3


def test_a_process_tells_no_totals_of_what_the_one_it_was_forked_from_has_said(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    configure("info", console=stream)
    for text in ("a", "a", "b"):
        log.warning(text)
    before = said(stream)
    monkeypatch.setattr(os, "getpid", lambda: 0)
    log.warning("a")  # its first
    logging.getLogger().handlers[0].flush()
    assert said(stream) == [*before, before[0]]


def test_counting_is_bounded_and_what_is_forgotten_says_its_total(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "REPEATED", 2)
    stream = io.StringIO()
    configure("info", console=stream)
    for text in ("a", "b", "a", "a", "b", "c"):
        log.warning(text)
    assert said(stream)[-1] == "WARNING latentwire.bridge.somewhere: a (3 times in all)"
    log.warning("d")
    assert said(stream)[-1] == "WARNING latentwire.bridge.somewhere: b (2 times in all)"


EXITS = """
import logging, sys
from pathlib import Path
from latentwire.service.cli.logs import configure
configure("info", file=Path(sys.argv[1]), console=sys.stderr)
for _ in range(3):
    logging.getLogger("x").warning("again")
print(sorted({"torch", "transformers", "datasets", "httpx"} & set(sys.modules)))
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    env = {name: value for name, value in os.environ.items() if name != "CI"}  # there transformers says all of it twice
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)


def test_a_process_that_ends_has_written_its_totals_and_imported_no_torch(tmp_path: Path) -> None:
    done = run(EXITS, tmp_path / "run.log")
    wanted = ["again", "again (3 times in all)"]
    assert [record["message"] for record in records(tmp_path / "run.log")] == wanted
    assert done.stdout.strip() == "[]" and done.stderr.count("again") == 2


def test_a_full_file_is_rotated_and_only_so_many_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "FILE_BYTES", 2000)
    file = tmp_path / "run.log"
    configure("error", file=file, console=io.StringIO())
    for number in range(200):
        log.info("line %03d", number)
    kept = [tmp_path / name for name in ("run.log.3", "run.log.2", "run.log.1", "run.log")]
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    assert all(path.stat().st_size <= 2000 for path in kept)
    messages = [record["message"] for record in records(*kept)]
    assert messages == [f"line {number:03}" for number in range(200 - len(messages), 200)] and len(messages) > 40


APPENDS = """
import io, logging, sys
from pathlib import Path
from latentwire.service.cli.logs import configure
configure("error", file=Path(sys.argv[1]), console=io.StringIO())
sys.stdin.read(1)
for number in range(400):
    logging.getLogger(sys.argv[2]).info("%d " + sys.argv[2] * (number * 40), number)
"""


def test_two_processes_append_whole_lines(tmp_path: Path) -> None:
    file = tmp_path / "run.log"
    writers = [
        subprocess.Popen([sys.executable, "-c", APPENDS, str(file), name], cwd=ROOT, stdin=subprocess.PIPE)
        for name in "ab"
    ]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.close()  # both begin now
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    lines = records(file)
    for name in "ab":
        mine = [line["message"] for line in lines if line["logger"] == name]
        assert mine == [f"{number} " + name * (number * 40) for number in range(400)]


WARNS = """
import sys, warnings
from pathlib import Path
from latentwire.service.cli.logs import configure
warnings.simplefilter("always")
configure("info", file=Path(sys.argv[1]), console=sys.stderr)
for _ in range(2):
    warnings.warn("soon gone", DeprecationWarning)
"""


def test_a_python_warning_is_logged_and_folded(tmp_path: Path) -> None:
    err = run(WARNS, tmp_path / "run.log").stderr
    first, total = records(tmp_path / "run.log")
    assert (first["level"], first["logger"]) == ("warning", "py.warnings")
    assert "DeprecationWarning: soon gone" in first["message"] and total["message"].endswith("(2 times in all)")
    assert err.count("WARNING py.warnings: ") == 2


def test_a_rich_console_shows_a_record_as_it_is_on_one_line() -> None:
    stream = io.StringIO()
    configure("info", console=Console(file=stream, width=40, force_terminal=False))
    log.info("[bold]a/b[/bold] :smile: " + "x" * 100)
    assert said(stream) == ["INFO latentwire.bridge.somewhere: [bold]a/b[/bold] :smile: " + "x" * 100]


LIBRARY = """
import logging, sys
from latentwire.service.cli.logs import configure
if sys.argv[2] == "imported":
    from transformers.utils.logging import get_logger
configure(sys.argv[1], console=sys.stderr)
from transformers.utils.logging import get_logger
get_logger("transformers.models").warning("chatter")
get_logger("transformers.models").error("trouble")
"""


@pytest.mark.parametrize("level, when, shown", [("info", "later", 0), ("info", "imported", 0), ("debug", "later", 1)])
def test_transformers_is_quiet_unless_debug_is_asked_for(level: str, when: str, shown: int) -> None:
    err = run(LIBRARY, level, when).stderr
    assert (err.count("chatter"), err.count("trouble")) == (shown, 1)


def test_an_http_client_does_not_log_each_request() -> None:
    stream = io.StringIO()
    configure("info", console=stream)
    logging.getLogger("httpx").info("HTTP Request: GET")
    logging.getLogger("urllib3.connectionpool").warning("retrying")
    logging.getLogger("urllib3").error("failed")
    assert said(stream) == ["ERROR urllib3: failed"]


def test_a_variable_that_the_operator_set_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    before = logging.getLogger("transformers").level
    configure("info", console=io.StringIO())
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info" and os.environ["DATASETS_VERBOSITY"] == "error"
    assert logging.getLogger("transformers").level == before


def test_configuring_again_replaces_what_was_set(tmp_path: Path) -> None:
    first, second = io.StringIO(), io.StringIO()
    configure("info", file=tmp_path / "first.log", console=first)
    configure("info", console=second)
    log.info("once")
    assert said(second) == ["INFO latentwire.bridge.somewhere: once"]
    assert first.getvalue() == "" == (tmp_path / "first.log").read_text()


@pytest.mark.parametrize("level", ["loud", "notset", ""])
def test_a_level_that_does_not_exist_is_refused_with_those_that_do(level: str) -> None:
    with pytest.raises(InvalidRequest, match=f"log level '{level}': expected one of debug, info, warning, error"):
        configure(level, console=io.StringIO())


def test_a_file_that_cannot_be_written_is_refused_and_what_was_set_stays(tmp_path: Path) -> None:
    stream = io.StringIO()
    configure("info", console=stream)
    with pytest.raises(InvalidRequest, match=rf"log file {tmp_path}: Is a directory"):
        configure("info", file=tmp_path, console=io.StringIO())
    log.info("still here")
    assert said(stream) == ["INFO latentwire.bridge.somewhere: still here"]
