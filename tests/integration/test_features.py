"""The sender's states on disk: the same numbers, each source read once, and only what is whole is believed."""

import json
import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from latentwire.bridge.checkpoint import read_part, write_part
from latentwire.bridge.config import Part
from latentwire.bridge.models import FrozenLM, hidden_states, load_model, pad_sources
from latentwire.bridge.reader import SourceTokens, tokenize_source
from latentwire.training import features
from latentwire.training import prepare as preparing
from latentwire.training.features import FETCHED, INDEX, CachedStates, LiveStates, build, held_whole, open_cache
from latentwire.training.loop import train
from latentwire.training.prepare import prepare
from tests.conftest import write_model
from tests.integration.conftest import MakeConfig
from tests.integration.runs import log_of, prepared, quiet, said, step_of, task_of

TEXTS = [f"Number {count}{' and so on' * count}." for count in range(1, 10)]
ROWS = [(text, "\nQuestion: how many?\nAnswer:", f" {count}") for count, text in enumerate(TEXTS)]
LAYERS = (1, 2)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The rows that the sender reads for a cache, as it reads them."""
    rows: list[tuple[int, ...]] = []

    def noting(
        lm: FrozenLM, ids: Int[Tensor, "B S"], mask: Bool[Tensor, "B S"], layers: Sequence[int]
    ) -> Float[Tensor, "B S N"]:
        rows.extend(tuple(row[real].tolist()) for row, real in zip(ids, mask, strict=True))
        return hidden_states(lm, ids, mask, layers)

    monkeypatch.setattr(features, "hidden_states", noting)
    return rows


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of a few sources."""
    monkeypatch.setattr(features, "BATCH_TOKENS", 100)
    monkeypatch.setattr(features, "SHARD_BYTES", 1)


@pytest.fixture(scope="module")
def sender(lms: dict[str, FrozenLM]) -> FrozenLM:
    return lms["neox"]


@pytest.fixture(scope="module")
def sources(sender: FrozenLM) -> list[SourceTokens]:
    return [tokenize_source(sender, text, sender.source_layout, max_tokens=48, truncate=True) for text in TEXTS]


def ids_of(sources: Sequence[SourceTokens]) -> set[tuple[int, ...]]:
    return {tuple(source.ids) for source in sources}


def assert_true_states(states: CachedStates, lm: FrozenLM, sources: Sequence[SourceTokens]) -> None:
    """What a cache gives is what the sender gives now."""
    found, mask = states.read(sources)
    ids, wanted = pad_sources(lm, sources)
    live = hidden_states(lm, ids, wanted, LAYERS)
    assert torch.equal(mask, wanted) and found.dtype == live.dtype
    torch.testing.assert_close(found[mask], live[mask])


def shards_of(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / INDEX).read_bytes())["shards"])


def test_a_run_from_cached_states_has_the_losses_and_weights_of_one_with_its_sender(
    make: MakeConfig, tmp_path: Path
) -> None:
    task = {"task": task_of(tmp_path, *ROWS), "max_steps": 4, "validate_every": 2, "metric": "loss"}
    train(make(**task, out=tmp_path / "live"), quiet())
    train(make(**task, out=tmp_path / "cached", cache_features=True), quiet())
    live, cached = log_of(tmp_path / "live"), log_of(tmp_path / "cached")
    assert len(cached) == 4
    for one, other in zip(live, cached, strict=True):
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-4)
    validations = [log_of(tmp_path / name, "events.jsonl") for name in ("live", "cached")]
    values = [[line["value"] for line in lines if line["event"] == "validation"] for lines in validations]
    assert len(values[0]) == 2 and values[1] == pytest.approx(values[0], rel=1e-5)


