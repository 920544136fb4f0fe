"""Reports beside each other: only comparable ones, those of one recipe over its seeds, and what is no report named."""

import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.evaluation.compare import against_bytes, against_compression, compare
from latentwire.bridge.evaluation.html import comparison_page
from latentwire.bridge.evaluation.report import comparison_table, table
from latentwire.bridge.evaluation.saved import read_report
from latentwire.bridge.evaluation.statistics import over_seeds
from tests.reports import document, written

NEW = ("dropped", "headline", "comparisons", "content_share_interval", "sender_share", "sender_share_interval", "about")


def printed(shown: Any) -> str:
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(shown)
    return console.export_text()


def test_a_report_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    whole = document()
    assert read_report(written(tmp_path / "a.json", whole)) == whole
    few = {key: value for key, value in whole.items() if key not in ("examples", "slots", "latents")}
    assert read_report(written(tmp_path / "b.json", few)) == few
    text = printed(table(few))
    assert "bridge / direct" in text and "no 'direct_tuned'" in text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON: Expecting value"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("\udcff", "not JSON"),
        ("[]", "no report of an evaluation: the document: Input should be an object"),
        ("{}", "no report of an evaluation: checkpoint: Field required"),
        (json.dumps({**document(), "n": "6"}), "no report of an evaluation: n: Input should be a valid integer"),
        (json.dumps({**document(), "n": 5}), "no report of an evaluation: the document: Value error, n is 5"),
        (json.dumps(document()).replace('"none": 0.0', '"nine": 0.0'), "Value error, an example has nothing of 'none'"),
        (json.dumps({**document(), "conditions": {}}), "no report of an evaluation: conditions: Dictionary should"),
        (json.dumps(document()).replace("0.6666666666666666", "NaN"), "conditions.bridge.value: Input should be a f"),
    ],
    ids=["empty", "cut", "deep", "bytes", "a list", "an object", "a text", "too few", "no score", "no row", "NaN"],
)  # fmt: skip
def test_what_is_no_report_is_refused_in_one_line_that_names_the_file(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "odd.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InvalidRequest) as caught:
        read_report(file)
    assert str(caught.value).startswith(f"{file}: ") and why in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", [NEW, ("about",)], ids=["all", "one"])
def test_a_report_of_an_older_version_is_refused_as_such(tmp_path: Path, missing: tuple[str, ...]) -> None:
    old = {key: value for key, value in document().items() if key not in missing}
    with pytest.raises(InvalidRequest, match=f"without {', '.join(missing)}, as older versions wrote it"):
        read_report(written(tmp_path / "old.json", old))


def test_reports_of_one_recipe_are_one_entry_with_the_mean_over_their_seeds() -> None:
    scores = [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]
    reports = {f"r4-{seed}.json": document(bridge=row, seed=seed) for seed, row in enumerate(scores)}
    found = compare({**reports, "r8.json": document(ratio=8.0)})
    seeds, alone = found.entries
    assert (seeds.name, alone.name) == ("r4-0 (3 seeds)", "r8") and seeds.seeds == [0, 1, 2]
    mean, interval = over_seeds([5 / 6, 4 / 6, 3 / 6])
    assert seeds.estimate("bridge") == (mean, *(interval or ()))
    row = document()["conditions"]["bridge"]
    assert alone.estimate("bridge") == (row["value"], row["low"], row["high"])
    assert alone.estimate("relay") is None
    assert seeds.scores == pytest.approx(list(np.mean(scores, axis=0)))
    assert any("Student's t" in note for note in found.notes)
    assert not any("Student's t" in note for note in compare({"r8.json": document(ratio=8.0)}).notes)


def test_two_seeds_have_a_mean_and_no_interval_and_that_is_said() -> None:
    found = compare({f"{seed}.json": document(seed=seed, bridge=[1] * seed + [0] * (6 - seed)) for seed in (0, 1)})
    (entry,) = found.entries
    assert entry.estimate("bridge") == (pytest.approx(0.5 / 6), None, None)
    assert "0 (2 seeds): 2 seeds are too few for an interval; 3 needed" in found.notes
    assert "too few" in printed(comparison_table(found)) and "too few" in comparison_page(found, title="two")


def test_where_seeds_agree_as_without_a_bridge_the_interval_is_over_the_examples() -> None:
    (entry,) = compare({f"{seed}.json": document(seed=seed) for seed in range(3)}).entries
    row = document()["conditions"]["direct"]
    assert entry.estimate("direct") == (row["value"], row["low"], row["high"])


def test_the_same_bridge_is_not_counted_as_another_seed() -> None:
    found = compare({"a.json": document(), "b.json": document(), "c.json": document(seed=1)})
    (entry,) = found.entries
    assert entry.seeds == [0, 1] and "b.json is of the recipe and seed of a.json, and not counted again" in found.notes


OTHERS: dict[str, dict[str, Any]] = {
    "recipe": {"recipe": {"ratio": 4, "warmup_steps": 9}},
    "wire": {"about": {**document(seed=1)["about"], "dtype": "int8"}},
    "unknown recipe": {"recipe": {}},
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_what_differs_in_more_than_the_seed_stands_alone(change: dict[str, Any]) -> None:
    found = compare({"a.json": document(seed=1, **change), "b.json": document()})
    assert [entry.name for entry in found.entries] == ["a", "b"]


def test_bridges_of_unknown_recipes_are_none_of_one() -> None:
    found = compare({f"{seed}.json": document(seed=seed, recipe={}) for seed in (0, 1)})
    assert [entry.name for entry in found.entries] == ["0", "1"]


def test_reports_on_other_data_or_other_examples_are_refused_with_both_names() -> None:
    first = document()
    other = {**first["about"], "data_sha256": "e" * 64}
    with pytest.raises(
        InvalidRequest, match=r"^b.json is of task 'cities' \(data e{12}\) and a.json of .* \(data d{12}\)"
    ):
        compare({"a.json": first, "b.json": document(about=other)})
    with pytest.raises(InvalidRequest, match=r"^b.json is of task 'towns' "):
        compare({"a.json": first, "b.json": document(task="towns")})
    with pytest.raises(InvalidRequest, match=r"^b.json was measured on 4 examples and a.json on 6: "):
        compare({"a.json": first, "b.json": document(bridge=[1] * 4, direct=[1] * 4)})
    with pytest.raises(InvalidRequest, match=r"^c.json was measured on others than a.json: "):
        compare({"a.json": first, "b.json": document(seed=1, examples=None), "c.json": document(answers=["Bonn"])})


def test_each_bridge_is_held_against_the_first_on_the_same_examples() -> None:
    better, worse = (
        document(bridge=[1] * 10, direct=[1] * 10),
        document(bridge=[0] * 8 + [1, 1], direct=[1] * 10, ratio=8.0),
    )
    found = compare({"a.json": better, "b.json": worse})
    assert found.ahead["b"]["difference"] == pytest.approx(-0.8) and found.ahead["b"]["p"] < 0.05
    assert found.ahead["b"]["low"] < -0.8 < found.ahead["b"]["high"] < 0
    assert "-0.800*" in printed(comparison_table(found)) and "-0.800*" in comparison_page(found, title="two")
    assert compare({"a.json": better, "b.json": {**worse, "examples": None}}).ahead == {}
    star = "* p < .05, adjusted for the number of bridges (Holm)"
    assert (
        star in found.notes
        and star
        not in compare({"a.json": better, "b.json": document(ratio=8.0, bridge=[1] * 10, direct=[1] * 10)}).notes
    )
    assert "+0.000" in printed(
        comparison_table(compare({"a.json": better, "b.json": {**better, **{"about": worse["about"]}}}))
    )


def test_a_text_that_was_not_measured_is_named() -> None:
    more = document(ratio=8.0)
    more["headline"]["missing"] = []
    notes = compare({"a.json": document(), "b.json": more, "c.json": document(ratio=2.0)}).notes
    assert "no 'direct_tuned' of a, c, which may be the better of the two" in notes
    assert not any("direct_tuned" in note for note in compare({"b.json": more}).notes)


def test_names_are_as_short_as_tells_them_apart() -> None:
    names = [entry.name for entry in compare({"x/a.json": document(), "y/b.json": document(ratio=8.0)}).entries]
    assert names == ["a", "b"]
    names = [entry.name for entry in compare({"x/a.json": document(), "y/a.json": document(ratio=8.0)}).entries]
    assert names == ["x/a.json", "y/a.json"]


def test_plots_hold_bridges_by_their_size_and_the_text_plain_and_packed() -> None:
    found = compare({"r4.json": document(), "r8.json": document(ratio=8.0)})
    by_tokens, by_bytes = against_compression(found.entries), against_bytes(found.entries)
    assert by_tokens is not None and by_bytes is not None
    at = {(mark.point.label, mark.point.x) for mark in by_tokens.marks}
    assert at == {("r4", 4.0), ("r8", 8.0), ("text", 1.0), ("cut text", 4.0), ("cut text", 8.0)}
    packed = np.mean([len(zlib.compress(example["source"].encode(), 9)) for example in document()["examples"]])
    at = {(mark.point.label, mark.point.x) for mark in by_bytes.marks}
    assert at == {("r4", 100.0), ("r8", 50.0), ("text", 30.0), ("text, zlib", round(float(packed), 3))}
    text = next(mark.point for mark in by_bytes.marks if mark.point.label == "text, zlib")
    row = document()["conditions"]["direct"]
    assert (text.value, text.low, text.high) == (row["value"], row["low"], row["high"])
    without = compare({"a.json": document(examples=None, headline=None)})
    by_bytes = against_bytes(without.entries)
    assert by_bytes is not None and [mark.point.label for mark in by_bytes.marks] == ["bridge"]


def test_the_table_and_the_page_show_every_condition_of_every_report() -> None:
    more = document(ratio=8.0)
    more["conditions"]["relay"] = {**more["conditions"]["none"], "value": 0.123}
    found = compare({"[b]r4.json": document(), "r8.json": more})
    text, html = printed(comparison_table(found)), comparison_page(found, title="two")
    for shown in (text, html):
        assert all(name in shown for name in ("[b]r4", "r8", *more["conditions"], "0.123", "latent bytes", "50"))
    assert html.count("latentwire evaluate tiny") == 1 and html.count("<svg") == 2
