"""Many documents in one file: found by id, gone on with after a kill, refused when half-written, damaged or foreign."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

from latentwire.bridge import bulk
from latentwire.bridge.bridge import Bridge
from latentwire.bridge.bulk import JsonLines, Source, encode_corpus, write_parquet
from latentwire.bridge.corpus import Corpus, CorpusWriter, Document, Record, key_of
from latentwire.bridge.errors import CorruptCheckpoint, IncompatibleBridge, InvalidRequest
from latentwire.bridge.wire import DType

SOURCES = [Source(f"doc {i}", f"{'Mara lives in Rome. ' * (i % 5)}Ben wants {i}.", {"page": i}) for i in range(70)]


@pytest.fixture(scope="module")
def bridge(checkpoint: Path) -> Bridge:
    return Bridge.load(checkpoint)


@pytest.fixture(scope="module")
def whole(bridge: Bridge, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of ``SOURCES`` that nothing interrupted. Do not edit."""
    path = tmp_path_factory.mktemp("corpora") / "whole.lw"
    encode_corpus(bridge, SOURCES, path, keep_text=True)
    return path


class Killed(Exception):
    pass


def killed_after(batches: int) -> Callable[[int, int, int], None]:
    """A progress that ends the work after so many batches."""
    calls = iter(range(batches + 1))

    def on_progress(done: int, total: int, tokens: int) -> None:
        if next(calls, None) == batches:
            raise Killed

    return on_progress


def test_a_latent_is_found_by_its_id_with_what_is_known_of_it(bridge: Bridge, whole: Path) -> None:
    corpus = Corpus(whole, bridge_id=bridge.manifest.bridge_id)
    assert list(corpus) == [source.id for source in SOURCES] and len(corpus) == len(SOURCES)
    for source in SOURCES[::7]:
        (alone,) = bridge.encode(source.text)
        latent, document = corpus[source.id], corpus.document(source.id)
        assert (latent.shape, latent.source_tokens, latent.source_bytes) == (
            alone.shape, alone.source_tokens, alone.source_bytes,
        )  # fmt: skip
        np.testing.assert_allclose(latent.array, alone.array, atol=2e-3)
        assert (latent.id, document.text, document.metadata) == (source.id, source.text, source.metadata)
    assert "nothing" not in corpus
    with pytest.raises(KeyError, match="nothing"):
        corpus["nothing"]
    asked = [corpus["doc 3"], corpus["doc 4"]]
    assert bridge.generate(asked, "Where?", max_tokens=4).texts == bridge.generate(
        [SOURCES[3].text, SOURCES[4].text], "Where?", max_tokens=4
    ).texts  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4", "float32"])
def test_the_file_is_one_that_any_reader_of_safetensors_opens(bridge: Bridge, tmp_path: Path, dtype: DType) -> None:
    corpus = encode_corpus(bridge, {"a": "Mara sings.", "b": "Ben lives in Rome."}, tmp_path / "c.lw", dtype=dtype)
    assert corpus["b"].dtype == corpus.dtype == dtype
    assert corpus.document("a").text is None
    with safe_open(tmp_path / "c.lw", "np") as file:  # type: ignore[no-untyped-call]
        assert file.metadata()["bridge_id"] == bridge.manifest.bridge_id
        start, middle = file.get_tensor("spans")[1, :2]
        assert file.get_tensor("records")[start:middle].tobytes() == corpus["b"].data


@pytest.mark.parametrize("batches", [0, 1, 2])
@pytest.mark.parametrize("torn", [b"", b"0000", b"12345678 [[1,2,3]]\n", b'00000000 [[64,5,"f'])
def test_work_that_was_interrupted_goes_on_and_ends_in_the_same_bytes(
    bridge: Bridge, whole: Path, tmp_path: Path, batches: int, torn: bytes
) -> None:
    path = tmp_path / "whole.lw"
    with pytest.raises(Killed):
        encode_corpus(bridge, SOURCES, path, keep_text=True, on_progress=killed_after(batches))
    assert not path.exists()
    with (tmp_path / "whole.lw.part.journal").open("ab") as journal, (tmp_path / "whole.lw.part").open("ab") as part:
        journal.write(torn)
        part.write(torn * 9)
    told: list[int] = []
    encode_corpus(bridge, SOURCES, path, keep_text=True, on_progress=lambda done, *_: told.append(done))
    assert told[0] == min(batches * bulk.BATCH_ROWS, len(SOURCES)) and told[-1] == len(SOURCES)
    assert path.read_bytes() == whole.read_bytes()
    assert os.listdir(tmp_path) == ["whole.lw"]


