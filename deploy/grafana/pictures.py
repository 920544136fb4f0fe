"""Draws the dashboards from a Prometheus: ``python -m deploy.grafana.pictures http://127.0.0.1:9090 --minutes 5``.

For where no Grafana is at hand: the panels' own queries, over a range of time, on the dashboard's grid.
"""

import math
import re
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import EngFormatter, PercentFormatter

from deploy.grafana.build import limit
from deploy.grafana.dashboards import DASHBOARDS, Board, Panel

HERE = Path(__file__).parent
VARIABLES = {"$instance": ".*", "$bridge": ".*", "$__rate_interval": "30s"}
ACROSS, MOST_LINES = 3, 9
UNITS = {"s": EngFormatter("s", sep=" "), "bytes": EngFormatter("B", sep=" "), "percentunit": PercentFormatter(1.0)}

Range = tuple[float, float, float]


def asked(client: httpx.Client, expression: str, over: Range) -> list[dict[str, Any]]:
    """The series of a query over a range: start, end and step in seconds."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    start, end, step = over
    given = {"query": expression, "start": start, "end": end, "step": step}
    answer = client.get("/api/v1/query_range", params=given).raise_for_status().json()
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found


def legend(template: str, labels: dict[str, str]) -> str:
    """A legend with its labels filled in."""
    for name, value in labels.items():
        template = template.replace(f"{{{{{name}}}}}", value)
    return re.sub(r"\{\{\w+\}\}", "", template).strip()  # of a label that is empty


def draw(axes: Axes, panel: Panel, client: httpx.Client, over: Range) -> None:
    """One panel."""
    axes.set_title(panel.title, fontsize=9, loc="left")
    lines = 0
    for expression, template in panel.queries:
        for series in asked(client, expression, over):
            at = [datetime.fromtimestamp(float(second)) for second, _ in series["values"]]
            values = [float(value) for _, value in series["values"]]
            label = legend(template, series["metric"]) if lines < MOST_LINES else None
            if not all(map(math.isnan, values)):
                axes.plot(at, values, linewidth=1.2, label=label)
                lines += 1
    if panel.alert is not None and lines:
        sign, value = limit(*panel.alert)
        axes.axhline(value, color="tab:red", linewidth=0.8, linestyle="--", label=f"alert {sign} {value:g}")
    if lines:
        axes.set_ylim(0, 1.05 * axes.dataLim.ymax or 1)
        axes.legend(fontsize=6, frameon=False, loc="upper left")
    else:
        axes.text(0.5, 0.5, "no data", ha="center", va="center", transform=axes.transAxes, color="grey")
    axes.yaxis.set_major_formatter(UNITS.get(panel.unit, EngFormatter(sep="")))
    axes.tick_params(labelsize=6)
    axes.grid(alpha=0.25)


def drawn(board: Board, client: httpx.Client, over: Range) -> Figure:
    """A dashboard, row by row."""
    heights = [-(-len(row.panels) // ACROSS) for row in board.rows]
    figure = Figure(figsize=(14, 2.6 * sum(heights) + 0.6), layout="constrained")
    figure.suptitle(f"{board.title}, {datetime.fromtimestamp(over[1]):%Y-%m-%d %H:%M}", fontsize=12)
    grid, top = GridSpec(sum(heights), ACROSS, figure), 0
    for row, height in zip(board.rows, heights, strict=True):
        for number, panel in enumerate(row.panels):
            draw(figure.add_subplot(grid[top + number // ACROSS, number % ACROSS]), panel, client, over)
        top += height
    return figure


def main(
    address: Annotated[str, typer.Argument(help="Of a Prometheus that scrapes a service.")],
    minutes: Annotated[float, typer.Option(help="How much of the past is shown.")] = 30.0,
    folder: Annotated[Path, typer.Option(help="Where the pictures go.")] = HERE,
) -> None:
    """Draw every dashboard into NAME.png."""
    end = time.time()
    over = (end - 60 * minutes, end, max(60 * minutes / 240, 1.0))
    with httpx.Client(base_url=address, trust_env=False, timeout=60) as client:
        for board in DASHBOARDS:
            drawn(board, client, over).savefig(folder / f"{board.name}.png", dpi=80)


if __name__ == "__main__":
    typer.run(main)
