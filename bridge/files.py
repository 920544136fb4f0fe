"""Files that are whole or not there."""

import os
import tempfile
from pathlib import Path

from latentwire.bridge.errors import InvalidRequest


def replace_file(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path`` so that a reader, or a crash, sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def writable_folder(checkpoint: str, saved: str) -> Path:
    """The checkpoint folder that something is saved in: ``saved`` says what, as in "a gate is" (InvalidRequest)."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise InvalidRequest(f"{checkpoint!r} is no folder; {saved} saved in the checkpoint's own", param="checkpoint")
    if not os.access(folder, os.W_OK):
        raise InvalidRequest(f"{folder} cannot be written; {saved} saved in the checkpoint's own folder")
    return folder


def check_writable_file(file: Path) -> None:
    """Refuse before the work an ``--out`` that could not be written after it (InvalidRequest)."""
    if file.is_dir():
        raise InvalidRequest(f"--out {file}: is a folder; expected a file", param="out")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise InvalidRequest(f"--out {file}: {error.strerror}", param="out") from None


def sync_folder(folder: Path) -> None:
    """Have the names of a folder's files on the disk."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
