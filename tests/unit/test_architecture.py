"""The rules a reader may assume about the tree."""

import ast
import importlib
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from latentwire.bridge import errors

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT: dict[str, set[str]] = {
    "bridge": set(),
    "training": {"latentwire.bridge"},
    "service": {"latentwire.bridge"},
    # the composition root: the one place where all three meet
    "service/__main__.py": {"latentwire.bridge", "latentwire.training"},
}
FIRST_PARTY = {"latentwire.bridge", "latentwire.training", "latentwire.service", "tests", "benchmarks"}
ONLY_IN_SERVICE = {"fastapi", "redis", "prometheus_client", "starlette", "uvicorn"}


def python(folder: Path) -> list[Path]:
    """Every file of ours."""
    return sorted(path for top in ("bridge", "training", "service") for path in (folder / top).rglob("*.py"))


FILES = python(ROOT)
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def imported(path: Path) -> set[str]:
    """Full names of everything a file imports, inside functions too: modules, and what is taken out of them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports(path: Path) -> set[str]:
    """Top names of everything a file imports: ``os`` for ``os.path``, ``latentwire.bridge`` for all below it."""
    parts = [name.split(".") for name in imported(path)]
    return {".".join(name[: 2 if name[0] == "latentwire" else 1]) for name in parts}


def test_the_walk_sees_imports_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "odd.py"
    file.write_text("import a.b\ndef f():\n    from c.d import e\n    import g as h\nfrom latentwire import bridge\n")
    assert imports(file) == {"a", "c", "g", "latentwire.bridge"}


@each_file
def test_imports_follow_the_arrows(path: Path) -> None:
    name, top = str(path.relative_to(ROOT)), path.relative_to(ROOT).parts[0]
    assert imports(path) & FIRST_PARTY <= MAY_IMPORT.get(name, MAY_IMPORT[top]) | {f"latentwire.{top}"}


def circle(folder: Path) -> list[str]:
    """The modules of a circle of imports, those inside functions included; empty where there is none."""
    files = {f"latentwire.{'.'.join(path.relative_to(folder).with_suffix('').parts)}": path for path in python(folder)}
    names = {name.removesuffix(".__init__") for name in files}
    arrows = {
        name.removesuffix(".__init__"): {full if full in names else full.rpartition(".")[0] for full in imported(path)}
        for name, path in files.items()
    }
    try:
        TopologicalSorter({name: (found & names) - {name} for name, found in arrows.items()}).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circle(ROOT) == []


def test_a_circle_is_found_wherever_its_imports_stand(tmp_path: Path) -> None:
    lines = {
        "__init__": "",
        "a": "def f():\n    from latentwire.bridge import b",
        "b": "import latentwire.bridge.c",
        "c": "if TYPE_CHECKING:\n    from latentwire.bridge.a import A",
    }
    (tmp_path / "bridge").mkdir()
    for name, line in lines.items():
        (tmp_path / "bridge" / f"{name}.py").write_text(line)
    assert {module[-1] for module in circle(tmp_path)} == set("abc")
    (tmp_path / "bridge" / "b.py").write_text("")
    assert circle(tmp_path) == []


@each_file
def test_what_serves_stays_in_service(path: Path) -> None:
    if path.relative_to(ROOT).parts[0] != "service":
        assert not imports(path) & ONLY_IN_SERVICE


@each_file
def test_no_file_above_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@each_file
def test_ids_become_text_in_one_place_or_untidied(path: Path) -> None:
    """A decoder that tidies up shows texts whose pieces do not make the whole."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and re.search(r"tokenizer\.(batch_)?decode$", ast.unparse(node.func)):
            tidied = {named.arg: ast.unparse(named.value) for named in node.keywords}.get(
                "clean_up_tokenization_spaces"
            )
            assert path.name == "detokenise.py" or tidied == "False", ast.unparse(node)


@pytest.mark.parametrize("name", ["bridge", "training", "service"])
def test_no_other_distribution_shadows_our_names(name: str) -> None:
    module = importlib.import_module(f"latentwire.{name}")
    assert module.__file__ is not None and Path(module.__file__).parent == ROOT / name


@pytest.mark.parametrize(
    "module",
    [
        "latentwire.bridge.errors",
        "latentwire.bridge.wire",
        "latentwire.bridge.config",
        "latentwire.service.client.client",
    ],
)
def test_a_client_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_error_tree_in_the_docstring_is_the_tree() -> None:
    named = set(re.findall(r"[├└]── (\w+)", errors.__doc__ or ""))
    assert named == {kind.__name__ for kind in errors.LatentWireError.__subclasses__()}
    assert all(kind.__doc__ for kind in errors.LatentWireError.__subclasses__())


def test_an_error_can_name_the_field_at_fault() -> None:
    error = errors.InvalidRequest("why", param="prompt")
    assert (str(error), error.param, errors.TooLarge("why").param) == ("why", "prompt", None)
