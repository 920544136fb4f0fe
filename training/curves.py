"""Draw what a run logged: a panel of a few curves, with the limits of the alarms and marks of what happened.

Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart; no panel has a second axis, so
that no line is read against the wrong one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from latentwire.bridge.config import Manifest

INK, GREY, SHADE = "#222222", "#8a8a8a", "#efefec"
BLUE, RED, GREEN, ORANGE, SKY, PINK = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
VEIL = {"facecolor": "white", "alpha": 0.8, "pad": 0.5, "linewidth": 0}  # behind words on a curve
SMOOTHED = 60  # a smoothed point is the mean of this fraction of a phase; shorter phases are drawn as they are
POINTS = 300  # a raw line is thinned to the extremes of so many intervals: more cannot be seen, only carried
DOTTED = 20  # so few points are seen better with a dot each
DECADE = 10  # lines that span this factor get a logarithmic axis
LABEL_ROWS = 3  # names of alarms that stand side by side take turns in so many rows
STYLE: Any = {
    "font.size": 9, "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "text.color": INK,
    "axes.edgecolor": GREY, "axes.labelcolor": INK, "xtick.color": GREY, "ytick.color": GREY, "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#e9e9e9", "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 8,
    "svg.fonttype": "none", "svg.hashsalt": "latentwire", "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
}  # fmt: skip
Record = dict[str, Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RunLog:
    """What a run's folder says: records of steps, events, and the checkpoint's manifest once there is one."""

    name: str
    records: list[Record]
    events: list[Record]
    manifest: Manifest | None

    def of(self, event: str) -> list[Record]:
        """Events of one kind."""
        return [e for e in self.events if e["event"] == event]

    def steps(self, holds: Callable[[Record], bool]) -> list[int]:
        """Steps whose records are so."""
        return [r["step"] for r in self.records if holds(r)]

    @property
    def refused(self) -> list[int]:
        return self.steps(lambda r: bool(r.get("refused")) or not math.isfinite(r["loss"]))

    @property
    def out_of_memory(self) -> list[int]:
        """Steps that ran out of memory: those of the events, and those where the records' count rises."""
        counts = [r.get("out_of_memory_count", 0) for r in self.records]
        rises = [r["step"] for r, old, new in zip(self.records[1:], counts, counts[1:], strict=False) if new > old]
        return sorted({*rises, *(e["step"] for e in self.of("out_of_memory"))})


@dataclass(frozen=True)
class Line:
    """One curve: a label, a colour, and how to read it from a record (None where it was not measured).

    An ``exact`` one is not noisy, and is drawn as it is.
    """

    label: str
    colour: str
    read: Callable[[Record], float | None]
    dashed: bool = False
    width: float = 1.5
    exact: bool = False


@dataclass(frozen=True)
class Panel:
    """A few curves on one axis, with the ``limit`` and the names of the ``alarms`` that watch them.

    The axis holds ``bottom`` and ends at ``top`` where they are given; ``marks`` adds what is no curve.
    """

    title: str
    lines: tuple[Line, ...]
    alarms: tuple[str, ...] = ()
    limit: float | None = None
    percent: bool = False
    bottom: float | None = None
    top: float | None = None
    marks: Callable[[Axes, RunLog], None] | None = None


def draw_panel(ax: Axes, panel: Panel, log: RunLog, width: float) -> None:
    """One panel ``width`` inches wide: curves, limit, marks; the legend stands above, where it hides nothing."""
    for line in panel.lines:
        _draw_line(ax, line, log)
    if panel.marks is not None:
        panel.marks(ax, log)
    _scale(ax, panel)
    first, last = log.records[0]["step"], log.records[-1]["step"]
    ax.set_xlim(first - 0.01 * (last - first) - 0.5, last + 0.02 * (last - first) + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(_number))
    ax.yaxis.set_major_formatter(FuncFormatter(_percent if panel.percent else _number))
    if aligned := log.steps(lambda record: record["phase"] == "align"):
        ax.axvspan(aligned[0] - 0.5, aligned[-1] + 0.5, color=SHADE, zorder=0, linewidth=0)
    _draw_alarms(ax, panel, log, width)
    _legend(ax, panel, width)


