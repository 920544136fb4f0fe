"""A task file says everything or is refused with the value at fault."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.evaluation.tasks import Example, Task, load_task

SENTIMENT = """
name = "sst"
kind = "classification"
train = "train.jsonl"
test = "test.jsonl"
source = "{text}"
prompt = "Review: {latent}\\nSentiment:"
label = "label"
labels = ["negative", "positive"]
"""
QA = """
name = "qa"
kind = "generation"
train = "train.jsonl"
test = "test.jsonl"
source = "{title}: {text}"
prompt = "{latent}\\nQuestion: {question}\\nAnswer:"
answer = "{answer}"
"""
REVIEWS = [{"text": "Good.", "label": 1}, {"text": "Bad.", "label": "negative"}]
FACTS = [{"title": "T", "text": "x", "question": "Q?", "answer": "A"}]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def task_in(folder: Path, spec: str, rows: list[dict[str, Any]] | bytes) -> Task:
    data = rows if isinstance(rows, bytes) else lines(rows)
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_bytes(data)
    (folder / "task.toml").write_text(spec)
    return load_task(str(folder / "task.toml"))


def refused(folder: Path, spec: str, rows: list[dict[str, Any]] | bytes, *words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        task_in(folder, spec, rows)
    assert caught.value.param == "task" and "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_classification_reads_labels_by_index_and_by_name(tmp_path: Path) -> None:
    task = task_in(tmp_path, SENTIMENT, REVIEWS)
    prompt = "Review: {latent}\nSentiment:"
    assert list(task.train) == [Example("Good.", prompt, " positive", 1), Example("Bad.", prompt, " negative", 0)]
    assert (task.kind, task.labels, task.template) == ("classification", ("negative", "positive"), prompt)


def test_a_generation_fills_every_template(tmp_path: Path) -> None:
    task = task_in(tmp_path, QA, FACTS)
    assert list(task.test) == [Example("T: x", "{latent}\nQuestion: Q?\nAnswer:", " A")]
    assert (task.name, task.labels, task.max_answer_tokens) == ("qa", (), 32)


def test_a_field_may_hold_several_right_answers_of_which_the_first_is_trained_on(tmp_path: Path) -> None:
    rows = [{**FACTS[0], "answer": ["in Rome", "Rome", "in Rome"]}]
    (example,) = task_in(tmp_path, QA, rows).test
    assert (example.answer, example.also) == (" in Rome", (" Rome",))
    assert example.right == (" in Rome", " Rome")
    assert task_in(tmp_path, QA, FACTS).test[0].right == (" A",)


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([], ["row 1", "'answer' is []", "expected at least one text"]),
        (["Rome", " "], ["row 1", "the answer is empty"]),
        (["Rome", None], ["row 1", "'answer' is None; expected a text"]),
        ([["Rome"]], ["row 1", "['Rome']; expected a text"]),
    ],
)
def test_a_list_of_answers_holds_texts(tmp_path: Path, answers: list[Any], words: list[str]) -> None:
    refused(tmp_path, QA, [{**FACTS[0], "answer": answers}], *words)


def test_an_answer_has_one_space_before_it_wherever_the_task_wrote_it(tmp_path: Path) -> None:
    spaced = QA.replace('answer = "{answer}"', 'answer = " {answer}"')
    assert task_in(tmp_path, spaced, FACTS).test[0].answer == " A"
    after = QA.replace("Answer:", "Answer: ")
    assert task_in(tmp_path, after, FACTS).test[0].answer == "A"


def test_compressed_rows_read_as_plain_ones(tmp_path: Path) -> None:
    plain = task_in(tmp_path, SENTIMENT, REVIEWS)
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl.gz").write_bytes(gzip.compress(lines(REVIEWS)))
    (tmp_path / "gz.toml").write_text(SENTIMENT.replace(".jsonl", ".jsonl.gz"))
    packed = load_task(str(tmp_path / "gz.toml"))
    assert (list(packed.train), list(packed.test)) == (list(plain.train), list(plain.test))


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_a_row_ends_at_a_newline_and_at_no_other_mark(tmp_path: Path, mark: str) -> None:
    rows = [{"text": f"one{mark}two", "label": 0}]
    assert mark.encode() in lines(rows)
    assert task_in(tmp_path, SENTIMENT, rows).train[0].source == f"one{mark}two"


def test_lines_may_end_as_on_windows(tmp_path: Path) -> None:
    assert len(task_in(tmp_path, SENTIMENT, lines(REVIEWS).replace(b"\n", b"\r\n")).train) == 2


def test_other_data_have_another_digest(tmp_path: Path) -> None:
    first = task_in(tmp_path, SENTIMENT, REVIEWS).data_sha256
    assert task_in(tmp_path, SENTIMENT, REVIEWS).data_sha256 == first
    (tmp_path / "test.jsonl").write_bytes(lines(REVIEWS[:1]))
    assert load_task(str(tmp_path / "task.toml")).data_sha256 != first


@pytest.mark.parametrize(
    "old, new, words",
    [
        ('name = "sst"', "", ["name", "required"]),
        ('name = "sst"', 'name = "sst"\nnmae = "x"', ["nmae"]),
        ('"classification"', '"regression"', ["kind"]),
        ('label = "label"', "", ["'label'"]),
        ('labels = ["negative", "positive"]', 'labels = ["one"]', ["two 'labels'"]),
        ('labels = ["negative", "positive"]', "labels = 3", ["labels"]),
        ('label = "label"', 'label = "label"\nanswer = "x"', ["no 'answer'"]),
        ('"{text}"', '"{body}"', ["'body'", "row 1", "text, label"]),
        ('label = "label"', 'label = "stars"', ["'stars'", "row 1"]),
        ("Review: {latent}", "{latent} {latent}", ["{latent} 2 times"]),
        ('"train.jsonl"', '"gone.jsonl"', ["gone.jsonl", "No such file"]),
        ('name = "sst"', "name = ", ["not TOML"]),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    refused(tmp_path, SENTIMENT.replace(old, new), REVIEWS, *words)


@pytest.mark.parametrize(
    "old, new", [('answer = "{answer}"', ""), ('answer = "{answer}"', 'answer = "x"\nlabels = ["a", "b"]')]
)
def test_a_generation_is_scored_one_way(tmp_path: Path, old: str, new: str) -> None:
    refused(tmp_path, QA.replace(old, new), FACTS, "neither 'label' nor 'labels'")


@pytest.mark.parametrize("label", ["neutral", 2, -1, 1.5, None])
def test_a_label_outside_the_list_is_named_with_the_list(tmp_path: Path, label: object) -> None:
    rows = [*REVIEWS, {"text": "x", "label": label}]
    refused(tmp_path, SENTIMENT, rows, f"row 3: label {label!r}", "['negative', 'positive']")


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", ["holds no row"]),
        (b'{"text": "x", "label": 0}\n{"text": ', ["line 2 is not JSON"]),
        (b"[1, 2]\n", ["line 1 is list"]),
        (b'{"text": "\xff", "label": 0}\n', ["cannot be read"]),
        (b'{"text": "x"}\n', ["row 1", "'label'"]),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, data: bytes, words: list[str]) -> None:
    refused(tmp_path, SENTIMENT, data, *words)


def test_a_damaged_archive_is_refused_wherever_the_damage_is(tmp_path: Path) -> None:
    whole = gzip.compress(lines(REVIEWS * 5), mtime=0)
    (tmp_path / "task.toml").write_text(SENTIMENT.replace(".jsonl", ".jsonl.gz"))
    (tmp_path / "test.jsonl.gz").write_bytes(whole)
    damaged = [whole[:-12], b"plain text", b"", *(whole[:at] + b"\xff" + whole[at + 1 :] for at in range(10, 40))]
    for data in damaged:
        if data == whole:
            continue
        (tmp_path / "train.jsonl.gz").write_bytes(data)
        with pytest.raises(InvalidRequest):
            load_task(str(tmp_path / "task.toml"))


@pytest.mark.parametrize("name", ["wrld", "gone.toml", "."])
def test_an_unknown_task_is_named(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"'{name}' is neither 'world' nor"):
        load_task(name)


def test_a_task_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "task.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidRequest, match="not TOML"):
        load_task(str(tmp_path / "task.toml"))


def test_a_label_follows_the_prompt_of_its_own_row(tmp_path: Path) -> None:
    spaced = SENTIMENT.replace("Sentiment:", "Sentiment ({text}): ")
    task = task_in(tmp_path, spaced, REVIEWS)
    assert task.train[0].prompt.endswith("(Good.): ") and task.train[0].answer == "positive"


def test_a_field_that_holds_a_place_for_the_latent_is_named_with_its_row(tmp_path: Path) -> None:
    rows = [*FACTS, {**FACTS[0], "question": "What is {latent}?"}]
    refused(tmp_path, QA, rows, "row 2", "{latent}")


def test_a_data_set_may_name_its_configuration_and_split(tmp_path: Path) -> None:
    folder = tmp_path / "reviews"
    folder.mkdir()
    rows = [{"text": "Fine.", "label": 1}]
    (folder / "validation.jsonl").write_bytes(lines(rows))
    spec = SENTIMENT.replace('"test.jsonl"', '"reviews:default@validation"')
    assert [e.source for e in task_in(tmp_path, spec, REVIEWS).test] == ["Fine."]
