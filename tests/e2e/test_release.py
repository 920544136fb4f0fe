"""A release is what its tag says: the version of the wheel, of the command line, and of what is built without git."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.unit.test_deploy import tool

ROOT = Path(__file__).parents[2]
CHART = yaml.safe_load((ROOT / "deploy/helm/latentwire/Chart.yaml").read_text())
# Nothing of the caller's: neither its settings of git, nor a version that it pretends.
ENVIRONMENT = {
    **{
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("GIT_", "SETUPTOOLS_SCM", "PYTHONPATH"))
    },
    **dict.fromkeys(("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"), os.devnull),
    **{f"GIT_{who}_{what}": "test@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}


def run(folder: Path, *command: object) -> str:
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def version(folder: Path) -> str:
    return run(folder, sys.executable, "-m", "hatchling", "version")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """What is tracked here, as the first commit of a repository of its own."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no checkout of git")
    folder = tmp_path / "repository"
    for name in run(ROOT, "git", "ls-files", "-z").split("\0"):
        if name and (ROOT / name).is_file() and not name.startswith(("benchmarks/", "examples/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    run(folder, "git", "init", "--quiet")
    run(folder, "git", "add", "--all")
    run(folder, "git", "commit", "--quiet", "--message", "All")
    return folder


def archived(repository: Path, to: Path) -> Path:
    to.mkdir()
    subprocess.run(
        ["tar", "-x", "-C", to], check=True, input=subprocess.check_output(["git", "archive", "HEAD"], cwd=repository)
    )
    return to


def test_the_version_is_that_of_the_tag_with_git_and_in_an_archive_of_it(repository: Path, tmp_path: Path) -> None:
    run(repository, "git", "tag", "v9.8.7")
    assert version(repository) == version(archived(repository, tmp_path / "tagged")) == "9.8.7"
    (repository / "README.md").write_text("Changed.")
    run(repository, "git", "commit", "--quiet", "--all", "--message", "One more")
    assert re.fullmatch(r"9\.8\.8\.dev1\+g[0-9a-f]+", version(repository))


def test_without_a_tag_or_git_there_is_a_version_to_fall_back_to(repository: Path, tmp_path: Path) -> None:
    fallback = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["version"]["fallback-version"]
    assert version(archived(repository, tmp_path / "untagged")) == fallback == CHART["appVersion"] == CHART["version"]


def test_one_command_makes_a_release_from_its_tag_and_from_nothing_else(repository: Path) -> None:
    for program in ("make", "sha256sum"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    programs = repository / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "helm").symlink_to(tool("helm"))
    # That of the tests, and nothing may be installed with it.
    (programs / "python").write_text(f'#!/bin/sh\n[ "$2" != pip ] && exec "{sys.executable}" "$@"\n')
    (programs / "python").chmod(0o755)
    release = ["make", "-o", ".venv/installed", "-o", ".venv/bin/helm", "release", "IMAGE=0"]  # both are as they are
    refused = subprocess.run(release, cwd=repository, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and f"the tag v{CHART['appVersion']}" in refused.stderr
    run(repository, "git", "tag", f"v{CHART['appVersion']}")
    run(repository, *release)
    dist, name = repository / "dist", f"latentwire-{CHART['appVersion']}"
    made = {f"{name}-py3-none-any.whl", f"{name}.tar.gz", f"{name}.tgz", f"{name}.cdx.json"}
    assert {file.name for file in dist.iterdir()} == {*made, "SHA256SUMS"}
    listed = dict(reversed(line.split()) for line in (dist / "SHA256SUMS").read_text().splitlines())  # type: ignore[arg-type]
    assert listed == {each: hashlib.sha256((dist / each).read_bytes()).hexdigest() for each in made}
    metadata = zipfile.ZipFile(dist / f"{name}-py3-none-any.whl").read(f"{name}.dist-info/METADATA").decode()
    assert f"\nVersion: {CHART['appVersion']}\n" in metadata
