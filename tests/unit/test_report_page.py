"""The page of a report: readable alone, and harmless whatever the report says."""

import re
from typing import Any

from latentwire.bridge.evaluation.compare import compare
from latentwire.bridge.evaluation.conditions import CONDITIONS
from latentwire.bridge.evaluation.html import SHOWN_EXAMPLES, comparison_page, page
from tests.reports import document

EVIL = "<script>alert('\"&')</script>"


def report(**changes: Any) -> dict[str, Any]:
    """One as older versions wrote it, and services keep for a week."""
    row = {"metric": "em", "value": 0.25, "low": 0.125, "high": 0.5, "ttft_ms": 12.34, "token_f1": 0.4321}
    return {
        "checkpoint": "tiny", "bridge_id": "0" * 32, "task": "world", "n": 8,
        "conditions": {"bridge": row, "none": {**row, "value": 0.0, "low": 0.0, "high": 0.0}},
        "bytes": {"latent": 100.0, "source": 20.0, "receiver_kv": 3000.0}, "source_tokens_per_soft_token": 4.0,
        "receiver_tokens_per_soft_token": 3.0, "truncated": 1, "content_share": 0.5, **changes,
    }  # fmt: skip


def shown(text: dict[str, Any]) -> str:
    return page(text, title="tiny on cities", facts={})


