"""``make sbom``: what is in the image, with the versions of ``constraints.txt``, into a file of CycloneDX.

The requirements of the extras that the image installs are followed through what is installed here; the packages that
only tests and documents need are left out. An image for CUDA has NVIDIA's libraries besides, in the versions that its
torch names.
"""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def wanted() -> list[str]:
    """What the image installs: of the extras that the step in its Dockerfile names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = re.findall(r"e\['([\w-]+)'\]", (ROOT / "Dockerfile").read_text())
    return [*project["dependencies"], *(line for extra in named for line in extras[extra])]


def closure() -> set[str]:
    """The names of all packages that come with them, in their canonical form."""
    found: set[tuple[str, str]] = set()
    waiting = [(requirement, "") for requirement in map(Requirement, wanted()) if requirement.name != "latentwire"]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        for each in {"", *requirement.extras} - {extra for name, extra in found if name == requirement.name}:
            found.add((requirement.name, each))
            waiting += [(part, each) for part in map(Requirement, requires(requirement.name) or ())]
    return {canonicalize_name(name) for name, _ in found}


def pinned() -> list[str]:
    """The lines of ``constraints.txt`` for them (ValueError where one is missing)."""
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if re.match(r"\w", line)]
    by_name = {canonicalize_name(pin.split("==")[0]): pin for pin in pins}
    names = closure()
    if missing := names - by_name.keys():
        raise ValueError(f"constraints.txt has no version of {', '.join(sorted(missing))}")
    return [by_name[name] for name in sorted(names)]


if __name__ == "__main__":
    command = [sys.executable, "-m", "cyclonedx_py", "requirements", "--output-reproducible", "-o", sys.argv[1], "-"]
    sys.exit(subprocess.run(command, input="\n".join(pinned()), text=True).returncode)
