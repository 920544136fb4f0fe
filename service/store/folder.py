"""A store in a folder: for one service without Redis whose evaluations should outlive it."""

import asyncio
import re
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from latentwire.bridge.errors import InvalidRequest, StoreUnavailable
from latentwire.bridge.files import replace_file
from latentwire.service.store.base import Kind, Store

KEY = re.compile(r"[a-z]+_[0-9a-f]{32}")


class FolderStore(Store):
    """A file for each value, whole or not there at all; what nobody has written for long goes at the next start."""

    available: bool = True
    failures: int = 0

    def __init__(self, folder: Path, keep_seconds: float) -> None:
        """Make the folder where needed, and clear it of what is too old.

        Raises:
            InvalidRequest: It cannot be made or read.
        """
        self._folder = folder
        self._writing = threading.Lock()  # two writers of one key would share a temporary file
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():
                if (KEY.fullmatch(path.stem) or path.suffix == ".tmp") and _age_seconds(path) > keep_seconds:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise InvalidRequest(f"--jobs-dir {folder}: {error.strerror}", param="jobs_dir") from None

    async def put_many(self, kind: Kind, values: Mapping[str, bytes], *, ttl_seconds: float | None = None) -> None:
        """Keep values, each whole or not at all, in order (StoreUnavailable); for how long, the folder decides."""
        await asyncio.to_thread(self._put, values)

    async def get_many(self, kind: Kind, keys: Sequence[str]) -> list[bytes | None]:
        """The values of keys in order, None where there is none (StoreUnavailable)."""
        return await asyncio.to_thread(lambda: [self._get(key) for key in keys])

    async def delete(self, kind: Kind, key: str) -> None:
        """Keep a value no longer (StoreUnavailable)."""
        try:
            await asyncio.to_thread(self._path(key).unlink, missing_ok=True)
        except OSError as error:
            raise self._failed(error) from None

    async def close(self) -> None:
        """Nothing to let go of."""

    def _put(self, values: Mapping[str, bytes]) -> None:
        with self._writing:
            for key, value in values.items():
                try:
                    replace_file(self._path(key), value)
                    self.available = True
                except OSError as error:
                    raise self._failed(error) from None

    def _get(self, key: str) -> bytes | None:
        try:
            return self._path(key).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> StoreUnavailable:
        self.available = False
        self.failures += 1
        return StoreUnavailable(f"the folder of evaluations cannot be used: {error.strerror}")

    def _path(self, key: str) -> Path:
        assert KEY.fullmatch(key), key  # nothing that a caller made up becomes a path
        return self._folder / f"{key}.json"


def _age_seconds(path: Path) -> float:
    with suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime
    return 0.0
