"""The page of a report: readable alone, and harmless whatever the report says."""

import re
from typing import Any

from latentwire.bridge.evaluation.conditions import CONDITIONS
from latentwire.bridge.evaluation.html import page

EVIL = "<script>alert('\"&')</script>"


def report(**changes: Any) -> dict[str, Any]:
    row = {"metric": "em", "value": 0.25, "low": 0.125, "high": 0.5, "ttft_ms": 12.34, "token_f1": 0.4321}
    return {
        "checkpoint": "tiny", "bridge_id": "0" * 32, "task": "world", "n": 8,
        "conditions": {"bridge": row, "none": {**row, "value": 0.0, "low": 0.0, "high": 0.0}},
        "bytes": {"latent": 100.0, "source": 20.0, "receiver_kv": 3000.0}, "source_tokens_per_soft_token": 4.0,
        "receiver_tokens_per_soft_token": 3.0, "truncated": 1, "content_share": 0.5, **changes,
    }  # fmt: skip


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


def test_what_a_report_says_stays_text() -> None:
    row = {"metric": EVIL, "value": 0.5, "low": 0.5, "high": 0.5, "ttft_ms": 1.0}
    evil = report(task=EVIL, bridge_id=EVIL, conditions={EVIL: row})
    html = page(evil, title=EVIL, facts={EVIL: EVIL})
    assert "<script" not in html and "alert('" not in html and html.count("&lt;script&gt;") >= 8


def test_the_page_fetches_nothing_and_fits_a_phone() -> None:
    html = page(report(), title="tiny", facts={})
    assert not re.search(r"https?:|src=|url\(|@import|<link|<script", html)
    assert 'name="viewport"' in html and "@media (max-width" in html


def test_a_report_without_rows_and_none_at_all_are_pages_too() -> None:
    assert "Nothing has been measured yet" in page(None, title="tiny", facts={})
    empty = page(report(conditions={}, content_share=None), title="tiny", facts={})
    assert "<tbody></tbody>" in empty and "<dd>none</dd>" in empty
