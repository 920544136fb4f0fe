"""The resumable state of a run: everything the next step depends on, saved atomically.

``state.json`` names one safetensors file and holds the small numbers; replacing it by rename is the commit.
The data order is a pure function of the step, and the learning rate too, so neither is stored.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bridge.checkpoint import read_part, remove_stale_parts, replace_file, write_part
from bridge.config import Part
from bridge.errors import CorruptCheckpoint, InvalidRequest

STATE = "state.json"
FREE = {"out", "save_every"}  # may differ between a run and its continuation without changing its result


def save_state(
    folder: Path,
    identity: Mapping[str, Any],
    step: int,
    parameters: list[nn.Parameter],
    optimizers: Sequence[Optimizer],
) -> None:
    """Write weights, optimiser and random state after ``step`` optimiser steps; ``identity`` says of which run."""
    tensors: dict[str, Tensor] = {f"weight.{i}": p.detach() for i, p in enumerate(parameters)}
    tensors["rng.cpu"] = torch.get_rng_state()
    for number, optimizer in enumerate(optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            key = f"optimizer.{number}.{index}"
            tensors |= {f"{key}.{name}": torch.as_tensor(value) for name, value in values.items()}
    part = write_part(folder, "state", tensors)
    document = {"step": step, "run": dict(identity), "file": asdict(part)}
    replace_file(folder / STATE, json.dumps(document, indent=2).encode())
    remove_stale_parts(folder, "state", {part.file})


def load_state(
    folder: Path, identity: Mapping[str, Any], parameters: list[nn.Parameter], optimizers: Sequence[Optimizer]
) -> int:
    """Put a saved state back in place and return the optimiser steps done; 0 where there is none.

    Raises:
        InvalidRequest: The state is of another run; the first setting, model or data that differs is named.
        CorruptCheckpoint: The state cannot be read.
    """
    path = folder / STATE
    if not path.is_file():
        return 0
    try:
        document = json.loads(path.read_bytes())
        saved, part, step = document["run"], Part(**document["file"]), int(document["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error}") from None
    for key in sorted((identity.keys() | saved.keys()) - FREE):
        if identity.get(key) != saved.get(key):
            raise InvalidRequest(f"--resume: {key} was {saved.get(key)!r}, now {identity.get(key)!r}", param=key)
    tensors = read_part(folder, part)
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(tensors[f"weight.{i}"])
    for number, optimizer in enumerate(optimizers):
        held: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{number}."):
                _, _, index, key = name.split(".", 3)
                held.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": held, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["rng.cpu"])
    return step
