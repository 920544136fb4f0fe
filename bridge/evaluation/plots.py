"""Where things stand in a plot of a page: positions in pixels of its drawing, for ``plots.html`` to draw."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

WIDTH, HEIGHT = 380, 280
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 46  # of the drawing, around the plot
LETTER, LINE = 6.3, 14  # about the width and height of a letter of a label
CLEAR = 7  # from a mark's middle to what stands beside it
GROUPS = 7  # colours and shapes that can be told apart
Box = tuple[float, float, float, float]

SHAPES = (
    "M-5,0A5,5 0 1 1 5,0A5,5 0 1 1 -5,0Z",  # circle
    "M-4.5,-4.5H4.5V4.5H-4.5Z",  # square
    "M0,-6L5.5,4H-5.5Z",  # triangle
    "M0,-6L6,0L0,6L-6,0Z",  # diamond
    "M0,6L5.5,-4H-5.5Z",  # triangle that points down
    "M-1.8,-5.5H1.8V-1.8H5.5V1.8H1.8V5.5H-1.8V1.8H-5.5V-1.8H-1.8Z",  # plus
    "M-5.5,-2.5H5.5V2.5H-5.5Z",  # bar
)
"""Outlines around a mark's middle: colour alone tells not everybody two groups apart."""


@dataclass(frozen=True)
class Point:
    """A figure to plot: ``value`` with its interval, where there is one, against ``x`` (above 0)."""

    label: str
    kind: int
    x: float
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Mark:
    """A point where it is drawn, its interval, and where its label begins, is centred, or ends (``anchor``)."""

    point: Point
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: tuple[float, float] | None = None
    anchor: Literal["start", "middle", "end"] = "start"


@dataclass(frozen=True)
class Plot:
    """Marks and the ticks of both axes; ``key`` names the shapes that no label explains."""

    title: str
    x_title: str
    y_title: str
    marks: Sequence[Mark]
    x_ticks: Sequence[tuple[float, str]] = ()
    y_ticks: Sequence[tuple[float, str]] = ()
    key: Sequence[tuple[int, str]] = ()


def against(title: str, x_title: str, points: Sequence[Point]) -> Plot | None:
    """Scores from 0 to 1 against something on a logarithmic axis, each with its label; None without any point."""
    points = list(dict.fromkeys(points))
    if not points:
        return None
    low, high = min(point.x for point in points), max(point.x for point in points)
    start, end = math.log(low / 1.4), math.log(high * 1.4)

    def across(x: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (math.log(x) - start) / (end - start), 1)

    def up(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(max(value, 0.0), 1.0), 1)

    marks = [
        Mark(p, across(p.x), up(p.value), None if p.low is None else up(p.low), None if p.high is None else up(p.high))
        for p in points
    ]
    ticks = [(across(x), f"{x:,.10g}") for x in _ticks(math.exp(start), math.exp(end))]
    scale = [(up(value), f"{value:g}") for value in (0.0, 0.25, 0.5, 0.75, 1.0)]
    return Plot(title, x_title, "score", _labelled(marks), ticks, scale)


