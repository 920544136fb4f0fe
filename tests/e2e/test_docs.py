"""The guide as it is built: strictly, without a network, and in agreement with the code."""

import html
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from latentwire.bridge import errors
from latentwire.service.settings import Settings
from tests.documents import PAGES, ROOT

LINK = re.compile(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)|!\[[^\]\n]*\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guide, built as ``make docs`` builds it."""
    folder = tmp_path_factory.mktemp("guide") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def seen(markup: str) -> str:
    """What a reader sees of HTML."""
    return html.unescape(re.sub(r"<[^>]+>", "", markup))


def page_of(site: Path, name: str) -> str:
    return (site / name / "index.html").read_text()


def test_the_guide_is_built_strictly() -> None:
    assert "\nstrict: true\n" in (ROOT / "mkdocs.yml").read_text()


def test_every_page_of_the_guide_is_in_its_navigation(site: Path) -> None:
    made = {path.relative_to(site).parent for path in site.rglob("index.html")}
    pages = {path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")}
    assert made == {Path(".") if page == Path("index") else page for page in pages}
    first = (site / "index.html").read_text()
    assert all(f'href="{page}/"' in first for page in made - {Path(".")})


def test_the_guide_asks_nothing_of_other_machines(site: Path) -> None:
    asked = re.compile(r"""<(?:link|script|img|iframe)[^>]+(?:href|src)=["'](https?:)?//""")
    assert [page for page in site.rglob("*.html") if asked.search(page.read_text())] == []
    styles = [path for path in site.rglob("*.css") if re.search(r"(@import|url\()\s*[\"']?https?:", path.read_text())]
    assert styles == []


def test_every_setting_stands_in_the_guide_with_its_default_and_its_meaning(site: Path) -> None:
    row = re.compile(r"<tr>\s*<td><code>LW_(\w+)</code></td>\s*<td>(.*?)</td>\s*<td>(.*?)</td>", re.DOTALL)
    rows = {
        name.lower(): (seen(default), seen(meaning)) for name, default, meaning in row.findall(page_of(site, "serving"))
    }
    assert list(rows) == list(Settings.model_fields)
    for name, field in Settings.model_fields.items():
        default, meaning = rows[name]
        assert field.description and meaning == field.description.replace("`", "")
        assert (default == "–") == (field.default in (None, "", (), {})), name
    some = {"port": "8000", "insecure": "false", "max_body": "32.0MiB", "request_timeout": "60.0"}
    assert some == {name: rows[name][0] for name in some}


def test_every_error_stands_in_the_guide(site: Path) -> None:
    shown = seen(page_of(site, "reference/errors"))
    assert all(kind.__name__ in shown for kind in errors.LatentWireError.__subclasses__())


@pytest.mark.parametrize(
    "page, words",
    [
        ("bridge", ["A bridge on disk", "make_encoder", "exact_match"]),
        ("client", ["AsyncClient", "POST /evaluations"]),
        ("training", ["answer_loss", "TrainConfig"]),
        ("service", ["create_app"]),
    ],
)
def test_the_reference_has_what_the_docstrings_say(site: Path, page: str, words: list[str]) -> None:
    shown = seen(page_of(site, f"reference/{page}"))
    assert [word for word in words if word not in shown] == []


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and mkdocs make it."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.replace("`", "").lower())).strip("-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for target in (first or second for first, second in LINK.findall(page.read_text())):
        link = urlsplit(target)
        if link.scheme:
            continue
        there = (page.parent / link.path).resolve() if link.path else page
        assert there.exists(), target
        if link.fragment and ROOT / "docs" not in page.parents:  # mkdocs sees to those within the guide
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert link.fragment in map(slug, headings), target


def test_every_file_that_a_page_names_is_there() -> None:
    path = re.compile(r"`((?:bridge|training|service|latentwire|deploy|benchmarks|examples|docs|tests)/[\w./-]+)`")
    named = {found for page in PAGES for found in path.findall(page.read_text()) if "NAME" not in found}
    assert len(named) > 30
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_the_tree_names_every_module_and_nothing_else() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    tree = text[text.index("## The tree") : text.index("## What must always hold")]
    named = set(re.findall(r"[\w_]+\.py", tree))
    there = {path.name for name in ("bridge", "training", "service") for path in (ROOT / name).rglob("*.py")}
    assert there - {"__init__.py", "documents.py", "recipe.py"} <= named
    everywhere = {path.name for path in ROOT.glob("*/**/*.py") if ".venv" not in path.parts}
    assert named <= everywhere


def test_the_readme_fits_on_two_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110
