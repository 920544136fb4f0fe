"""Where a figure was measured, and with what: written beside every figure."""

import datetime
import json
import os
import platform
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

RESULTS = Path(__file__).parent / "results"


def hardware() -> str:
    """The machine in words."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(": ")[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    memory = psutil.virtual_memory().total / (1 << 30)
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}, {memory:.0f} GiB{gpu}"


def command_of(module: str, **options: Any) -> str:
    """What one types to run a benchmark with these options; one that is None, empty or False is left out."""
    words = ["python", "-m", f"benchmarks.{module}"]
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            if one is None or one is False or one == "":
                continue
            words += [f"--{name.replace('_', '-')}", *([] if one is True else [str(one)])]
    return shlex.join(words)


def record(name: str, command: str, figures: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``figures`` to ``results/NAME-DATE.json``, or into another folder, and return the path."""
    date = datetime.date.today().isoformat()
    document = {
        "benchmark": name,
        "date": date,
        "command": command,
        "hardware": hardware(),
        "load_average": os.getloadavg()[0],
        "versions": {package: version(package) for package in ("latentwire", "torch", "transformers")},
        **figures,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{date}.json"
    path.write_text(json.dumps(document, indent=2) + "\n")
    print(f"wrote {path.relative_to(RESULTS.parents[1]) if folder == RESULTS else path}")
    return path
