"""The resumable state of a run: everything the next step depends on, saved atomically.

``state-STEP.json`` names one safetensors file and holds the small numbers; its appearance by rename is the commit.
The last few states are kept, so a damaged one costs the steps since the one before and not the run. The data order
is a pure function of the step, and the learning rate too, so neither is stored.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from latentwire.bridge.checkpoint import read_part, remove_stale_parts, write_part
from latentwire.bridge.config import Part
from latentwire.bridge.errors import CorruptCheckpoint, InvalidRequest
from latentwire.bridge.files import replace_file

log = logging.getLogger(__name__)

NAME = re.compile(r"state-(\d{8})\.json")
# May differ between a run and its continuation without changing its result.
FREE = {"out", "save_every", "keep_last", "cache", "memory_budget", "device", "on_collapse", "log_with", "probe_every"}
FREE |= {"debug_print_first", "debug_topk"}


@dataclass
class Trained:
    """What a state is taken from and put back into."""

    parameters: Sequence[nn.Parameter]
    optimizers: Sequence[Optimizer]
    scaler: GradScaler


def save_state(
    folder: Path, identity: Mapping[str, Any], step: int, trained: Trained, *, keep: int = 1, **numbers: Any
) -> int:
    """Write weights, optimiser and random state after ``step`` optimiser steps, and return their bytes.

    ``identity`` says of which run the state is: a continuation must have the same. ``keep`` states are left in the
    folder, this one included; ``numbers`` are small values that ``load_state`` gives back.
    """
    tensors: dict[str, Tensor] = {f"weight.{i}": p.detach() for i, p in enumerate(trained.parameters)}
    tensors["rng.cpu"] = torch.get_rng_state()
    for number, optimizer in enumerate(trained.optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            key = f"optimizer.{number}.{index}"
            tensors |= {f"{key}.{name}": torch.as_tensor(value) for name, value in values.items()}
    part = write_part(folder, "state", tensors)
    document = {
        "step": step,
        "run": dict(identity),
        "file": asdict(part),
        "numbers": numbers,
        "scaler": trained.scaler.state_dict(),
    }
    replace_file(folder / f"state-{step:08}.json", json.dumps(document, indent=2).encode())
    _forget(folder, step, keep)
    return part.bytes


def _forget(folder: Path, step: int, keep: int) -> None:
    """Remove all but the newest states, and damaged ones of a future that will be run again.

    The names first, so that no name is left without its weights.
    """
    states = sorted(states_in(folder), reverse=True)
    past = [path for path in states if path.name <= f"state-{step:08}.json"][:keep]
    for path in set(states) - set(past):
        path.unlink(missing_ok=True)
    kept = [_document(path) for path in past]
    remove_stale_parts(folder, "state", {document["file"]["file"] for document in kept if document is not None})


def states_in(folder: Path) -> Iterator[Path]:
    """Every state of a run's folder, in no order."""
    return (path for path in folder.glob("state-*.json") if NAME.fullmatch(path.name))


def _document(path: Path) -> dict[str, Any] | None:
    try:
        found = dict(json.loads(path.read_bytes()))
        Part(**found["file"])
        int(found["step"]), dict(found["run"]), dict(found["numbers"]), dict(found["scaler"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s)", path, error)
        return None
    return found


def load_state(folder: Path, identity: Mapping[str, Any], trained: Trained) -> tuple[int, dict[str, Any]]:
    """Put the newest whole state back in place; return the optimiser steps done and its numbers, or 0 and none.

    A state that is damaged is named in a warning and the one before is used.

    Raises:
        InvalidRequest: The state is of another run; the first setting, model or data that differs is named.
        CorruptCheckpoint: There are states, and none of them can be read.
    """
    paths = sorted(states_in(folder), reverse=True)
    for path in paths:
        document = _document(path)
        if document is None:
            continue
        _check_run(identity, document["run"])
        try:
            tensors = read_part(folder, Part(**document["file"]))
        except CorruptCheckpoint as error:
            log.warning("%s; the state before it is used", error)
            continue
        _restore(document, tensors, trained)
        return int(document["step"]), document["numbers"]
    if paths:
        raise CorruptCheckpoint(f"none of the {len(paths)} states in {folder} can be read; --overwrite begins again")
    return 0, {}


def _check_run(identity: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    now = json.loads(json.dumps(dict(identity)))
    for key in sorted((now.keys() | saved.keys()) - FREE):
        if now.get(key) != saved.get(key):
            raise InvalidRequest(f"--resume: {key} was {saved.get(key)!r}, now {now.get(key)!r}", param=key)


def _restore(document: Mapping[str, Any], tensors: Mapping[str, Tensor], trained: Trained) -> None:
    with torch.no_grad():
        for i, parameter in enumerate(trained.parameters):
            parameter.copy_(tensors[f"weight.{i}"])
    for number, optimizer in enumerate(trained.optimizers):
        held: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{number}."):
                _, _, index, key = name.split(".", 3)
                held.setdefault(int(index), {})[key] = tensor
        # The optimiser puts its state where its parameters are.
        optimizer.load_state_dict({"state": held, "param_groups": optimizer.state_dict()["param_groups"]})
    trained.scaler.load_state_dict(document["scaler"])
    torch.set_rng_state(tensors["rng.cpu"])
