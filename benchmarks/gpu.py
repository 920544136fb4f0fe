"""Everything that only a GPU can tell, in six minutes on one card of 80 GB: ``python -m benchmarks.gpu``.

Models of 8B shape are drawn on the device; nothing is downloaded. Each part is a process of its own (``gpu_parts``,
``gpu_decode``), which has its own time and cannot harm the others: what fails is recorded with its error. ``--tiny`` is
a dry run on a CPU: every part with small shapes, in one process.

Asked: a decode step of at most 1.3 (one row) and 1.6 (32) times what reading the weights takes; from token to token at
most twice as long beside a loop that encodes, at the 99th percentile, and not one answer changed by it; a training
step's peak as planned.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.record import RESULTS, record

PARTS = {  # seconds, without the start of a process; the most important first
    "rates": 8.0,
    "decode": 110.0,
    "race": 20.0,
    "beside": 35.0,
    "answers": 20.0,
    "training": 40.0,
    "load": 15.0,
    "fp8": 8.0,
    "oversized": 10.0,
}
START_SECONDS = 20.0  # most that a process and its models take to start, of which all together have half
TOTAL_SECONDS = 360.0
Figures = dict[str, Any]


def main(
    tiny: Annotated[bool, typer.Option("--tiny", help="Dry run on a CPU with small shapes.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the JSON.")] = RESULTS,
    only: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(PARTS)}; repeat for several.")] = None,
) -> None:
    """Measure, record, and say what was asked and found."""
    if unknown := sorted(set(only or ()) - PARTS.keys()):
        raise typer.BadParameter(f"{unknown[0]!r}; expected one of {', '.join(PARTS)}", param_hint="--only")
    if not tiny and not torch.cuda.is_available():
        from latentwire.bridge.devices import why_no_cuda

        print(f"a GPU is needed, but {why_no_cuda()}; --tiny is a dry run on a CPU", file=sys.stderr)
        raise typer.Exit(2)
    wanted = {name: seconds for name, seconds in PARTS.items() if name in (only or PARTS)}
    scale, groups = ("tiny", [wanted]) if tiny else ("8B", [{name: seconds} for name, seconds in wanted.items()])
    found: Figures = {}
    started = time.monotonic()
    for group in groups:
        left = TOTAL_SECONDS - (time.monotonic() - started)
        print(f"{', '.join(group)}: {left:.0f} s left in all", file=sys.stderr, flush=True)
        found |= measured(scale, group, left)
    figures = {"scale": scale, "seconds": time.monotonic() - started, "asked": asked(found), "parts": found}
    name = "-".join(["gpu", *["tiny"] * tiny, *(only or ())])
    given = ["--tiny"] * tiny + [f"--only {part}" for part in only or ()]
    record(name, " ".join(["python -m benchmarks.gpu", *given]), figures, out)
    show(figures)
    if any("error" in part for part in found.values()):
        raise typer.Exit(1)


def measured(scale: str, parts: dict[str, float], left: float) -> dict[str, Figures]:
    """Figures of parts that share a process; it is ended where it runs on for long beyond their time."""
    limit = min(sum(parts.values()) + START_SECONDS, left)
    if limit < START_SECONDS:
        return {name: {"error": f"not run: {max(left, 0):.0f} s were left"} for name in parts}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.gpu_parts", scale, folder, json.dumps(parts)]
        try:
            done = subprocess.run(command, stdout=sys.stderr, timeout=limit, check=False)
            ended = f"its process ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"its process was ended after {limit:.0f} s"
        files = {name: Path(folder) / f"{name}.json" for name in parts}
        return {
            name: json.loads(file.read_bytes()) if file.is_file() else {"error": ended} for name, file in files.items()
        }


def asked(found: dict[str, Figures]) -> list[Figures]:
    """What was asked, beside what was found; None where it was not measured."""
    bandwidth = found.get("rates", {}).get("copied_bytes_per_second")
    multiplied = found.get("rates", {}).get("matmul_flops_per_second")
    decode, beside, race = (found.get(name, {}) for name in ("decode", "beside", "race"))
    lines: list[Figures] = []
    for step in decode.get("steps", []):
        cache = step["rows"] * step["context"] * decode["kv_bytes_per_token"]
        of_weights = bandwidth and step["median_ms"] / 1000 * bandwidth / decode["weight_bytes"]
        of_all = bandwidth and step["median_ms"] / 1000 * bandwidth / (decode["weight_bytes"] + cache)
        step |= {"over_weights": of_weights, "over_weights_and_cache": of_all}
        wanted = {1: 1.3, 32: 1.6}.get(step["rows"])
        if step["mode"] == "greedy" and wanted is not None:
            what = f"decode step / (weight bytes / bandwidth), {step['switch']}, {step['context']} tokens"
            lines.append({"what": f"{what}, B = {step['rows']}", "asked": f"<= {wanted}", "found": of_weights})
    p99 = beside["beside"]["p99_ms"] / beside["alone"]["p99_ms"] if "beside" in beside else None
    lines.append({"what": "token to token beside encoding over alone, p99", "asked": "<= 2", "found": p99})
    lines.append(
        {"what": "answers changed by encoding", "asked": "0", "found": race.get("mismatches", {}).get("beside")}
    )
    for step in found.get("training", {}).get("steps", []):
        step["mfu"] = multiplied and step["flops_per_second"] / multiplied
        rows, peak = step["batch_size"], step["peak_bytes"]
        lines.append({"what": f"MFU of a training step, {rows} rows", "asked": "report", "found": step["mfu"]})
        ratio = peak and peak / step["planned_bytes"]
        lines.append({"what": f"its peak over the plan's, {rows} rows", "asked": "report", "found": ratio})
    return lines


def show(figures: Figures) -> None:
    """The table at the end, and the errors."""
    table = Table("what", "asked", "found", title=f"benchmarks.gpu, {figures['scale']}")
    for line in figures["asked"]:
        value = line["found"]
        table.add_row(line["what"], line["asked"], "not measured" if value is None else f"{value:.3g}")
    console = Console()
    console.print(table)
    for name, part in figures["parts"].items():
        if "error" in part:
            console.print(f"{name}: {part['error']}", style="red", markup=False)


if __name__ == "__main__":
    typer.run(main)
