"""Where things stand in a plot: in their order, inside it, and no label on another."""

import itertools

import pytest

from latentwire.bridge.evaluation.plots import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Point,
    _box,
    against,
    kept,
    scattered,
)


def test_scores_stand_by_value_and_sizes_by_their_logarithm() -> None:
    plot = against("t", "x", [Point(f"{x:g}", 0, x, x / 100, x / 200, 1.5) for x in (1.0, 10.0, 100.0)])
    assert plot is not None
    first, second, third = plot.marks
    assert second.x - first.x == pytest.approx(third.x - second.x, abs=0.2) and first.x < second.x
    assert third.y == TOP and first.y == pytest.approx(HEIGHT - BOTTOM, abs=4)
    assert all(mark.high == TOP for mark in plot.marks)  # an end outside the scale is drawn at its edge
    assert third.low == pytest.approx((TOP + HEIGHT - BOTTOM) / 2, abs=0.1)
    ticks = {text: x for x, text in plot.x_ticks}
    assert ticks["10"] == second.x and [text for _, text in plot.y_ticks] == ["0", "0.25", "0.5", "0.75", "1"]


@pytest.mark.parametrize("sizes", [(4.0,), (1.0, 3.0), (3.0, 4.0), (90.0, 3e3), (0.02, 0.5), (1.0, 1e6)])
def test_an_axis_has_a_few_round_numbers_within_it(sizes: tuple[float, ...]) -> None:
    plot = against("t", "x", [Point("a", 0, size, 0.5) for size in sizes])
    assert plot is not None and 2 <= len(plot.x_ticks) <= 7
    places = [x for x, _ in plot.x_ticks]
    assert places == sorted(places) and LEFT <= places[0] and places[-1] <= WIDTH - RIGHT
    assert all(float(text.replace(",", "")) >= min(sizes) / 1.5 for _, text in plot.x_ticks)


def test_labels_hide_neither_each_other_nor_the_marks_and_each_is_said_once() -> None:
    places = (("bridge a", 4.0), ("bridge b", 4.5), ("text", 40.0), ("text", 60.0))
    plot = against("t", "x", [Point(name, 0, x, 0.95, 0.9, 1.0) for name, x in places])
    assert plot is not None and len(plot.marks) == 4
    boxes = [_box(mark) for mark in plot.marks if mark.label is not None]
    assert len(boxes) == 3
    boxes += [(mark.x - 5, mark.y - 5, mark.x + 5, mark.y + 5) for mark in plot.marks if mark.point.x != 4.5]
    for one, other in itertools.combinations(boxes, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    assert all(box[0] >= 0 and box[2] <= WIDTH for box in boxes)


def test_what_was_not_measured_has_no_plot_and_what_is_said_twice_is_drawn_once() -> None:
    assert against("t", "x", []) is None
    plot = against("t", "x", [Point("text", 1, 1.0, 0.5)] * 2)
    assert plot is not None and len(plot.marks) == 1


def test_a_plane_has_one_unit_and_the_rarer_groups_are_drawn_last() -> None:
    plot = scattered(
        "t", ("x", "y"), [(0.0, 0.0), (2.0, 0.0), (0.0, 1.0), (-2.0, -1.0)], ["few", "many", "many", "many"]
    )
    assert plot.key == [(0, "many"), (1, "few")]
    *_, few = plot.marks
    assert few.point.label == "few" and (few.x, few.y) == ((LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2)
    right, up, _ = plot.marks[:3]
    assert (right.x - few.x) == pytest.approx(2 * (few.y - up.y), abs=0.2)
    assert all(LEFT <= mark.x <= WIDTH - RIGHT and TOP <= mark.y <= HEIGHT - BOTTOM for mark in plot.marks)


def test_what_is_kept_is_drawn_on_linear_axes_with_the_chosen_point_named() -> None:
    curve = [Point("", 1, x, value) for x, value in ((0.5, 1.0), (1.0, 0.88))]
    plot = kept("kept", curve, Point("the gate", 0, 0.75, 0.95, 0.92, 0.97))
    half, whole, gate = plot.marks
    assert (half.x + whole.x) / 2 == pytest.approx(gate.x, abs=0.1) and half.y < gate.y < whole.y
    assert gate.label is not None and half.label is whole.label is None
    assert gate.high is not None and gate.low is not None and gate.high < gate.y < gate.low
    assert plot.y_ticks[0][1] == "0.85" and plot.y_ticks[-1] == (half.y, "1")
    assert plot.x_ticks[2] == (half.x, "50%")
