"""``latentwire plot``: the curves of a run, finished or not, as one picture and as one page. No display, no network."""

import io
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from textwrap import fill

from jinja2 import Environment, FileSystemLoader
from matplotlib import rc_context
from matplotlib.figure import Figure

from latentwire.bridge.config import parse_manifest
from latentwire.bridge.errors import CorruptCheckpoint, InvalidRequest
from latentwire.training.alarms import DELTA_NATS, FIRST_TOKEN_TOP1, MEMORY_SHARE
from latentwire.training.curves import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PINK,
    RED,
    SKY,
    STYLE,
    Line,
    Panel,
    Record,
    RunLog,
    best_of,
    draw_panel,
    mark_answers,
    mark_loss,
    mark_memory,
    mark_refused,
    mark_zero,
)
from latentwire.training.journal import EVENTS, LOG, read_jsonl

CONFIG = "config.json"  # not imported: what writes it needs torch
PICTURE, PAGE = "curves.png", "curves.html"
TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
PARTS = (BLUE, ORANGE, GREEN, PINK, SKY, GREY, RED)
PAIR, SINGLE = (6.2, 2.6), (4.6, 2.8)  # inches of a panel: two in a row of the picture; alone, as wide as a phone
METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}  # the same log gives the same page


def plot(run: Path, out: Path | None = None) -> list[Path]:
    """Draw a run into ``out``, its own folder when None; returns the two files written.

    ``curves.png`` is one picture. ``curves.html`` is one page with the same panels under the run's facts, alarms and
    configuration; it needs no network, and its panels stand one below the other on a phone.

    Raises:
        InvalidRequest: ``run`` holds no log with a finished step, or ``out`` cannot be written.
    """
    log, out = read_run(run), out or run
    try:
        out.mkdir(parents=True, exist_ok=True)
        with rc_context(STYLE):
            picture(log).savefig(out / PICTURE, dpi=150)
            (out / PAGE).write_text(page(log), encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"--out {out}: {error.strerror}", param="out") from None
    return [out / PICTURE, out / PAGE]


def read_run(folder: Path) -> RunLog:
    """Read a run's logs; what a killed run left of a line is left out.

    Raises:
        InvalidRequest: There is no log, or no step in it.
    """
    records = [line for line in read_jsonl(folder / LOG) if isinstance(line.get("loss"), float | int)]
    if not records:
        raise InvalidRequest(f"{folder} holds no {LOG} with a finished step: expected the folder of a run", param="run")
    events = [line for line in read_jsonl(folder / EVENTS) if isinstance(line.get("event"), str)]
    manifest = None
    with suppress(OSError, CorruptCheckpoint):  # a run is drawn before its first checkpoint, or beside a damaged one
        manifest = parse_manifest((folder / CONFIG).read_bytes(), str(folder / CONFIG))
    return RunLog(folder.resolve().name, records, events, manifest)


def _key(name: str, scale: float = 1.0) -> Callable[[Record], float | None]:
    def read(record: Record) -> float | None:
        value: float | None = record.get(name)
        return None if value is None else value * scale

    return read


def _part(name: str) -> Callable[[Record], float | None]:
    return lambda record: record.get("losses", {}).get(name)


def _of_seconds(name: str) -> Callable[[Record], float | None]:
    return lambda record: record[name] / max(record["seconds"], 1e-9) if name in record else None


PANELS = (
    Panel(
        "Right answers, teacher-forced",
        (
            Line("first token in top 5", SKY, _key("first_token_top5")),
            Line("first token", ORANGE, _key("first_token_top1")),
            Line("whole answer", BLUE, _key("accuracy")),
        ),
        ("first_token",), limit=FIRST_TOKEN_TOP1, percent=True, top=1.0, marks=mark_answers,
    ),
    Panel(
        "Entropy of the first answer token, nats",
        (
            Line("said", BLUE, _key("entropy_nats")),
            Line("wanted", GREY, _key("wanted_entropy_nats"), dashed=True),
        ),
        ("low_entropy",), bottom=0.0,
    ),
    Panel(
        "Outputs of a batch",
        (
            Line("distinct", GREEN, _key("distinct_ratio")),
            Line("commonest", BLUE, _key("top_share")),
            Line("commonest wanted", GREY, _key("wanted_top_share"), dashed=True),
        ),
        ("one_output",), percent=True, top=1.0,
    ),
    Panel(
        "Δ: cost of another text's latent, nats", (Line("Δ", BLUE, _key("delta_nats")),),
        ("flat_delta",), limit=DELTA_NATS, bottom=0.0, marks=mark_zero,
    ),
    Panel(
        "Gradient norm before clipping", (Line("norm", BLUE, _key("gradient_norm")),),
        ("gradient_norm",), marks=mark_refused,
    ),
    Panel("Learning rate", (Line("rate", BLUE, _key("learning_rate"), exact=True),), bottom=0.0),
    Panel("Throughput, tokens/s", (Line("tokens/s", BLUE, _of_seconds("tokens")),), bottom=0.0),
    Panel(
        "Time spent waiting for data", (Line("share", BLUE, _of_seconds("data_wait_seconds")),),
        percent=True, bottom=0.0,
    ),
)  # fmt: skip