def kept(title: str, curve: Sequence[Point], chosen: Point) -> Plot:
    """A share that is kept, near 1, against a share ``x``, both linear; ``chosen`` has a label and its interval."""
    points = [*curve, chosen]
    ends = [p.value for p in points] + [end for end in (chosen.low, chosen.high) if end is not None]
    low, high = math.floor(min(ends) * 20) / 20, max(1.0, math.ceil(max(ends) * 20) / 20)
    low = min(low, high - 0.05)

    def across(x: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * x, 1)

    def up(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low), 1)

    marks = [Mark(p, across(p.x), up(p.value)) for p in curve]
    bottom, top = (None if end is None else up(end) for end in (chosen.low, chosen.high))
    place = _labelled([Mark(chosen, across(chosen.x), up(chosen.value), bottom, top)])
    x_ticks = [(across(share), f"{share:.0%}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    y_ticks = [(up(value), f"{value:.3g}") for value in (low, (low + high) / 2, high)]
    return Plot(title, "answers from latents", "kept of the text's score", [*marks, *place], x_ticks, y_ticks)


def scattered(title: str, titles: tuple[str, str], points: Sequence[Sequence[float]], groups: Sequence[str]) -> Plot:
    """Points in a plane whose axes have no unit; their groups by size, the smallest of too many together."""
    names = [name for name, _ in Counter(groups).most_common()]
    if len(names) > GROUPS:
        names = [*names[: GROUPS - 1], "others"]
    kinds = {name: kind for kind, name in enumerate(names)}
    half = (WIDTH - LEFT - RIGHT) / 2, (HEIGHT - TOP - BOTTOM) / 2
    unit = min(size / (1.06 * max(1e-9, *(abs(p[axis]) for p in points))) for axis, size in enumerate(half))
    marks = [
        Mark(
            Point(name, kinds.get(name, GROUPS - 1), x, y),
            round(LEFT + half[0] + unit * x, 1),
            round(TOP + half[1] - unit * y, 1),
        )
        for (x, y), name in zip(points, groups, strict=True)
    ]
    marks.sort(key=lambda mark: mark.point.kind)  # the smaller groups are not hidden
    return Plot(title, *titles, marks, key=[(kind, name) for name, kind in kinds.items()])


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers of a logarithmic axis: as fine as leaves two to six of them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(step / 10 for step in range(10, 100))):
        finer = [10.0**power * step for power in powers for step in steps if low <= 10.0**power * step <= high]
        if len(found) >= 2 and len(finer) > 6:
            break
        found = finer
    return found[:: max(1, len(found) // 6)]


def _labelled(marks: Sequence[Mark]) -> list[Mark]:
    """The marks with their labels where these hide least; of several with the same label, the first has it."""
    taken: list[Box] = [(m.x - CLEAR, m.y - CLEAR, m.x + CLEAR, m.y + CLEAR) for m in marks]
    # An interval is a thin obstacle of its own.
    taken += [(m.x - 2, m.high, m.x + 2, m.low) for m in marks if m.low is not None and m.high is not None]
    said: set[str] = set()
    made = []
    for mark in marks:
        if mark.point.label in said:
            made.append(mark)
            continue
        said.add(mark.point.label)
        placed = min(_places(mark), key=lambda place: _hidden(_box(place), taken))
        taken.append(_box(placed))
        made.append(placed)
    return made


def _places(mark: Mark) -> list[Mark]:
    """Where a label can stand, the best place first."""
    x, y, beside = mark.x, mark.y, CLEAR + 2
    places: list[tuple[float, float, Literal["start", "middle", "end"]]] = [
        (x + beside, y + 4, "start"), (x - beside, y + 4, "end"),
        (x + beside, y + 4 + LINE, "start"), (x - beside, y + 4 + LINE, "end"),
        (x + beside, y + 4 - LINE, "start"), (x - beside, y + 4 - LINE, "end"),
        (x, y + beside + LINE, "middle"), (x, y - beside - 2, "middle"),
        (x + beside, y + 4 + 2 * LINE, "start"), (x - beside, y + 4 + 2 * LINE, "end"),
    ]  # fmt: skip
    return [replace(mark, label=(round(at, 1), round(base, 1)), anchor=anchor) for at, base, anchor in places]


def _box(mark: Mark) -> Box:
    assert mark.label is not None
    (x, base), width = mark.label, LETTER * len(mark.point.label)
    left = x - {"start": 0.0, "middle": width / 2, "end": width}[mark.anchor]
    return left, base - LINE + 3, left + width, base + 3


def _hidden(box: Box, taken: Sequence[Box]) -> float:
    """Area of a label that lies on something else or outside the drawing."""
    left, top, right, bottom = box
    inside = max(0.0, min(right, WIDTH) - max(left, LEFT)) * max(0.0, min(bottom, HEIGHT - BOTTOM) - max(top, 0))
    outside = (right - left) * (bottom - top) - inside
    return 3 * outside + sum(
        max(0.0, min(right, other[2]) - max(left, other[0])) * max(0.0, min(bottom, other[3]) - max(top, other[1]))
        for other in taken
    )
