"""Where the command line's logs go: lines for people on stderr, JSON lines in a rotated file.

A module says ``log = logging.getLogger(__name__)`` and nothing else; handlers are set here, once. What is logged is
about a request or a step, never its text.
"""

import json
import logging
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TextIO

from rich.console import Console

from latentwire.bridge.errors import InvalidRequest

LEVELS = ("debug", "info", "warning", "error")
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
FILE_BYTES = 10_000_000  # of one file, before the next is begun
FILES = 3  # kept beside the one that is written
REPEATED = 1000  # different warnings that are counted at a time
# Libraries that warn about what a user of this product cannot change. Those with a variable set their own level from
# it when they are imported, which happens later, or never: importing them here would cost every command seconds.
CHATTY = {
    "transformers": "TRANSFORMERS_VERBOSITY",
    "ContinuousBatchingLogger": None,
    "datasets": "DATASETS_VERBOSITY",
    "huggingface_hub": "HF_HUB_VERBOSITY",
    "httpx": None,
    "httpcore": None,
    "urllib3": None,
}
BARS = "HF_DATASETS_DISABLE_PROGRESS_BARS"  # those of transformers are up to ``bridge.models``, model by model


def configure(level: str, *, file: Path | None = None, console: Console | TextIO, as_json: bool = False) -> None:
    """Send the logs of this process to ``console`` from ``level`` on, and to ``file`` from ``info`` on or lower.

    A warning that repeats is shown the 1st, 10th, 100th … time, and its total at the end. Python's warnings are logged
    too. Called again, it replaces what it set before. Several processes may append to one file without tearing lines,
    but only one of them should be long enough at it to rotate it.

    Args:
        level: One of ``LEVELS``.
        file: JSON lines; ``FILE_BYTES`` and ``FILES`` bound what is kept.
        console: A rich console, whose progress bars then stay whole, or a stream.
        as_json: Whether the console gets JSON lines too.

    Raises:
        InvalidRequest: There is no such level, or the file cannot be written.
    """
    if level.lower() not in LEVELS:
        raise InvalidRequest(f"log level {level!r}: expected one of {', '.join(LEVELS)}", param="log_level")
    lowest = logging.getLevelNamesMapping()[level.upper()]
    shown = _ConsoleHandler(console) if isinstance(console, Console) else logging.StreamHandler(console)
    shown.setFormatter(_JsonFormatter() if as_json else logging.Formatter(FORMAT))
    shown.setLevel(lowest)
    targets: list[logging.Handler] = [shown]
    if file is not None:
        targets.append(_file_handler(file, min(lowest, logging.INFO)))
    restore()
    root = logging.getLogger()
    root.setLevel(min(target.level for target in targets))
    root.addHandler(_Folding(targets))
    logging.captureWarnings(True)
    _quieten(lowest)


def restore() -> None:
    """Undo ``configure``, after writing what was not written yet."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Folding)]:
        root.removeHandler(handler)
        handler.close()
    logging.captureWarnings(False)


def _file_handler(file: Path, level: int) -> logging.Handler:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = RotatingFileHandler(file, maxBytes=FILE_BYTES, backupCount=FILES, encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"log file {file}: {error.strerror}", param="log_file") from None
    handler.setFormatter(_JsonFormatter())
    handler.setLevel(level)
    return handler


def _quieten(lowest: int) -> None:
    """Errors alone from the libraries below, unless ``debug`` was asked for; a variable that is set already wins."""
    if lowest <= logging.DEBUG:
        return
    os.environ.setdefault(BARS, "1")
    for library, variable in CHATTY.items():
        if variable is None or os.environ.setdefault(variable, "error") == "error":
            logging.getLogger(library).setLevel(logging.ERROR)


class _ConsoleHandler(logging.Handler):
    """Prints above the progress bars of a rich console, one line per record and as it is."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(self.format(record), markup=False, highlight=False, emoji=False, soft_wrap=True)


class _JsonFormatter(logging.Formatter):
    """One object a line: time (UTC), level, logger, message; what it is about and an exception where there are any."""

    ABOUT = ("step", "request_id", "trace_id")

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name in self.ABOUT if (value := getattr(record, name, None)) is not None}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class _Folding(logging.Handler):
    """Stands before the other handlers and folds repeated warnings, so that all of them count alike."""

    def __init__(self, targets: Sequence[logging.Handler]) -> None:
        super().__init__()
        self._targets = targets
        self._counts: dict[tuple[int, str, int, str], int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a record on, unless it repeats a warning and its number is no power of ten."""
        if record.levelno < logging.WARNING:
            return self._pass_on(record)
        key = (os.getpid(), record.name, record.levelno, record.getMessage())
        self._counts[key] = count = self._counts.pop(key, 0) + 1  # now the youngest
        if count == 1:
            self._pass_on(record)
        elif _is_said(count):
            self._say(key, f"{count} times")
        if len(self._counts) > REPEATED:
            self._say_total(oldest := next(iter(self._counts)), self._counts.pop(oldest))

    def flush(self) -> None:
        """Write the total of every warning that was folded, and count from 0."""
        self.acquire()
        try:
            counts, self._counts = self._counts, {}
            for key, count in counts.items():
                self._say_total(key, count)
            for target in self._targets:
                target.flush()
        finally:
            self.release()

    def close(self) -> None:
        """Write the totals and close what stands behind."""
        self.flush()
        for target in self._targets:
            target.close()
        super().close()

    def _say_total(self, key: tuple[int, str, int, str], count: int) -> None:
        if key[0] == os.getpid() and not _is_said(count):  # of what was said before a fork the parent tells
            self._say(key, f"{count} times in all")

    def _say(self, key: tuple[int, str, int, str], count: str) -> None:
        """Without the record itself: kept for later, its traceback would keep tensors alive."""
        _, name, level, text = key
        self._pass_on(logging.LogRecord(name, level, "", 0, f"{text} ({count})", None, None))

    def _pass_on(self, record: logging.LogRecord) -> None:
        for target in self._targets:
            if record.levelno >= target.level:
                target.handle(record)


def _is_said(count: int) -> bool:
    """Whether a repetition is shown: a power of ten."""
    return str(count).strip("0") == "1"