def panels_of(log: RunLog) -> list[Panel]:
    """What is drawn, in reading order; the parts of the loss are those that were on."""
    parts = dict.fromkeys(name for record in log.records[::-1] for name in record.get("losses", {}))  # answers first
    device = max(record.get("device_bytes", 0) for record in log.records) / 1e9
    known = {name for panel in PANELS for name in panel.alarms} | {"memory"}
    rest = sorted({alarm["name"] for alarm in log.of("alarm")} - known)
    lines = [Line(name, PARTS[i % len(PARTS)], _part(name)) for i, name in enumerate(parts)]
    minimised = Line("minimised", INK, _key("loss"), width=2.4)
    loss = Panel("Loss, nats", (minimised, *lines), ("loss_plateau", "non_finite", *rest), marks=mark_loss)
    memory = Panel(
        "Memory, GB" + (f" (the device has {device:.3g})" if device else ""),
        (
            Line("peak", INK, _key("peak_bytes", 1e-9), exact=True),
            Line("reserved", BLUE, _key("reserved_bytes", 1e-9)),
            Line("allocated", SKY, _key("allocated_bytes", 1e-9)),
        ),
        ("memory",), limit=MEMORY_SHARE * device or None, bottom=0.0, marks=mark_memory,
    )  # fmt: skip
    return [loss, *PANELS, memory]


def picture(log: RunLog) -> Figure:
    """All panels in one figure, two in a row."""
    panels = panels_of(log)
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(2 * PAIR[0], rows * PAIR[1] + 0.7), layout="constrained")
    axes = figure.subplots(rows, 2, gridspec_kw={"wspace": 0.06, "hspace": 0.04}).flatten()
    for panel, ax in zip(panels, axes, strict=True):
        draw_panel(ax, panel, log, PAIR[0])
    for ax in axes[-2:]:
        ax.set_xlabel("optimiser step")
    subtitle = fill(" · ".join(f"{name}\N{NO-BREAK SPACE}{value}" for name, value in facts(log).items()), 130)
    figure.suptitle(f"{log.name}\n{subtitle}", x=0.01, ha="left", fontsize=11, linespacing=1.6)
    return figure


def facts(log: RunLog) -> dict[str, str]:
    """The run in a few words, for a heading."""
    steps, seconds = f"{log.records[-1]['step']:,}", sum(record.get("seconds", 0.0) for record in log.records)
    planned = "" if log.manifest is None else f" of {log.manifest.bridge.provenance.steps:,}"
    losses = [record["loss"] for record in log.records if math.isfinite(record["loss"])]
    rates = [rate for record in log.records if (rate := _of_seconds("tokens")(record)) is not None]
    validations = log.of("validation")
    found = {
        "steps": steps + planned,
        "time": f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min",
        "last loss": f"{losses[-1]:.4g}" if losses else "",
        "last validation": _validation(validations[-1]) if validations else "",
        "best validation": _validation(best_of(validations)) if validations else "",
        "tokens/s": f"{median(rates):,.0f}" if rates else "",
    }
    counts = {
        "alarms": len(log.of("alarm")),
        "refused steps": len(log.refused),
        "out of memory": len(log.out_of_memory),
    }
    return {name: str(value) for name, value in {**found, **counts}.items() if value}


def _validation(event: Record) -> str:
    return f"{event['metric']} {event['value']:.3f} at {event['step']:,}"


def page(log: RunLog) -> str:
    """The panels as one HTML page (``curves.html``) that fetches nothing."""
    panels = []
    for panel in panels_of(log):
        figure = Figure(figsize=SINGLE, layout="constrained")
        ax = figure.subplots()
        draw_panel(ax, panel, log, SINGLE[0])
        ax.set_xlabel("optimiser step")
        panels.append((panel.title, _svg(figure)))
    provenance = log.manifest.bridge.provenance if log.manifest else None
    recipe = {} if provenance is None else {**provenance.recipe, "code_version": provenance.code_version}
    return TEMPLATES.get_template(PAGE).render(
        name=log.name,
        facts=facts(log),
        alarms=log.of("alarm"),
        panels=panels,
        settings={name: value for name, value in recipe.items() if value is not None},
    )


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=METADATA)
    svg = file.getvalue()
    return svg[svg.index("<svg") :]
