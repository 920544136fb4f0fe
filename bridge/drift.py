"""How far the latents of a bridge's texts have drifted from those of the texts that it was trained on.

A latent's norm tells nothing of it: the encoder gives every slot the same. So a checkpoint keeps, for each channel,
mean and spread of its training texts' mean slots, as plain numbers in ``statistics.json`` beside the weights.

Dimensions used in this file:
    N texts    K slots    C latent width
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat, TypeAdapter
from pydantic.dataclasses import dataclass

from latentwire.bridge.config import STRICT, Manifest, parsed
from latentwire.bridge.errors import CorruptCheckpoint
from latentwire.bridge.files import replace_file

log = logging.getLogger(__name__)

STATISTICS = "statistics.json"
FEWEST = 32  # texts whose spread says what is usual
LEAST_STD = 0.01  # of all channels' together: one that hardly varied would drown the others
REMEDY = "(delete it, and calibrate)"


@dataclass(frozen=True, config=STRICT)
class LatentStatistics:
    """Mean and standard deviation (C) of the mean slots of some texts.

    Attributes:
        task: What the texts are of, with ``data_sha256``.
        texts: How many there were, N.
    """

    task: str
    data_sha256: str
    texts: Annotated[int, Field(ge=FEWEST)]
    mean: list[FiniteFloat]
    std: list[Annotated[FiniteFloat, Field(ge=0)]]

    @classmethod
    def of(cls, latents: Sequence[NDArray[np.float32]], task: str, data_sha256: str) -> "LatentStatistics | None":
        """Of latents (K, C) of one text each; None of fewer than ``FEWEST``, or where no text makes a difference.

        Also None where one of them is not finite: that says nothing of what is usual.
        """
        if len(latents) < FEWEST:
            return None
        slots = np.stack([latent.mean(axis=0) for latent in latents]).astype(np.float64)
        if not np.isfinite(slots).all():
            return None
        mean, std = (values.round(6).tolist() for values in (slots.mean(axis=0), slots.std(axis=0)))
        return cls(task, data_sha256, len(latents), mean, std) if any(std) else None

    def drift(self, slots: Sequence[NDArray[np.float32]]) -> float:
        """Distance between the mean of some texts' mean slots (C,) and that of these, in standard deviations.

        It is the root of the mean over channels of ((mean - usual mean) / usual deviation)²: 0 where the texts are of
        the same kind, and 1 where their mean is as far away as a single text of the usual ones is. What the mean of few
        texts is away by chance, 1/N in the square for either side, is taken off (ours).
        """
        mean, std = np.array(self.mean), np.array(self.std)
        away = (np.mean(slots, axis=0) - mean) / std.clip(LEAST_STD * np.sqrt(np.mean(std**2)))
        return float(np.sqrt(max(np.mean(away**2) - 1 / len(slots) - 1 / self.texts, 0.0)))


@dataclass(frozen=True, config=STRICT)
class _File:
    """``statistics.json``."""

    bridge_id: str
    latents: LatentStatistics


_FILE = TypeAdapter(_File)


def load_statistics(folder: Path, manifest: Manifest) -> LatentStatistics | None:
    """The statistics of the checkpoint in ``folder``; None where it has none.

    Those of another encoder are left aside with a warning: they change no answer.

    Raises:
        CorruptCheckpoint: ``statistics.json`` is damaged; the field is named.
    """
    path, width = folder / STATISTICS, manifest.bridge.encoder.latent_dim
    try:
        found = parsed(_FILE.validate_json, path.read_bytes(), str(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    if found.bridge_id != manifest.bridge_id:
        log.warning("%s is of bridge %s, and this one is %s: left aside", path, found.bridge_id, manifest.bridge_id)
        return None
    for name in ("mean", "std"):
        if (have := len(getattr(found.latents, name))) != width:
            raise CorruptCheckpoint(f"{path}: latents.{name} has {have} numbers, expected {width} {REMEDY}")
    return found.latents


def save_statistics(folder: Path, bridge_id: str, statistics: LatentStatistics) -> None:
    """Write ``statistics.json``, whole or not at all."""
    replace_file(folder / STATISTICS, _FILE.dump_json(_File(bridge_id, statistics)) + b"\n")