def _number(value: float, _: int) -> str:
    return f"{value:,.10g}"


def _percent(value: float, _: int) -> str:
    return f"{100 * value:.4g} %"


def _draw_line(ax: Axes, line: Line, log: RunLog) -> None:
    """A curve, smoothed over its faint raw values; the phases measure different things and are not joined."""
    label: str | None = line.label
    for phase in ("align", "answer"):
        read = [(r["step"], line.read(r)) for r in log.records if r["phase"] == phase]
        if not (points := [(step, value) for step, value in read if value is not None]):
            continue
        x, y = np.array(points, dtype=np.float64).T
        y = np.where(np.isfinite(y), y, np.nan)  # a gap, which mark_refused explains
        if line.exact:
            x, y = _thin(x, y)
        elif len(x) >= 2 * SMOOTHED:
            ax.plot(*_thin(x, y), color=line.colour, linewidth=0.6, alpha=0.22)
            y, every = _smooth(y, len(y) // SMOOTHED), max(1, len(y) // POINTS)
            x, y = x[::every], y[::every]
        dash, dot = "--" if line.dashed else "-", "." if len(x) <= DOTTED else ""
        ax.plot(x, y, dash, color=line.colour, linewidth=line.width, label=label, marker=dot)
        label = None


def _smooth(y: Floats, width: int) -> Floats:
    """Centred mean over ``width`` steps or a little more; what is not finite counts nowhere and stays a gap."""
    known, at, half = np.isfinite(y), np.arange(len(y)), (width + 1) // 2
    sums = [np.concatenate([[0.0], np.cumsum(values)]) for values in (np.where(known, y, 0.0), known)]
    above, below = np.minimum(at + half + 1, len(y)), np.maximum(at - half, 0)
    total, count = (s[above] - s[below] for s in sums)
    return np.where(known, total / np.maximum(count, 1), np.nan)


def _thin(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """The lowest and highest value of each of ``POINTS`` intervals: spikes stay, the file stays small."""
    each = -(-len(x) // POINTS)
    if each < 4:
        return x, y
    starts = np.arange(0, len(x), each)
    extremes = np.stack([np.fmin.reduceat(y, starts), np.fmax.reduceat(y, starts)], axis=1)
    return np.repeat(x[starts], 2), extremes.ravel()


def _scale(ax: Axes, panel: Panel) -> None:
    """Choose the axis: fixed, logarithmic where that says more, or linear; and draw the alarms' limit if it is near."""
    if panel.top is not None:
        ax.set_ylim(-0.03 * panel.top, 1.03 * panel.top)
        ax.set_yticks(np.linspace(0, panel.top, 5))
    elif panel.bottom is None:
        values = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in ax.get_lines()])
        values = np.append(values[np.isfinite(values)], panel.limit or [])
        if len(values) and values.min() > 0 and values.max() / values.min() >= DECADE:
            _logarithmic(ax)
    else:
        ax.set_ylim(bottom=min(panel.bottom, ax.get_ylim()[0]))
    if panel.limit is not None and (ax.get_yscale() == "log" or panel.limit <= 2 * ax.get_ylim()[1]):
        ax.axhline(panel.limit, color=RED, linewidth=0.9, linestyle=":", label="alarm limit")


def _logarithmic(ax: Axes) -> None:
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    decades = math.log10(high / low)
    subs = (1.0, 2.0, 5.0) if decades < 1.7 else (1.0, 3.0) if decades < 3.5 else (1.0,)
    ax.yaxis.set_major_locator(LogLocator(subs=subs))
    ax.yaxis.set_minor_locator(NullLocator())


def mark_refused(ax: Axes, log: RunLog) -> None:
    _mark(ax, log.refused, "x", "refused step")


def mark_memory(ax: Axes, log: RunLog) -> None:
    _mark(ax, log.out_of_memory, "v", "out of memory")


def _mark(ax: Axes, steps: list[int], marker: str, label: str) -> None:
    if steps:
        low = [0.05] * len(steps)
        ax.plot(steps, low, marker, color=RED, markersize=5, transform=ax.get_xaxis_transform(), label=label)


def mark_loss(ax: Axes, log: RunLog) -> None:
    _mark_validations(ax, [event for event in log.of("validation") if event["metric"] == "loss"])
    mark_refused(ax, log)
    if log.steps(lambda record: record["phase"] == "align"):
        ax.plot([], [], color=SHADE, linewidth=7, label="warm start (1 - cosine)")


def mark_answers(ax: Axes, log: RunLog) -> None:
    _mark_validations(ax, [event for event in log.of("validation") if event["metric"] != "loss"])


def mark_zero(ax: Axes, _: RunLog) -> None:
    ax.axhline(0, color=GREY, linewidth=0.8)


def _mark_validations(ax: Axes, events: list[Record]) -> None:
    if not events:
        return
    x, y, best = [e["step"] for e in events], [e["value"] for e in events], best_of(events)
    label = f"validation {best['metric']} (best {best['value']:.3f})"
    ax.plot(x, y, "D-", color=INK, markersize=3.5, linewidth=0.7, label=label, zorder=4)
    ax.plot(best["step"], best["value"], "o", markersize=10, markerfacecolor="none", color=INK, zorder=4)


def _draw_alarms(ax: Axes, panel: Panel, log: RunLog, width: float) -> None:
    """A line where an alarm began; in the panel it is about also its name, in rows above the curves."""
    low, high = ax.get_xlim()
    per_letter = (high - low) * 0.068 / (width - 0.6)
    ends = [-math.inf] * LABEL_ROWS
    named: list[tuple[float, int, str, bool]] = []
    for alarm in sorted(log.of("alarm"), key=lambda event: float(event["step"])):
        x, own, span = alarm["step"], alarm["name"] in panel.alarms, per_letter * (len(alarm["name"]) + 2)
        ax.axvline(x, color=RED, linewidth=0.9 if own else 0.5, alpha=0.9 if own else 0.3, zorder=1)
        left = x + span > high
        start = x - span if left else x
        row = next((i for i, end in enumerate(ends) if end < start), None)
        if own and row is not None:
            ends[row] = start + span
            named.append((x, row, alarm["name"], left))
    if named:
        _make_room(ax, 0.03 + 0.1 * (1 + max(row for _, row, _, _ in named)))
    for x, row, name, left in named:
        ax.annotate(
            name, (x, 0.99 - 0.1 * row), (-3 if left else 3, 0), xycoords=ax.get_xaxis_transform(), zorder=5,
            textcoords="offset points", ha="right" if left else "left", va="top", fontsize=7.5, color=RED,
            bbox=VEIL,
        )  # fmt: skip


def _make_room(ax: Axes, share: float) -> None:
    """Raise the top of an axis so that the curves leave this share of its height free."""
    low, high = ax.get_ylim()
    if ax.get_yscale() == "log":
        ax.set_ylim(low, low * (high / low) ** (1 / (1 - share)))
    else:
        ax.set_ylim(low, low + (high - low) / (1 - share))


def _legend(ax: Axes, panel: Panel, width: float) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) < 2:
        ax.set_title(panel.title, pad=6)
        return
    rows = next(n for n in range(1, len(labels) + 1) if n == len(labels) or _inches(labels, n) <= width - 0.6)
    ax.set_title(panel.title, pad=8 + 12 * rows)
    legend = ax.legend(
        handles, labels, ncols=-(-len(labels) // rows), loc="lower left", bbox_to_anchor=(-0.01, 1.015),
        borderaxespad=0, borderpad=0.1, handlelength=1.6, handletextpad=0.5, columnspacing=1.2, labelspacing=0.25,
    )  # fmt: skip
    legend.set_in_layout(False)  # the title's pad holds its place


def _inches(labels: Sequence[str], rows: int) -> float:
    """Width of a legend; a column, filled downwards, is as wide as its longest label, its line and a space."""
    columns = (labels[i : i + rows] for i in range(0, len(labels), rows))
    return sum(0.4 + 0.068 * max(map(len, column)) for column in columns)


def best_of(validations: Sequence[Record]) -> Record:
    """The last that was the best so far: a better one can only have come later."""
    return next((event for event in reversed(validations) if event.get("best")), validations[-1])
