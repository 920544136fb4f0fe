"""``python -m latentwire.service.health`` finds the service of its container, wherever that was told to listen."""

import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from latentwire.service import health
from latentwire.service.health import written_down


class Answer(BaseHTTPRequestHandler):
    """Live, but not ready."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health/live" else 503)
        self.end_headers()
        self.wfile.write(b"as asked")

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[HTTPServer]:
    with HTTPServer((getattr(request, "param", "127.0.0.1"), 0), Answer) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of our own, and other shared memory than the machine's."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(health, "SHARED_MEMORY", tmp_path / "memory")
    (tmp_path / "memory").mkdir()
    return tmp_path


def ask(*question: str) -> subprocess.CompletedProcess[str]:
    """A probe; it inherits TMPDIR as one in a container does."""
    return subprocess.run(
        [sys.executable, "-Pm", "latentwire.service.health", *question], capture_output=True, text=True
    )


@pytest.mark.parametrize("server", ["127.0.0.1", "0.0.0.0"], indirect=True)
def test_a_probe_asks_where_the_service_listens_and_no_proxy(
    server: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("LW_PORT", "9")  # a flag can say otherwise
    with written_down(server.socket):
        live, ready = ask(), ask("ready")
    assert (live.returncode, live.stdout) == (0, "as asked\n"), live.stderr
    assert ready.returncode == 1


def test_where_nothing_was_started_or_nothing_answers_a_probe_fails_in_one_line(server: HTTPServer) -> None:
    nothing = ask()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        pass_by = written_down(closed)
        pass_by.__enter__()
    gone = ask()
    pass_by.__exit__(None, None, None)
    for done in (nothing, gone):
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert "none has said" in nothing.stderr and "refused" in gone.stderr


def test_nothing_is_left_when_the_service_ends_and_nobody_elses_file_is_written(
    server: HTTPServer, folders: Path
) -> None:
    with written_down(server.socket):
        (mine,) = (file for file in folders.iterdir() if file.is_file())
    assert not mine.exists()
    (folders / "precious").write_text("as it was")
    mine.symlink_to(folders / "precious")
    with written_down(server.socket):
        assert not mine.is_symlink()
    assert (folders / "precious").read_text() == "as it was" and not mine.exists()


def test_without_a_temporary_folder_shared_memory_is_taken(
    server: HTTPServer, folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", "/proc/nowhere")
    monkeypatch.setattr(sys, "argv", ["health"])
    with written_down(server.socket):
        assert len(list((folders / "memory").iterdir())) == 1
        with pytest.raises(SystemExit) as end:
            health.main()
    assert not end.value.code and capsys.readouterr().out == "as asked\n"


def test_a_service_that_can_write_nowhere_says_so_and_goes_on(
    server: HTTPServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TMPDIR", "/proc/nowhere")
    monkeypatch.setattr(health, "SHARED_MEMORY", Path("/proc/nowhere"))
    with caplog.at_level(logging.WARNING), written_down(server.socket):
        assert "service.health will not find this service" in caplog.text
