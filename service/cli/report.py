"""``latentwire report``: evaluations written as JSON, shown again and beside each other, without any model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from latentwire.bridge.errors import InvalidRequest

COMPARISON = "comparison.html"
WIDE = 150  # columns in which a table has room for explanations


def report(
    files: Annotated[list[Path], typer.Argument(metavar="REPORT…", help="Reports that 'evaluate' wrote, as JSON.")],
    out_: Annotated[
        Path | None,
        typer.Option(
            "--out", help=rf"The page. \[default: beside the first report, by its name; of several, {COMPARISON}]"
        ),
    ] = None,
) -> None:
    """Show an evaluation again, or compare several: a table here, and a page that needs nothing else."""
    from latentwire.bridge.evaluation.html import PAGES, save
    from latentwire.bridge.evaluation.saved import read_report

    if out_ is not None and out_.suffix.lower() not in PAGES:
        raise InvalidRequest(f"--out {out_}: expected a name that ends in .html", param="out")
    if len(set(files)) < len(files):
        raise InvalidRequest("a report is named twice", param="report")
    console = Console()
    documents = {str(file): read_report(file) for file in files}
    if len(files) > 1:
        compared(documents, out_ or files[0].with_name(COMPARISON), console)
        return
    file, document = files[0], documents[str(files[0])]
    show(document, console)
    page = out_ or file.with_suffix(".html")
    save(page, document)
    say_written(page, console)


def show(document: Mapping[str, Any], console: Console) -> None:
    """Print the tables of a report."""
    from latentwire.bridge.evaluation.report import latency_table, table

    explained = console.width >= WIDE
    console.print(table(document, explained=explained))
    if document.get("latency"):
        console.print(latency_table(document["latency"], explained=explained))


def report_files(checkpoints: Sequence[str], out: Path | None) -> dict[str, Path | None]:
    """Where the report of each checkpoint goes: ``out`` itself of one; of several a file each in the folder ``out``.

    Raises:
        InvalidRequest: A checkpoint is named twice, or ``out`` is a file where a folder is needed.
    """
    if twice := next((name for name in checkpoints if checkpoints.count(name) > 1), None):
        raise InvalidRequest(f"the checkpoint {twice!r} is named twice", param="checkpoint")
    if len(checkpoints) == 1 or out is None:
        return dict.fromkeys(checkpoints, out)
    if out.is_file() or out.suffix.lower() in (".json", ".html", ".htm"):
        raise InvalidRequest(f"--out {out}: expected a folder, as there are several checkpoints", param="out")
    names = [Path(name).resolve().name for name in checkpoints]
    if len(set(names)) < len(names):
        names = ["-".join(Path(name).resolve().parts[1:]) for name in checkpoints]
    return {name: out / f"{short}.json" for name, short in zip(checkpoints, names, strict=True)}


def compared(documents: Mapping[str, dict[str, Any]], page: Path | None, console: Console) -> None:
    """Print the comparison of reports, by the names of their files, and write its page (InvalidRequest)."""
    from latentwire.bridge.evaluation.compare import compare
    from latentwire.bridge.evaluation.html import comparison_page
    from latentwire.bridge.evaluation.report import comparison_table, write_text

    comparison = compare(documents)
    console.print(comparison_table(comparison))
    if page is not None:
        write_text(page, comparison_page(comparison, title=f"{len(documents)} evaluations on {comparison.task}"))
        say_written(page, console)


def say_written(file: Path, console: Console) -> None:
    """One line that names a file as it is."""
    console.print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)
