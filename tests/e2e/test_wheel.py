"""The wheel, installed where nothing else is: beside folders that have the names of ours."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from venv import EnvBuilder

import pytest

from latentwire.service.cli.demo import running
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
NO_INDEX = ("Temporary failure", "Max retries", "Connection refused", "Name or service not known", "Network is")
TRAIN = [
    "train",
    "--sender=builtin:neox",
    "--receiver=builtin:llama",
    "--task=world",
    "--max-steps=1",
    "--batch-size=2",
]


def run(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)


def pip(*arguments: object) -> None:
    done = run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments)
    if any(reason in done.stderr for reason in NO_INDEX):
        pytest.skip("there is no package index to install from")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    (file,) = folder.glob("*.whl")
    return file


def version_of(wheel: Path) -> str:
    return wheel.name.split("-")[1]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with packages of somebody else's, under the names of our folders."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in ("bridge", "training", "service"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise RuntimeError('this is not LatentWire')")
    return folder


def environment(folder: Path) -> Path:
    """The interpreter of a new and empty environment."""
    EnvBuilder(with_pip=False).create(folder)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def client(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has what ``pip install latentwire`` brings."""
    python = environment(tmp_path_factory.mktemp("client"))
    pip("--python", python, "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel)
    return python


@pytest.fixture(scope="module")
def whole(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the wheel, beside every other package of this environment."""
    python = environment(folder := tmp_path_factory.mktemp("whole"))
    pip("--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    (packages,) = folder.glob("lib/*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return python


def test_a_wheel_holds_one_package_with_its_data_and_its_types(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"latentwire", f"latentwire-{version_of(wheel)}.dist-info"}
    for file in ("py.typed", "bridge/builtin/bridge/config.json", "service/page/index.html", "training/loop.py"):
        assert f"latentwire/{file}" in names
    assert not [name for name in names if "test" in name or name.endswith(".pyc")]


def test_a_client_is_installed_without_torch_and_asks_a_service(
    wheel: Path, client: Path, elsewhere: Path, tmp_path: Path
) -> None:
    assert run(client, "-c", "import torch").returncode != 0
    done = run(client.parent / "latentwire", "--version", cwd=elsewhere)
    assert (done.stdout, done.returncode) == (f"latentwire {version_of(wheel)}\n", 0), done.stderr
    with running("builtin", port := free_port(), tmp_path / "log"):
        url = f"http://127.0.0.1:{port}"
        code = f"import latentwire; print(latentwire.Client('{url}').encode('Mara sings.').latents[0].array.shape)"
        done = run(client, "-c", code, cwd=elsewhere)
        assert done.stdout == "(2, 128)\n", done.stderr
        ask = ["generate", "demo", "--url", url, "--text", "Ben lives in Rome."]
        ask += ["--prompt", "Question: Where does Ben live?\\nAnswer:"]
        done = run(client, "-m", "latentwire", *ask, cwd=elsewhere)
        assert done.stdout == " Ben lives in Rome.\n", done.stderr


@pytest.mark.parametrize(
    "command, extra",
    [
        (["encode", "builtin", "--text", "a", "--out", "m"], "eval"),
        (["evaluate", "builtin", "--task", "world"], "eval"),
        ([*TRAIN, "--out", "o"], "train"),
        (["serve"], "serve"),
        (["demo"], "all"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_a_command_whose_extra_is_missing_names_it_in_one_line(
    client: Path, tmp_path: Path, command: list[str], extra: str
) -> None:
    done = run(client.parent / "latentwire", *command, cwd=tmp_path)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    (line,) = done.stderr.splitlines()
    assert line.endswith(f" is not installed; pip install 'latentwire[{extra}]'")


def test_a_name_whose_extra_is_missing_names_it(client: Path, tmp_path: Path) -> None:
    for name, extra in (("Bridge", "eval"), ("evaluate", "eval"), ("train", "train")):
        done = run(client, "-c", f"import latentwire; latentwire.{name}", cwd=tmp_path)
        last = done.stderr.splitlines()[-1]
        assert last.startswith(f"ImportError: latentwire.{name}: ") and last.endswith(f"'latentwire[{extra}]'")


def test_a_wheel_trains_beside_folders_of_our_names(whole: Path, elsewhere: Path, tmp_path: Path) -> None:
    where = "import latentwire.service.app as app; print(app.__file__)"
    assert str(whole.parents[1]) in run(whole, "-c", where, cwd=elsewhere).stdout
    done = run(whole, "-m", "latentwire", *TRAIN, "--out", tmp_path / "run", cwd=elsewhere)
    assert done.returncode == 0 and (tmp_path / "run" / "config.json").is_file(), done.stderr
