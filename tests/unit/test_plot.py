"""A run is drawn as it stands in its log: whole or killed, with what went wrong in it."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from latentwire.bridge.checkpoint import BUILTIN_BRIDGE, CONFIG
from latentwire.bridge.errors import InvalidRequest
from latentwire.training.alarms import CONDITIONS
from latentwire.training.curves import STYLE, RunLog, best_of, draw_panel
from latentwire.training.monitor import EVENTS, LOG
from latentwire.training.plot import PAIR, SINGLE, facts, page, panels_of, picture, plot, read_run

SVG = "{http://www.w3.org/2000/svg}"
MEASURES = (
    "accuracy", "first_token_top1", "first_token_top5", "entropy_nats", "wanted_entropy_nats", "distinct_ratio",
    "top_share", "wanted_top_share",
)  # fmt: skip


def record(step: int, *, align: int = 10, **changes: Any) -> dict[str, Any]:
    aligning = step <= align
    return {
        "step": step, "phase": "align" if aligning else "answer", "receiver": "builtin:llama", "loss": 5 / step,
        "losses": {"alignment": 5 / step} if aligning else {"answer": 4 / step, "kd": 1 / step},
        **dict.fromkeys(MEASURES, None if aligning else 0.5), "delta_nats": 0.5 if step % 20 == 0 else None,
        "gradient_norm": 1.0, "learning_rate": 1e-3, "seconds": 0.5, "data_wait_seconds": 0.05, "tokens": 100,
        "flops_per_second": 1e9, "mfu": None,
        "allocated_bytes": 40e9, "reserved_bytes": 50e9, "inactive_bytes": 0, "peak_bytes": 60e9, "device_bytes": 80e9,
        "micro_batch": 32, "out_of_memory_count": 0, "refused": False, **changes,
    }  # fmt: skip


def run_in(folder: Path, records: list[dict[str, Any]], events: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / LOG).write_text("".join(json.dumps(line) + "\n" for line in records))
    (folder / EVENTS).write_text("".join(json.dumps(line) + "\n" for line in events or []))
    return folder


def alarm(step: int, name: str) -> dict[str, Any]:
    return {"step": step, "event": "alarm", "name": name, "message": f"{name} <&> said"}


def validation(step: int, value: float, *, best: bool, metric: str = "em") -> dict[str, Any]:
    return {"step": step, "event": "validation", "metric": metric, "value": value, "best": best}


def drawn(log: RunLog, title: str, width: float = PAIR[0]) -> Axes:
    """The panel of that title, drawn."""
    (panel,) = (panel for panel in panels_of(log) if panel.title.startswith(title))
    with rc_context(STYLE):
        ax: Axes = Figure(figsize=(width, PAIR[1])).subplots()
        draw_panel(ax, panel, log, width)
    return ax


def curve(ax: Axes, label: str) -> tuple[list[float], list[float]]:
    """Points of all lines of a label."""
    (line,) = (line for line in ax.get_lines() if line.get_label() == label)
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()


def names_in(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_a_run_becomes_one_picture_and_one_page(tmp_path: Path) -> None:
    run = run_in(tmp_path / "run", [record(step) for step in range(1, 41)])
    assert plot(run) == [run / "curves.png", run / "curves.html"]
    height, width, _ = imread(run / "curves.png").shape
    assert width >= 1500 and height >= 1500
    with rc_context(STYLE):
        assert (run / "curves.html").read_text() == page(read_run(run)), "the same log gives the same page"


def test_the_page_is_whole_in_itself(tmp_path: Path) -> None:
    run = run_in(tmp_path / "<run>", [record(step) for step in range(1, 41)], [alarm(30, "memory"), alarm(31, "a<b")])
    shutil.copy(BUILTIN_BRIDGE / CONFIG, run)
    with rc_context(STYLE):
        text = page(read_run(run))
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|@import|url\([^#]|<script|<link""", text)
    assert (
        'name="viewport"' in text
        and "<h1>&lt;run&gt;</h1>" in text
        and "<td>a&lt;b<td>a&lt;b &lt;&amp;&gt; said" in text
    )
    assert "<dt>matrix_learning_rate</dt>" in text and "<dt>code_version</dt>" in text
    figures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(figures) == len(panels_of(read_run(run))) == 10
    said = {element.text for svg in figures for element in ElementTree.fromstring(svg).iter(f"{SVG}text")}
    assert {"Loss, nats", "Learning rate", "memory", "optimiser step"} <= said


def test_a_run_without_a_checkpoint_or_with_a_damaged_one_is_drawn_too(tmp_path: Path) -> None:
    run = run_in(tmp_path, [record(1), record(2)])
    assert facts(read_run(run))["steps"] == "2"
    (run / CONFIG).write_text("{")
    assert read_run(run).manifest is None
    shutil.copy(BUILTIN_BRIDGE / CONFIG, run)
    assert re.fullmatch(r"2 of [\d,]+", facts(read_run(run))["steps"])