def test_a_run_from_cached_states_holds_no_sender_and_never_asks_for_one(
    make: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(task=task_of(tmp_path, *ROWS), cache_features=True, group_by_length=False)
    run = prepared(config)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the sender was run")

    monkeypatch.setattr(LiveStates, "read", never)
    monkeypatch.setattr(features, "hidden_states", never)
    for step in range(4):
        step_of(run, step)
    assert set(run.residency.resident()) == {config.receiver[0]}
    assert run.residency.history[-1][:2] == ("drop", config.sender)


def test_each_source_is_read_once_in_its_life(make: MakeConfig, tmp_path: Path, read: list[tuple[int, ...]]) -> None:
    config = make(task=task_of(tmp_path, *ROWS, *ROWS), cache_features=True, validate_every=2)
    run = prepared(config)
    seen = {tuple(run.sample(config.receiver[0], i).source.ids) for i in range(len(run.train))}
    assert len(read) == len(set(read)) == len(TEXTS) and seen <= set(read)

    del read[:]
    again = prepared(config)
    for step in range(4):
        step_of(again, step)
    assert not read


def test_only_the_sources_of_the_steps_to_come_are_read(make: MakeConfig, read: list[tuple[int, ...]]) -> None:
    run = prepared(make(cache_features=True, max_steps=3, batch_size=2))  # of a million scenes
    assert 0 < len(read) <= 6
    longer = prepared(make(cache_features=True, max_steps=6, batch_size=2, out=run.config.out / "longer"))
    assert len(read) == len(set(read)), "a longer run reads what is new to it"
    step_of(longer, 5)


def other_sender(folder: Path) -> str:
    return str(write_model(folder / "other", "neox", seed=7))


@pytest.mark.parametrize(
    "change",
    [
        lambda _: {"layer": [1]},
        lambda _: {"precision": "bf16"},
        lambda _: {"max_source_tokens": 30},
        lambda folder: {"task": task_of(folder, *ROWS[:-1], ("Some other text.", "\nWhat?", " Text"))},
        lambda folder: {"sender": other_sender(folder)},
    ],
    ids=["layer", "precision", "max_source_tokens", "data", "sender"],
)
def test_whatever_decides_the_states_decides_where_they_are_kept(
    make: MakeConfig, tmp_path: Path, read: list[tuple[int, ...]], change: Any
) -> None:
    config = make(task=task_of(tmp_path, *ROWS), cache_features=True, group_by_length=False)
    prepared(config)
    before = {path: path.read_bytes() for path in (config.cache / "features").rglob("*.*")}
    del read[:]
    (tmp_path / "data").mkdir()
    run = prepared(config.model_copy(update=change(tmp_path / "data")))
    assert len(read) == len(TEXTS), "nothing is taken from a cache of other states"
    assert len(list((config.cache / "features").iterdir())) == 2
    assert {path: path.read_bytes() for path in before} == before
    step_of(run, 0)


@pytest.mark.parametrize("damage", ["missing", "truncated", "one bit"])
@pytest.mark.usefixtures("small")
def test_a_damaged_shard_is_named_and_only_its_rows_are_read_again(
    sender: FrozenLM,
    sources: list[SourceTokens],
    tmp_path: Path,
    read: list[tuple[int, ...]],
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    build(sender, LAYERS, sources, tmp_path)
    shards = shards_of(tmp_path)
    assert len(shards) >= 4
    lost = tmp_path / shards[1]["file"]
    whole = lost.read_bytes()
    if damage == "missing":
        lost.unlink()
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        lost.write_bytes(whole[:-8] if damage == "truncated" else flipped)
    of = {features.digest_of(source): tuple(source.ids) for source in sources}
    del read[:]
    with caplog.at_level(logging.WARNING):
        states = build(sender, LAYERS, sources, tmp_path)
    (warning,) = (record.getMessage() for record in caplog.records)
    assert lost.name in warning and f"{len(shards[1]['rows'])} sources" in warning
    assert sorted(read) == sorted(of[digest] for digest, _ in shards[1]["rows"])
    assert_true_states(states, sender, sources)
    assert_true_states(open_cache(tmp_path, sender.device), sender, sources)


@pytest.mark.parametrize("content", [b"", b'{"shards": [{"file": "stat', b"[]", b"{}", b'{"shards": [1]}', b"\xff\xfe"])
@pytest.mark.usefixtures("small")
def test_a_torn_index_is_named_and_everything_is_read_again(
    sender: FrozenLM,
    sources: list[SourceTokens],
    tmp_path: Path,
    read: list[tuple[int, ...]],
    caplog: pytest.LogCaptureFixture,
    content: bytes,
) -> None:
    build(sender, LAYERS, sources, tmp_path)
    (tmp_path / INDEX).write_bytes(content)
    del read[:]
    with caplog.at_level(logging.WARNING):
        states = build(sender, LAYERS, sources, tmp_path)
    (warning,) = (record.getMessage() for record in caplog.records)
    assert str(tmp_path / INDEX) in warning
    assert set(read) == ids_of(sources) and len(read) == len(sources)
    assert_true_states(states, sender, sources)


@pytest.mark.usefixtures("small")
def test_a_build_that_was_killed_goes_on_after_its_last_whole_shard(
    sender: FrozenLM,
    sources: list[SourceTokens],
    tmp_path: Path,
    read: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[Part] = []

    def full(folder: Path, stem: str, tensors: dict[str, Tensor]) -> Part:
        if written:
            raise OSError("no space left")
        written.append(write_part(folder, stem, tensors))
        return written[0]

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(features, "write_part", full)
        build(sender, LAYERS, sources, tmp_path)
    (held,) = shards_of(tmp_path)
    before = (tmp_path / held["file"]).stat()
    told: list[tuple[int, int]] = []
    del read[:]
    states = build(sender, LAYERS, sources, tmp_path, progress=lambda done, total: told.append((done, total)))
    assert told[0] == (len(held["rows"]), len(sources)) and told[-1] == (len(sources), len(sources))
    assert len(read) == len(sources) - len(held["rows"]) > 0
    assert (tmp_path / held["file"]).stat() == before
    assert_true_states(states, sender, sources)


def test_states_keep_the_precision_they_were_computed_in(
    model_folders: dict[str, Path], sources: list[SourceTokens], tmp_path: Path
) -> None:
    half = load_model(str(model_folders["neox"]), dtype=torch.bfloat16)
    states = build(half, LAYERS, sources, tmp_path)
    read, _ = states.read(sources)
    assert read.dtype == torch.bfloat16
    stored = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    tokens = sum(len(source.ids) for source in sources)
    assert tokens * half.width * len(LAYERS) * 2 <= stored < tokens * half.width * len(LAYERS) * 4
    assert_true_states(states, half, sources)


def test_rows_are_padded_to_the_multiple_asked_for_with_zeros(
    sender: FrozenLM, sources: list[SourceTokens], tmp_path: Path
) -> None:
    states = build(sender, LAYERS, sources, tmp_path)
    found, mask = states.read([sources[3], sources[0]], multiple=64)
    assert found.shape == (2, 64, 2 * sender.width)
    assert mask.sum(dim=1).tolist() == [len(sources[3].ids), len(sources[0].ids)]
    assert not found[~mask].any()
    assert torch.equal(found[:1, : len(sources[3].ids)], states.read([sources[3]])[0])


def test_the_size_of_a_cache_and_its_place_are_said(make: MakeConfig, tmp_path: Path) -> None:
    console = quiet()
    config = make(task=task_of(tmp_path, *ROWS), cache_features=True, group_by_length=False)
    prepare(config, console)
    (folder,) = (config.cache / "features").iterdir()
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert f"sender states of {len(TEXTS)} sources: {size:,} bytes in {folder}" in said(console)


def refused(*_: Any, **__: Any) -> Any:
    raise AssertionError("this was to be known already")


def test_a_start_with_the_same_examples_reads_no_text_and_no_shard(
    make: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(task=task_of(tmp_path, *ROWS), cache_features=True, validate_every=2)
    first = prepared(config).states
    monkeypatch.setattr(preparing, "source_tokens", refused)
    monkeypatch.setattr(features, "read_part", refused)
    again = prepared(config).states
    assert isinstance(first, CachedStates) and isinstance(again, CachedStates) and again.rows == first.rows
    with pytest.raises(AssertionError, match="known already"):
        prepared(config.model_copy(update={"seed": 1, "max_examples": 2}))


@pytest.mark.usefixtures("small")
def test_a_shard_that_was_touched_is_compared_with_its_digest_once(
    sender: FrozenLM, sources: list[SourceTokens], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(sender, LAYERS, sources, tmp_path, asked="all")
    touched = tmp_path / shards_of(tmp_path)[1]["file"]
    os.utime(touched, ns=(1, 1))
    compared: list[str] = []

    def noting(folder: Path, part: Part) -> dict[str, Tensor]:
        compared.append(part.file)
        return read_part(folder, part)

    monkeypatch.setattr(features, "read_part", noting)
    for _ in range(2):
        held = held_whole(tmp_path, sender.device, "all")
        assert held is not None and compared == [touched.name]
        assert_true_states(held, sender, sources)


@pytest.mark.usefixtures("small")
def test_a_cache_that_lost_a_shard_holds_nothing_whole_and_says_so_once(
    sender: FrozenLM, sources: list[SourceTokens], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(sender, LAYERS, sources, tmp_path, asked="all")
    assert held_whole(tmp_path, sender.device, "others") is None
    (tmp_path / shards_of(tmp_path)[1]["file"]).unlink()
    with caplog.at_level(logging.WARNING):
        assert held_whole(tmp_path, sender.device, "all") is None
        assert_true_states(build(sender, LAYERS, sources, tmp_path, asked="all"), sender, sources)
    assert len(caplog.records) == 1 and held_whole(tmp_path, sender.device, "all") is not None


def test_rows_that_were_fetched_are_read_from_memory_and_only_those_of_a_few_steps_are_kept(
    sender: FrozenLM, sources: list[SourceTokens], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = build(sender, LAYERS, sources, tmp_path)
    wanted, mask = states.read(sources[:3])
    with ThreadPoolExecutor(1) as thread:  # as the loop does
        thread.submit(states.fetch, sources[:3]).result()
    with monkeypatch.context() as patch:
        patch.setattr(states, "_row", refused)
        found, same_mask = states.read(sources[:3])
        assert torch.equal(found, wanted) and torch.equal(same_mask, mask)
    for _ in range(FETCHED):
        states.fetch(sources[3:5])
    monkeypatch.setattr(states, "_row", refused)
    with pytest.raises(AssertionError, match="known already"):
        states.read(sources[:3])


def test_a_run_reads_ahead(make: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[str] = set()
    row = CachedStates._row

    def noting(states: CachedStates, digest: str) -> Tensor:
        threads.add(threading.current_thread().name)
        return row(states, digest)

    monkeypatch.setattr(CachedStates, "_row", noting)
    train(make(task=task_of(tmp_path, *ROWS), cache_features=True, max_steps=4, validate_every=0), quiet())
    assert len(threads) == 1 and threads.pop().startswith("prefetch")