def words(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", html[html.index("<body>") :]).split())


def test_every_condition_has_a_row_with_its_numbers_and_a_bar_over_its_interval() -> None:
    html = page(report(), title="tiny on world", facts={"state": "done"})
    assert html.count("<tr class=") == 2 and html.count('class="bar"') == 2
    bridge, none = re.findall(r'<tr class="(\w+)">(.*?)</tr>', html)
    assert bridge[0] == "own" and none[0] == "other"
    for text in (
        CONDITIONS["bridge"].meaning.replace("'", "&#39;"), "left:12.50%;width:37.50%", '<b style="left:25.00%">',
        "0.250", "0.125 – 0.500", "0.432", "12.3 ms", "exact match",
    ):  # fmt: skip
        assert text in bridge[1], text
    assert "left:0.00%;width:0.00%" in none[1]
    assert "<dt>state</dt><dd>done</dd>" in html and "<dt>sources cut</dt><dd>1</dd>" in html


def test_an_older_report_has_a_page_without_what_it_lacks() -> None:
    html = shown(report())
    assert "bridge ahead" not in html and not re.search(r"<h2>(Latents|What each slot reads|About|Where)", html)
    assert "Score against bytes" in html  # the latent's, at least


def test_a_headline_and_what_is_missing_for_it_come_first() -> None:
    whole = document()
    text = words(shown(whole))
    ratio = f"{whole['headline']['ratio']:.3f} bridge / direct"
    assert 0 < text.index(ratio) < text.index("no &#39;direct_tuned&#39; in this table") < text.index("exact match")
    lacking = {**whole, "headline": {**whole["headline"], "missing": []}}
    assert "direct_tuned" not in words(shown(lacking))


def test_a_check_of_some_examples_alone_is_said_and_one_of_all_is_not() -> None:
    whole = document()
    assert "held against" not in words(shown(whole))
    some = shown({**whole, "checks": {"inputs": 2, "answers": 2}})
    assert "for 2 of 6 examples" in words(some)


def test_a_condition_that_could_not_be_had_is_named_with_the_reason() -> None:
    text = words(shown(document(left_out={"mismatched": "the examples have one source alone"})))
    assert "no &#39;mismatched&#39;: the examples have one source alone" in text


def test_the_difference_to_the_bridge_stands_in_each_row_but_its_own_with_a_star_where_it_is_sure() -> None:
    ten = document(bridge=[1] * 10, direct=[1] * 9 + [0])
    rows = dict(re.findall(r'<th scope="row">(\w+)<.*?(data-name="bridge ahead">.*?</td>|<td></td>)', shown(ten)))
    assert "+1.000*" in rows["none"] and "+0.100 " in rows["direct"] and rows["bridge"] == "<td></td>"
    assert "* p &lt; .05" in shown(ten)


def test_a_plot_holds_each_point_with_its_interval_and_its_label() -> None:
    first, second = re.findall(r"<figure>\n<figcaption>(Score .*?)</figure>", shown(document()), re.DOTALL)
    for svg, labels in ((first, {"bridge", "text", "cut text"}), (second, {"bridge", "text", "text, zlib"})):
        assert set(re.findall(r'class="halo"[^>]*>([^<]*)<', svg)) == labels
        assert len(re.findall(r'<path class="k\d" d=', svg)) == len(labels)  # marks
        assert len(re.findall(r'<path class="k\d" stroke-width', svg)) == len(labels)  # intervals
    assert "bridge: 0.667 (" in first and ") at 4<" in first and ") at 100<" in second


def test_the_cells_of_a_slot_are_as_strong_as_its_share_of_a_token() -> None:
    html = shown(document())
    (svg,) = re.findall(r"<svg[^>]*Which tokens each slot reads.*?</svg>", html, re.DOTALL)
    cells = re.findall(r'<rect x="(\d+)" y="(\d+)"[^>]*opacity="([\d.]+)"', svg)
    columns = {x: [opacity for at, _, opacity in cells if at == x] for x, _, _ in cells}
    assert list(columns.values()) == [["1.00", "1.00"], ["0.33", "1.00"]]
    assert [y for _, y, _ in cells] == ["18", "32", "46", "60"]
    assert re.findall(r'class="word"[^>]*>([^<]*)<', svg) == ["&lt;s&gt;", " Mara", "⏎", " lives"]
    assert "example 2: 4 of 9 tokens, 2 of 3 slots" in html


def test_latents_are_told_apart_by_answer_or_by_label_in_shape_and_colour() -> None:
    def groups(text: dict[str, Any]) -> tuple[list[str], set[tuple[str, str]], int]:
        html = shown(text)
        plane = html[html.index("Examples by their latents") :]
        (drawn,) = re.findall(r'<g class="many">(.*?)</g>', plane, re.DOTALL)
        marks = re.findall(r'class="(k\d)" d="([^"]+)"', drawn)
        return re.findall(r"</path></svg>(.*?)</li>", plane), set(marks), len(marks)

    names, marks, count = groups(document())
    assert names == ["right", "wrong"] and len(marks) == 2 and count == 6
    whole = document(bridge=[1] * 20, direct=[1] * 20, answers=[f"label {i}" for i in range(9)])
    labelled = {name: {**row, "metric": "accuracy"} for name, row in whole["conditions"].items()}
    names, marks, count = groups({**whole, "conditions": labelled})
    assert names == [*(f"label {i}" for i in range(6)), "others"] and len(marks) == 7 and count == 20
    assert "component 1: 60% of the variance" in shown(whole)


def test_examples_on_which_bridge_and_direct_differ_are_shown_for_both_sides_and_marked() -> None:
    html = shown(document())
    parts = re.findall(r"<h3>(.*?)</h3>(.*?)(?=<h3>|<h2>)", html, re.DOTALL)
    assert [title for title, _ in parts] == ["bridge is better: 1 of 6 examples", "direct is better: 1 of 6 examples"]
    for (_, part), number, (bridge, direct) in zip(
        parts, (1, 3), (("right ✓", "wrong ✗"), ("wrong ✗", "right ✓")), strict=True
    ):
        assert part.count('class="example"') == 1 and f"Fact {number}:" in part
        said = {
            name: f"{mark} {text}"
            for name, mark, text in re.findall(r'<dt>(\w+)</dt><dd class="(\w+)">(.*?)</dd>', part)
        }
        assert said == {"bridge": f"{bridge} bridge says {number}", "direct": f"{direct} direct says {number}"}


def test_of_many_that_differ_the_first_are_shown_and_long_sources_are_cut_at_a_word() -> None:
    whole = document(bridge=[0] * 12, direct=[1] * 12)
    whole["examples"] = [{**example, "source": "lorem ipsum " * 200} for example in whole["examples"]]
    html = shown(whole)
    assert html.count('class="example"') == SHOWN_EXAMPLES
    assert f"direct is better: 12 of 12 examples, of which these are the first {SHOWN_EXAMPLES}" in html
    (source, *_) = re.findall(r'class="example"><p>(.*?)</p>', html)
    assert len(source) <= 400 and re.search(r"(lorem|ipsum) …$", source)
    assert "they score the same on each of the 4 examples" in shown(document(bridge=[1] * 4, direct=[1] * 4))


def test_every_right_answer_of_an_example_is_shown() -> None:
    whole = document(bridge=[0] * 2, direct=[1] * 2)
    whole["examples"] = [{**example, "wanted": " in Rome", "also": [" Rome"]} for example in whole["examples"]]
    assert "<dt>wanted</dt><dd>in Rome · Rome</dd>" in shown(whole)


def test_the_page_says_what_it_takes_to_have_it_again() -> None:
    text = words(shown(document()))
    for part in (
        "latentwire evaluate tiny --task cities.toml", "torch 2.13", "d" * 64, "small/sender (1/2/3)",
        "small/receiver (4/5/6)", "100 steps, seed 0, version 0.1", "ratio 4",
    ):  # fmt: skip
        assert part in text, part
    assert "user-select: all" in shown(document())


def test_what_a_report_says_stays_text() -> None:
    row = {"metric": EVIL, "value": 0.5, "low": 0.5, "high": 0.5, "ttft_ms": 1.0}
    evil = report(task=EVIL, bridge_id=EVIL, conditions={EVIL: row})
    html = page(evil, title=EVIL, facts={EVIL: EVIL})
    assert "<script" not in html and "alert('" not in html and html.count("&lt;script&gt;") >= 8


def poisoned(value: Any) -> Any:
    """The same with every text of it evil, but the names by which things are found."""
    if isinstance(value, dict):
        return {key: poisoned(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [poisoned(inner) for inner in value]
    return EVIL if isinstance(value, str) else value


def test_whatever_a_whole_report_says_stays_text_too() -> None:
    whole = document()
    evil = {**poisoned(whole), "headline": whole["headline"]}
    pages = [page(evil, title=EVIL, facts={}), comparison_page(compare({EVIL: evil}), title=EVIL)]
    assert all("<script" not in html and "alert('" not in html for html in pages)
    assert pages[0].count("&lt;script&gt;") > 30


def test_the_page_fetches_nothing_and_fits_a_phone() -> None:
    for html in (shown(report()), shown(document()), comparison_page(compare({"a.json": document()}), title="one")):
        assert not re.search(r"https?:|src=|url\(|@import|<link|<script", html)
        assert 'name="viewport"' in html and "@media (max-width" in html


def test_a_report_without_rows_and_none_at_all_are_pages_too() -> None:
    assert "Nothing has been measured yet" in page(None, title="tiny", facts={})
    assert "<tbody></tbody>" in page(report(conditions={}, content_share=None), title="tiny", facts={})