def test_a_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    run = run_in(tmp_path, [record(1), record(2)], [alarm(2, "memory")])
    for name in (LOG, EVENTS):
        with (run / name).open("a") as file:
            file.write('{"step": 3, "loss": 1.')
    log = read_run(run)
    assert ([r["step"] for r in log.records], len(log.events)) == ([1, 2], 1)


@pytest.mark.parametrize("content", [None, "", '{"step": 1', '[1]\n{"loss": 1.0}\n{"step": 1}\n'])
def test_a_folder_without_a_step_is_refused_by_name(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / LOG).write_text(content)
    with pytest.raises(InvalidRequest, match=rf"{re.escape(str(tmp_path))} holds no log\.jsonl") as caught:
        plot(tmp_path)
    assert caught.value.param == "run" and not (tmp_path / "curves.png").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    run = run_in(tmp_path / "run", [record(1)])
    with pytest.raises(InvalidRequest, match=r"--out .*log\.jsonl") as caught:
        plot(run, run / LOG)
    assert caught.value.param == "out"


def test_a_step_that_is_not_finite_is_a_gap_with_a_mark(tmp_path: Path) -> None:
    records = [record(step) for step in range(1, 41)]
    records[19] |= {"loss": math.nan, "losses": {"answer": math.inf, "kd": 1.0}, "refused": True}
    records[24] |= {"loss": math.nan}
    records[29] |= {"refused": True}
    log = read_run(run_in(tmp_path, records))
    loss = drawn(log, "Loss")
    assert curve(loss, "refused step")[0] == [20, 25, 30]
    steps, values = curve(loss, "answer")
    assert [step for step, value in zip(steps, values, strict=True) if math.isnan(value)] == [20]
    assert curve(drawn(log, "Gradient"), "refused step")[0] == [20, 25, 30] and facts(log)["refused steps"] == "3"


def test_a_long_curve_is_smoothed_over_its_raw_values_but_keeps_gaps_and_spikes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    records = [record(s, align=0, losses={"answer": 2 + rng.normal()}) for s in range(1, 3001)]
    records[1499] |= {"losses": {"answer": 99.0}}
    for refused in records[2000:2100]:
        refused |= {"losses": {"answer": math.nan}, "loss": math.nan, "refused": True}
    ax = drawn(read_run(run_in(tmp_path, records)), "Loss")
    steps, smooth = (np.array(values) for values in curve(ax, "answer"))
    gap = (steps > 2000) & (steps <= 2100)
    assert np.isnan(smooth[gap]).all() and np.isfinite(smooth[~gap]).all() and gap.sum() >= 5
    assert np.nanstd(smooth[steps < 1400]) < 0.3
    raw = [np.asarray(line.get_ydata()) for line in ax.get_lines() if str(line.get_label()).startswith("_")]
    assert max(np.nanmax(y) for y in raw if len(y) > 2) == 99 and all(len(y) <= 700 for y in [*raw, smooth])


def test_measures_of_the_answers_begin_after_the_shaded_warm_start(tmp_path: Path) -> None:
    log = read_run(run_in(tmp_path, [record(step) for step in range(1, 41)]))
    ax = drawn(log, "Right answers")
    assert curve(ax, "whole answer")[0] == list(range(11, 41))
    (shade,) = ax.patches
    assert (shade.get_x(), shade.get_x() + shade.get_width()) == (0.5, 10.5)  # type: ignore[attr-defined]
    assert curve(drawn(log, "Δ"), "Δ")[0] == [20, 40]
    assert not drawn(read_run(run_in(tmp_path, [record(s, align=0) for s in range(1, 9)])), "Loss").patches


def test_validations_stand_with_what_they_measure_and_the_best_is_said(tmp_path: Path) -> None:
    events = [validation(10, 0.2, best=True), validation(20, 0.7, best=True), validation(30, 0.6, best=False)]
    records = [record(step) for step in range(1, 41)]
    log = read_run(run_in(tmp_path, records, events))
    assert curve(drawn(log, "Right"), "validation em (best 0.700)") == ([10, 20, 30], [0.2, 0.7, 0.6])
    assert facts(log)["best validation"] == "em 0.700 at 20" and facts(log)["last validation"] == "em 0.600 at 30"
    assert best_of([validation(1, 2.0, best=False)])["step"] == 1
    both = [validation(20, 2.0, best=True, metric="loss"), validation(30, 0.5, best=True)]
    log = read_run(run_in(tmp_path, records, both))
    assert curve(drawn(log, "Loss"), "validation loss (best 2.000)") == ([20], [2.0])
    assert curve(drawn(log, "Right"), "validation em (best 0.500)") == ([30], [0.5])


