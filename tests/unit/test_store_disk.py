"""What a caller may rely on from the store on disk when processes die, disks fill up and others write beside it."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from latentwire.bridge.errors import InvalidRequest, StoreUnavailable
from latentwire.service.store import disk
from latentwire.service.store.base import Kind
from latentwire.service.store.disk import FILE, DiskStore

ROOM = 4 << 20
BUDGETS: dict[Kind, int] = {"latent": ROOM, "job": ROOM}
WRITER = """
import asyncio, sys
from pathlib import Path
from latentwire.service.store.disk import DiskStore

async def write(name):
    store = DiskStore(Path(sys.argv[1]), {"latent": 1 << 30})
    for count in range(10**6):
        values = {f"{name}{count}{letter}": f"{count}{letter}".encode() * 5000 for letter in "abcd"}
        await store.put_many("latent", values)
        print(count, flush=True)

asyncio.run(write(sys.argv[2]))
"""


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., DiskStore]:
    return lambda budgets=BUDGETS: DiskStore(tmp_path / "kept", budgets)


async def test_what_was_put_is_there_after_a_restart_and_for_every_process(opened: Callable[..., DiskStore]) -> None:
    one, other = opened(), opened()
    await one.put("latent", "a", b"\x00latent\xff", ttl_seconds=3600)
    await other.put("job", "a", b"job")
    assert await other.get("latent", "a") == b"\x00latent\xff"
    assert await one.get("job", "a") == b"job"
    await one.close()
    await other.close()
    again = opened()
    assert [await again.get(kind, "a") for kind in BUDGETS] == [b"\x00latent\xff", b"job"]
    await again.close()


@pytest.mark.parametrize("after", [1, 7, 23])
async def test_a_kill_loses_nothing_that_was_acknowledged_and_leaves_nothing_halved(tmp_path: Path, after: int) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = {name: subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in ("x", "y")}
    acknowledged = dict.fromkeys(writers, -1)
    for name, writer in writers.items():
        assert writer.stdout is not None
        for _ in range(after):
            acknowledged[name] = int(writer.stdout.readline())
    for name, writer in writers.items():
        writer.send_signal(signal.SIGKILL)
        rest, _ = writer.communicate()
        acknowledged[name] = max([acknowledged[name], *map(int, rest.split("\n")[:-1])])
    store = DiskStore(tmp_path, {"latent": 1 << 30})
    for name, last in acknowledged.items():
        for count in range(last + 2):  # the last one may have been written and not yet told of
            kept = await store.get_many("latent", [f"{name}{count}{letter}" for letter in "abcd"])
            whole = [f"{count}{letter}".encode() * 5000 for letter in "abcd"]
            assert kept == whole or (count > last and kept == [None] * 4)
    await store.put("latent", "z", b"")
    await store.close()


async def test_the_folder_stays_within_its_budget(opened: Callable[..., DiskStore], tmp_path: Path) -> None:
    store = opened()
    for size in (10, 1000, 20_000, 300_000):
        together = ROOM // 3 // (size + 2 * disk.ENTRY_BYTES)
        for i in range(8):
            await store.put_many("latent", {f"{i}_{j:032x}": bytes(size) for j in range(together)}, ttl_seconds=60)
    held = (tmp_path / "kept" / FILE).stat().st_size
    assert ROOM / 2 < held <= ROOM + 16 * disk.PAGE_BYTES
    await store.close()


async def test_reading_keeps_a_value_from_going_first_also_where_another_process_writes(
    opened: Callable[..., DiskStore],
) -> None:
    large = bytes(ROOM // 4)
    store = opened()
    for key in "abc":
        await store.put("latent", key, large)
    await store.get("latent", "a")
    await store.put("job", "a", b"")
    other = opened()
    await other.put("latent", "d", large)
    assert [await store.get("latent", key) is not None for key in "abcd"] == [True, False, True, True]
    await store.close()
    await other.close()


async def test_a_full_disk_is_said_in_one_sentence_costs_nothing_kept_and_is_used_again(
    opened: Callable[..., DiskStore], tmp_path: Path
) -> None:
    store = opened()
    await store.put("latent", "a", b"kept")
    (pages,) = store._writer.execute("PRAGMA page_count").fetchone()
    store._writer.execute(f"PRAGMA max_page_count = {pages + 4}")
    with pytest.raises(StoreUnavailable) as caught:
        await store.put_many("latent", dict.fromkeys("abcd", bytes(disk.PAGE_BYTES * 3)))
    assert str(caught.value) == "the store on disk cannot be used: database or disk is full"
    assert (store.available, store.failures) == (False, 1)
    assert await store.get_many("latent", ["a", "b"]) == [b"kept", None]
    store._writer.execute("PRAGMA max_page_count = 1000000")
    await store.put_many("latent", dict.fromkeys("ab", b"again"))
    assert await store.get_many("latent", ["a", "b"]) == [b"again", b"again"] and store.available
    await store.close()


async def test_who_waits_too_long_for_another_writer_is_told_and_readers_do_not_wait(
    opened: Callable[..., DiskStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "WAIT_SECONDS", 0.05)
    store, other = opened(), opened()
    await store.put("latent", "a", b"kept")
    with disk._transaction(other._writer):
        with pytest.raises(StoreUnavailable, match="database is locked"):
            await store.put("latent", "b", b"")
        assert await store.get("latent", "a") == b"kept"
    await store.put("latent", "b", b"")
    await store.close()
    await other.close()


@pytest.mark.parametrize("damage", ["file", "noise", "version"])
async def test_a_folder_that_cannot_be_used_stops_the_start(
    opened: Callable[..., DiskStore], tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "kept"
    if damage == "file":
        folder.write_bytes(b"")
        expected = "File exists"
    elif damage == "noise":
        folder.mkdir()
        (folder / FILE).write_bytes(os.urandom(10_000))
        expected = "file is not a database"
    else:
        store = opened()
        store._writer.execute("PRAGMA user_version = 7")
        await store.close()
        expected = "it is of version 7; this program reads 1"
    with pytest.raises(InvalidRequest) as caught:
        opened()
    assert str(caught.value) == f"LW_STORE_DIR {folder}: {expected}"
