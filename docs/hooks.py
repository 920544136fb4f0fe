"""What the guide takes from the code: the package for mkdocstrings, the table of settings and the tree of errors."""

import re
import tempfile
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from latentwire.bridge import errors
from latentwire.service.settings import PREFIX, Settings

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
DIMENSIONS = re.compile(r"^Dimensions used in this file:\n((?: {4}.*\n?)+)", re.MULTILINE)
LINKED = tempfile.TemporaryDirectory()


@event_priority(100)  # before mkdocstrings looks for the package
def on_config(config: MkDocsConfig) -> None:
    """Lay the folders of a checkout out as the wheel does: ``latentwire/bridge`` and so on."""
    package = Path(LINKED.name) / "latentwire"
    package.mkdir(exist_ok=True)
    for source in [*(ROOT / "latentwire").glob("*.py"), *(ROOT / name for name in ("bridge", "training", "service"))]:
        (package / source.name).unlink(missing_ok=True)
        (package / source.name).symlink_to(source)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [LINKED.name]


class Docstrings(griffe.Extension):
    """Show what docstrings write for a terminal as a page shows it: examples (``>>> …``) and lists of dimensions."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            shown = EXAMPLE.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
            obj.docstring.value = DIMENSIONS.sub(_in_a_line, shown)


def _in_a_line(dimensions: re.Match[str]) -> str:
    each = re.split(r"\s{2,}", dimensions[1].strip())
    return f"Dimensions: {' · '.join(each)}."


def on_page_markdown(markdown: str, **_: object) -> str:
    """Put what is made from the code where a page asks for it."""
    for name, made in {"table of settings": settings_table, "tree of errors": error_tree}.items():
        mark = f"<!-- the {name} stands here in the built guide -->"
        markdown = markdown.replace(mark, made()) if mark in markdown else markdown
    return markdown


def error_tree() -> str:
    """Every error and its HTTP status, as its module lists them."""
    _, tree, *_ = (errors.__doc__ or "").split("\n\n")
    return f"```text\n{tree}\n```"


def settings_table() -> str:
    """Every ``LW_*`` variable, its default and its meaning, in the order of ``Settings``."""
    lines = [
        f"| `{PREFIX}{name.upper()}` | {default_of(field)} | {plain(field.description or '')} |"
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join(["| variable | default | meaning |", "|---|---|---|", *lines])


def plain(text: str) -> str:
    """Stars and bars that are no markup."""
    return re.sub(r"[*|]", r"\\\g<0>", text)


def default_of(field: FieldInfo) -> str:
    """A default as one writes it in the environment; a dash where there is none."""
    value = field.default
    if value in (None, "", (), {}):
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value.human_readable()}`" if isinstance(value, ByteSize) else f"`{value}`"
