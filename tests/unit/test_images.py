"""The image and what runs beside it: what is in it, what is not, and that Compose starts what Prometheus asks."""

import json
import re
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.unit.test_deploy import COMPOSE, DEPLOY, DOCKERFILE, GPU, ROOT

STEPS = [line.removeprefix("RUN ") for line in DOCKERFILE if line.startswith("RUN ")]
# Those of the image's extras, and what they bring; and what is installed here for tests and documents alone.
IN, OUT = {"torch", "uvicorn", "peft", "scikit-learn", "typer", "starlette"}, {"pytest", "mypy", "mkdocs", "lm-eval"}


@pytest.fixture(scope="module")
def bill(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Names and versions of the bill of materials."""
    file = tmp_path_factory.mktemp("dist") / "latentwire.cdx.json"
    subprocess.run([sys.executable, DEPLOY / "sbom.py", file], check=True, timeout=120)
    made = json.loads(file.read_text())
    assert made["bomFormat"] == "CycloneDX"
    for component in made["components"]:
        assert component["purl"] == f"pkg:pypi/{canonicalize_name(component['name'])}@{component['version']}"
    return {canonicalize_name(component["name"]): component["version"] for component in made["components"]}


def test_the_bill_has_what_the_image_installs_and_nothing_of_the_tests(bill: dict[str, str]) -> None:
    assert bill.keys() >= IN and not OUT & bill.keys()
    assert all(version(name) for name in OUT)  # or it would say nothing
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert {(canonicalize_name(name), pin) for name, pin in pins.items()} >= bill.items()


def test_what_the_image_asks_pip_for_is_what_is_tested_here(bill: dict[str, str], tmp_path: Path) -> None:
    """The step that writes requirements.txt, as it stands in the Dockerfile."""
    (step,) = (step.split(" && ")[0] for step in STEPS if "> requirements.txt" in step)
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    command = step.replace("python", sys.executable, 1)
    subprocess.run(["sh", "-ec", command], cwd=tmp_path, check=True, timeout=60)
    asked = [Requirement(line) for line in (tmp_path / "requirements.txt").read_text().splitlines()]
    assert len(asked) > 20
    for requirement in asked:
        assert canonicalize_name(requirement.name) in bill
        assert requirement.specifier.contains(version(requirement.name)), requirement


def test_nothing_that_compiles_is_installed_and_what_is_deleted_is_for_compiling_and_testing() -> None:
    assert not [step for step in STEPS if re.search(r"\b(apt|apk|gcc|build-essential)\b", step)]
    (deleting,) = (step for step in STEPS if "rm -rf" in step)
    folders = re.findall(r'"\$site"/(\S+)', deleting)
    assert len(folders) > 4 and all(re.search(r"include|[tT]est|protoc|flight", folder) for folder in folders)
    packages = re.findall(r"for package in ([\w ]+);", deleting)[0].split()
    assert "-type d -name tests" in deleting and len(packages) > 4
    last = max(i for i, line in enumerate(DOCKERFILE) if line.startswith("FROM "))
    assert not [line for line in DOCKERFILE[last:] if "pip install" in line]


def test_bytecode_is_that_of_what_runs_and_is_made_after_the_deleting() -> None:
    assert all("--no-compile" in step for step in STEPS if "pip install" in step)
    (deleting,) = (i for i, step in enumerate(STEPS) if "rm -rf" in step)
    running = STEPS[deleting + 1]
    assert re.match(r"find /opt/latentwire -name '\*\.py' -exec touch .*&& latentwire evaluate builtin", running)
    modules = re.findall(r'python -Pc "import ([\w., ]+)"', running)[0].replace(" ", "").split(",")
    assert len(modules) > 6 and all(find_spec(module) for module in modules)


def test_what_the_image_lacks_of_arrow_is_asked_for_by_nothing_that_reads_arrow() -> None:
    site = Path(sysconfig.get_path("purelib"))
    for folder in (ROOT / "bridge", site / "datasets", site / "pandas"):
        files = [file for file in folder.rglob("*.py") if "tests" not in file.parts]
        assert any("pyarrow" in file.read_text() for file in files)
        assert not [file for file in files if re.search(r"(pyarrow|pa)\.flight|import flight", file.read_text())]


def test_compose_runs_the_service_on_a_read_only_root() -> None:
    service = COMPOSE["services"]["latentwire"]
    assert service["read_only"] is True and service["tmpfs"] == ["/tmp:mode=1777"]
    assert service["cap_drop"] == ["ALL"] and service["volumes"] == ["models:/models"]


def test_the_exporter_of_the_gpus_runs_where_it_is_asked_for_and_prometheus_finds_it() -> None:
    exporter = GPU["services"]["dcgm-exporter"]
    assert exporter["profiles"] == ["dcgm"] and "ports" not in exporter
    assert re.search(r":\d+\.\d+\.\d+-\d+\.\d+\.\d+-\w+", exporter["image"])
    assert exporter["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    (job,) = (job for job in config["scrape_configs"] if job["job_name"] == "dcgm-exporter")
    (found,) = job["dns_sd_configs"]
    assert found["names"] == ["dcgm-exporter"] and found["type"] == "A"
    assert f"/dev/tcp/127.0.0.1/{found['port']}" in exporter["healthcheck"]["test"][-1]