def test_every_alarm_is_named_in_one_panel_and_marked_in_all(tmp_path: Path) -> None:
    names = [*(condition.name for condition in CONDITIONS), "of_tomorrow"]
    events = [alarm(3 * i + 5, name) for i, name in enumerate(names)]
    log = read_run(run_in(tmp_path, [record(step) for step in range(1, 41)], events))
    axes = [drawn(log, panel.title) for panel in panels_of(log)]
    assert sorted(name for ax in axes for name in names_in(ax)) == sorted(names)
    for ax in axes:
        vertical = [x[0] for line in ax.get_lines() if len(x := np.asarray(line.get_xdata())) == 2 and x[0] == x[1]]
        assert vertical == [event["step"] for event in events]


def test_names_of_alarms_stand_above_the_curves_and_within_the_axis(tmp_path: Path) -> None:
    events = [alarm(12, "one_output"), alarm(40, "one_output")]
    ax = drawn(read_run(run_in(tmp_path, [record(step) for step in range(1, 41)], events)), "Outputs")
    assert [text.get_horizontalalignment() for text in ax.texts] == ["left", "right"] and ax.get_ylim()[1] > 1.1


def test_the_phases_are_not_joined_and_named_once(tmp_path: Path) -> None:
    ax = drawn(read_run(run_in(tmp_path, [record(step) for step in range(1, 41)])), "Loss")
    assert curve(ax, "minimised")[0] == list(range(1, 11))
    assert list(range(11, 41)) in [np.asarray(line.get_xdata()).tolist() for line in ax.get_lines()]


def test_limits_of_alarms_are_drawn_where_they_are_near(tmp_path: Path) -> None:
    log = read_run(run_in(tmp_path, [record(step) for step in range(1, 41)]))
    assert curve(drawn(log, "Right"), "alarm limit")[1] == [0.1, 0.1]
    assert curve(drawn(log, "Memory"), "alarm limit")[1] == pytest.approx([75.2, 75.2])
    small = read_run(run_in(tmp_path, [record(s, peak_bytes=1e9, reserved_bytes=1, allocated_bytes=1) for s in (1, 2)]))
    assert "alarm limit" not in {line.get_label() for line in drawn(small, "Memory").get_lines()}


@pytest.mark.parametrize("logged, event, found", [(True, False, [7]), (False, True, [9]), (True, True, [7, 9])])
def test_running_out_of_memory_is_marked(tmp_path: Path, logged: bool, event: bool, found: list[int]) -> None:
    records = [record(step, out_of_memory_count=int(logged and step >= 7)) for step in range(1, 41)]
    events = [{"step": 9, "event": "out_of_memory", "message": "CUDA", "micro_batch": 16}] * event
    log = read_run(run_in(tmp_path, records, events))
    assert curve(drawn(log, "Memory"), "out of memory")[0] == found
    assert facts(log)["out of memory"] == str(len(found))


def test_a_loss_over_decades_has_a_logarithmic_axis_and_another_has_not(tmp_path: Path) -> None:
    falls = [record(step, align=0) for step in range(1, 41)]
    flat = [record(step, align=0, loss=2.0, losses={"answer": 1.5}) for step in range(1, 41)]
    zero = [record(step, align=0, losses={"margin": 0.0}) for step in range(1, 41)]
    scales = [drawn(read_run(run_in(tmp_path, run)), "Loss").get_yscale() for run in (falls, flat, zero)]
    assert scales == ["log", "linear", "linear"]


def shown_in(figure: Figure) -> list[Text]:
    """Every text that is drawn; labels of ticks beyond an axis' end are not."""
    beyond = set()
    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
        low, high = axis.get_view_interval()
        beyond |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    found = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    return [text for text in found if text.get_visible() and text.get_text().strip() and text not in beyond]


def test_no_words_overlap_and_none_leaves_the_picture(tmp_path: Path) -> None:
    losses = {
        name: 1.0 for name in ("answer", "first_k", "kd", "reconstruction", "continuation", "margin", "diversity")
    }
    records = [record(step, **({"losses": losses} if step > 100 else {"align": 100})) for step in range(1, 401)]
    records[200] |= {"refused": True, "out_of_memory_count": 1}
    names = [condition.name for condition in CONDITIONS]
    events = [alarm(step, name) for step in (110, 120, 130, 140, 390, 395, 400) for name in names]
    log = read_run(run_in(tmp_path, records, [*events, validation(400, 0.9, best=True)]))
    with rc_context(STYLE):
        single = Figure(figsize=SINGLE, layout="constrained")
        draw_panel(single.subplots(), panels_of(log)[0], log, SINGLE[0])
        for figure in (picture(log), single):
            figure.draw_without_rendering()
            texts = shown_in(figure)
            boxes = [text.get_window_extent() for text in texts]
            inside = figure.bbox.padded(1)
            assert len(boxes) > 20 and all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in boxes)
            clashes = [
                (texts[i].get_text(), texts[j].get_text())
                for i, one in enumerate(boxes) for j, other in enumerate(boxes[:i])
                if one.shrunk(0.9, 0.8).overlaps(other.shrunk(0.9, 0.8))
            ]  # fmt: skip
            assert clashes == []
