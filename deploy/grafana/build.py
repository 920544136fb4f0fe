"""Makes the dashboards: ``python -m deploy.grafana.build`` writes deploy/grafana/dashboards/.

A dashboard is data, in ``dashboards.py``; what a number means when it is bad stands in the alert rules alone.
"""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import GraphThresholdsStyleMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
)

from deploy.grafana.dashboards import DASHBOARDS, Board, Panel

HERE = Path(__file__).parent
RULES = HERE.parent / "prometheus" / "rules.yml"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
WIDTH, HEIGHT, COLUMNS = 8, 8, 24


@cache
def _rules() -> dict[str, str]:
    rules = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
    return {rule["alert"]: rule["expr"] for rule in rules}


def limit(alert: str, of: str = "") -> tuple[str, float]:
    """The comparison and the number of an alert rule, the first after ``of`` stands in it.

    Raises:
        AssertionError: There is none.
    """
    found = re.search(rf"{re.escape(of)}.*?(==|>=?|<=?) ([\d.]+)", _rules()[alert], re.DOTALL)
    assert found, f"{alert} compares nothing with a number after {of!r}"
    return found[1], float(found[2])


def _steps(panel: Panel) -> list[Threshold]:
    if panel.alert is None:
        return [Threshold(value=None, color="green")]
    sign, value = limit(*panel.alert)
    if (sign, value) == ("==", 0):
        return [Threshold(value=None, color="red"), Threshold(value=1, color="green")]
    bad_below = sign.startswith("<")
    colours = ("red", "transparent") if bad_below else ("transparent", "red")
    return [Threshold(value=None, color=colours[0]), Threshold(value=value, color=colours[1])]


def _built(panel: Panel) -> Any:
    made: Any = stat.Panel() if panel.kind == "stat" else timeseries.Panel()
    made.title(panel.title).description(panel.meaning).unit(panel.unit).datasource(SOURCE)
    made.height(HEIGHT).span(panel.width or WIDTH)
    made.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(_steps(panel)))
    if panel.kind == "lines":
        made.fill_opacity(10).min(0)
        style = GraphThresholdsStyleMode.OFF if panel.alert is None else GraphThresholdsStyleMode.LINE_AND_AREA
        made.thresholds_style(common.GraphThresholdsStyleConfig().mode(style))
    for letter, (expression, legend) in zip("ABCDEF", panel.queries, strict=False):
        query = prometheus.Dataquery().ref_id(letter).expr(expression).legend_format(legend).datasource(SOURCE)
        made.with_target(query)
    return made


def _variable(name: str, query: str) -> dashboard.QueryVariable:
    every = VariableOption(text="All", value="$__all", selected=True)
    made = dashboard.QueryVariable(name).datasource(SOURCE).query(query).refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
    return made.include_all(True).all_value(".*").multi(True).current(every)


def built(board: Board) -> dict[str, Any]:
    """A dashboard as Grafana reads it."""
    made = dashboard.Dashboard(board.title).uid(board.name).tags(["latentwire"]).readonly().refresh("10s")
    made.time("now-30m", "now").timezone("browser").tooltip(DashboardCursorSync.CROSSHAIR)
    made.link(dashboard.DashboardLink("LatentWire").type("dashboards").tags(["latentwire"]).as_dropdown(False))
    source = VariableOption(text="Prometheus", value="prometheus", selected=True)
    made.with_variable(dashboard.DatasourceVariable("datasource").type("prometheus").current(source))
    made.with_variable(_variable("instance", "label_values(latentwire_ready, instance)"))
    made.with_variable(_variable("bridge", "label_values(latentwire_output_window, bridge)"))
    for row in board.rows:
        made.with_row(dashboard.Row(row.title))
        for panel in row.panels:
            made.with_panel(_built(panel))
    plain: dict[str, Any] = json.loads(json.dumps(made.build(), cls=JSONEncoder, sort_keys=True))
    for number, panel in enumerate(plain["panels"], 1):
        panel["id"] = number
    return plain


def files() -> Iterator[tuple[Path, str]]:
    """Every file and what is in it."""
    for board in DASHBOARDS:
        yield HERE / "dashboards" / f"{board.name}.json", json.dumps(built(board), indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    for path, text in files():
        path.write_text(text)
