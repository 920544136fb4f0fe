"""The files that a run writes as it goes, read back. Importing this module needs no torch."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOG, EVENTS = "log.jsonl", "events.jsonl"


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file of JSON lines; what a killed run left of a line is left out."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("step"), int):
            yield found