def test_a_process_that_is_killed_and_run_again_ends_in_the_same_bytes(bridge: Bridge, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"{'Mara sings. ' * (i % 9)}Ben {i}."}) + "\n" for i in range(700))
    (tmp_path / "docs.jsonl").write_text(lines)
    out, part = tmp_path / "again" / "docs.lw", tmp_path / "again" / "docs.lw.part"
    command = [sys.executable, "-m", "latentwire", "encode", bridge.name, "--input", tmp_path / "docs.jsonl"]
    run = subprocess.Popen([*command, "--out", out])
    while not (part.exists() and part.stat().st_size > 4096):
        assert run.poll() is None
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL and not out.exists()
    done = subprocess.run([*command, "--out", out], check=True, capture_output=True, text=True)
    assert f"docs.lw: 700 documents, float16, {out.stat().st_size:,} bytes" in done.stdout
    once = encode_corpus(bridge, JsonLines(tmp_path / "docs.jsonl"), tmp_path / "once.lw")
    assert out.read_bytes() == once.path.read_bytes()
    assert list(once)[:2] == ["1", "2"]


def begun(bridge: Bridge, path: Path, **options: Any) -> None:
    with pytest.raises(Killed):
        encode_corpus(bridge, SOURCES, path, on_progress=killed_after(1), **options)


@pytest.mark.parametrize(
    ("options", "sources", "named"),
    [
        ({"dtype": "int8"}, SOURCES, "it was begun with dtype float16, not int8; say --overwrite"),
        ({"keep_text": True}, SOURCES, "it was begun with texts False, not True"),
        ({}, [Source("doc 0", "other"), *SOURCES[1:]], "document 1, 'doc 0', is not the one that was encoded before"),
        ({}, [Source("id", SOURCES[0].text), *SOURCES[1:]], "document 1, 'id', is not the one"),
        ({}, SOURCES[:3], "begun with more than these 3 documents"),
    ],
)
def test_it_does_not_go_on_with_something_else_unless_told_to_begin_anew(
    bridge: Bridge, tmp_path: Path, options: dict[str, Any], sources: list[Source], named: str
) -> None:
    begun(bridge, tmp_path / "c.lw")
    with pytest.raises(InvalidRequest, match=named):
        encode_corpus(bridge, sources, tmp_path / "c.lw", **options)
    assert len(encode_corpus(bridge, sources, tmp_path / "c.lw", overwrite=True, **options)) == len(sources)
    with pytest.raises(InvalidRequest, match="there is such a file; say --overwrite to replace it"):
        encode_corpus(bridge, sources, tmp_path / "c.lw", **options)


def test_two_do_not_write_one_corpus(bridge: Bridge, tmp_path: Path) -> None:
    with CorpusWriter(tmp_path / "c.lw", {}), pytest.raises(InvalidRequest, match="another process is writing it"):
        encode_corpus(bridge, SOURCES, tmp_path / "c.lw")


def test_ids_whose_numbers_meet_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    message = Corpus(whole)["doc 1"].data
    path = tmp_path / "c.lw"
    with CorpusWriter(path, {"bridge_id": "0" * 32, "dtype": "float16"}) as writer:
        writer.append([Record(i, message, Document(id, 1, 1, False, "", {}), "") for i, id in enumerate("ab")])
        writer.finish()
    corpus = Corpus(path)
    monkeypatch.setattr("latentwire.bridge.corpus.key_of", lambda id: key_of("a"))
    assert corpus["a"].id == "a" and "b" not in corpus


def spoilt(whole: Path, path: Path, at: int) -> None:
    data = bytearray(whole.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_damaged_record_is_named_and_the_others_are_read(whole: Path, tmp_path: Path) -> None:
    with safe_open(whole, "np") as file:  # type: ignore[no-untyped-call]
        start, middle, end = file.get_tensor("spans")[5, :3]
    for at in (start, middle - 1, middle, end - 1):
        spoilt(whole, tmp_path / "c.lw", 4096 + at)
        corpus = Corpus(tmp_path / "c.lw")
        assert corpus["doc 4"].array.size
        with pytest.raises(CorruptCheckpoint, match=r"c\.lw: document 5 is damaged: its checksum is"):
            list(corpus.items())


def test_a_corpus_that_is_half_damaged_foreign_or_none_is_refused_in_one_sentence(
    bridge: Bridge, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "c.lw"
    begun(bridge, path)
    for half in (path, tmp_path / "c.lw.part"):
        with pytest.raises(InvalidRequest, match=r"it is not finished; run the same 'latentwire encode' again"):
            Corpus(half)
    shutil.copy(tmp_path / "c.lw.part", path)
    with pytest.raises(CorruptCheckpoint, match="it is no whole corpus"):
        Corpus(path)
    for size in (0, 100, 5000, whole.stat().st_size - 1):
        path.write_bytes(whole.read_bytes()[:size])
        with pytest.raises(CorruptCheckpoint, match="it is no whole corpus"):
            Corpus(path)
    spoilt(whole, path, -1)
    with pytest.raises(CorruptCheckpoint, match="its index is damaged"):
        Corpus(path)
    with pytest.raises(IncompatibleBridge, match=f"of bridge {bridge.manifest.bridge_id}; this bridge is 000"):
        Corpus(whole, bridge_id="0" * 32)
    with pytest.raises(InvalidRequest, match="there is no such file"):
        Corpus(tmp_path / "nothing.lw")
    with pytest.raises(InvalidRequest, match="it is None of version None; expected 'latentwire corpus'"):
        Corpus(next(bridge_weights(tmp_path)))


def bridge_weights(folder: Path) -> Iterator[Path]:
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(3)}, folder / "other.safetensors")
    yield folder / "other.safetensors"


