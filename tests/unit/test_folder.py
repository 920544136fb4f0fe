"""Evaluations in a folder: whole or not there, and gone when nobody has written them for long."""

import os
import time
from pathlib import Path

import pytest

from latentwire.bridge.errors import InvalidRequest, StoreUnavailable
from latentwire.service.store.folder import FolderStore

ONE, TWO = "eval_" + "1" * 32, "list_" + "2" * 32


async def test_another_store_over_the_folder_has_what_one_was_given(tmp_path: Path) -> None:
    await FolderStore(tmp_path / "deep", 60).put_many("job", {ONE: b"one", TWO: b"two"}, ttl_seconds=1)
    other = FolderStore(tmp_path / "deep", 60)
    assert await other.get_many("job", [TWO, "once_" + "0" * 32, ONE]) == [b"two", None, b"one"]
    await other.put("job", ONE, b"new")
    assert await other.get("job", ONE) == b"new" and await other.get("job", TWO) == b"two"
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {f"{ONE}.json", f"{TWO}.json"}


def test_what_nobody_wrote_for_long_goes_at_the_next_start_and_other_files_stay(tmp_path: Path) -> None:
    old = time.time() - 100
    for name in (f"{ONE}.json", f".{ONE}.json.7.tmp", "notes.json"):
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (old, old))
    (tmp_path / f"{TWO}.json").write_text("x")
    FolderStore(tmp_path, 60)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"{TWO}.json", "notes.json"])


def test_a_folder_that_cannot_be_used_is_named_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match=r"--jobs-dir .*/file/jobs: Not a directory"):
        FolderStore(tmp_path / "file" / "jobs", 60)


async def test_a_folder_that_goes_away_is_a_store_that_is_away_until_it_is_back(tmp_path: Path) -> None:
    folder = tmp_path / "jobs"
    store = FolderStore(folder, 60)
    folder.rmdir()
    with pytest.raises(StoreUnavailable, match="No such file or directory"):
        await store.put("job", ONE, b"one")
    assert not store.available and store.failures == 1
    folder.mkdir()
    await store.put("job", ONE, b"one")
    assert store.available and store.failures == 1


async def test_no_key_becomes_a_path_of_its_own(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "jobs", 60)
    for key in ("../eval_" + "1" * 32, "eval_1", "", ONE + "/x"):
        with pytest.raises(AssertionError):
            await store.get("job", key)