@pytest.mark.parametrize(
    ("sources", "named"),
    [
        ([], "there are no documents"),
        ([Source("a", "b"), Source("c", " \n")], "document 2, 'c', is empty"),
        ([Source("a", "b"), Source("c", "d"), Source("a", "e")], "documents 1 and 3 are both called 'a'"),
        ([Source("a", "b"), Source("long", "x" * 200)], "document 2, 'long': the text has 201 sender tokens"),
    ],
)
def test_documents_that_cannot_be_encoded_are_named(
    bridge: Bridge, tmp_path: Path, sources: list[Source], named: str
) -> None:
    with pytest.raises(InvalidRequest, match=named):
        encode_corpus(bridge, sources, tmp_path / "c.lw")


def test_a_run_that_met_a_long_text_goes_on_with_truncate(bridge: Bridge, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="set truncate"):
        encode_corpus(bridge, {"a": "b", "long": "x" * 200}, tmp_path / "c.lw")
    corpus = encode_corpus(bridge, {"a": "b", "long": "x" * 200}, tmp_path / "c.lw", truncate=True)
    assert [latent.truncated for latent in corpus.values()] == [False, True]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"text": "a"', "line 2: it is not JSON"),
        ("[1]", r"line 2: it is \[1\]; expected an object"),
        ('{"txt": "a"}', "line 2: the field 'text' is missing; it has txt"),
        ('{"text": 5}', "line 2: the field 'text' is 5; expected a text"),
        ('{"text": "a", "id": []}', r"line 2: the field 'id' is \[\]; expected a text"),
    ],
)
def test_a_line_that_holds_no_document_is_named(tmp_path: Path, line: str, named: str) -> None:
    file = tmp_path / "docs.jsonl"
    file.write_text('{"text": "a", "id": 1}\n' + line)
    with pytest.raises(InvalidRequest, match=named):
        list(JsonLines(file, id_field="id"))


def test_lines_are_read_also_when_compressed_with_ids_of_a_field_or_their_numbers(tmp_path: Path) -> None:
    text = '{"body": "a", "n": 7, "title": "A"}\n\n{"body": "b", "n": "x"}\n'
    (tmp_path / "d.jsonl").write_text(text)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    expected = [Source("7", "a", {"title": "A"}), Source("x", "b")]
    for name in ("d.jsonl", "d.jsonl.gz"):
        assert list(JsonLines(tmp_path / name, "body", "n", ("title",))) == expected
    assert [source.id for source in JsonLines(tmp_path / "d.jsonl", "body")] == ["1", "3"]
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(text.encode())[:-9])
    for name, said in (("d.jsonl.gz", "end-of-stream"), ("nothing", "No such file")):
        with pytest.raises(InvalidRequest, match=said):
            list(JsonLines(tmp_path / name, "body"))


def test_a_parquet_file_has_a_row_for_each_document(whole: Path, tmp_path: Path) -> None:
    corpus = Corpus(whole)
    write_parquet(corpus, tmp_path / "c.parquet")
    table = pq.read_table(tmp_path / "c.parquet")
    rows = table.to_pylist()
    assert table.schema.metadata[b"bridge_id"].decode() == corpus.bridge_id
    for source, row in zip(SOURCES, rows, strict=True):
        assert (row["id"], row["text"], json.loads(row["metadata"])) == (source.id, source.text, source.metadata)
    latent = np.array(rows[9]["latent"], np.float32).reshape(rows[9]["slots"], rows[9]["width"])
    np.testing.assert_array_equal(latent, corpus["doc 9"].array)
    with pytest.raises(InvalidRequest, match="--parquet"):
        write_parquet(corpus, tmp_path / "c.parquet" / "below")
    assert sorted(os.listdir(tmp_path)) == ["c.parquet"]
