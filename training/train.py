"""Train a bridge from Python: ``train``, and what it leaves behind."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.config import Manifest
from latentwire.training import loop
from latentwire.training.config import read_config
from latentwire.training.plot import plot


@dataclass(frozen=True)
class TrainingRun:
    """A run that has ended, in its folder ``out``; ``manifest`` says what the checkpoint there is.

    >>> pair = {"sender": "builtin:neox", "receiver": "builtin:llama"}
    >>> run = latentwire.train(**pair, task="world", out=out, max_steps=2, quiet=True)
    >>> run.bridge().encode("Mara sings.")[0].shape
    (2, 128)
    """

    out: Path
    manifest: Manifest

    def bridge(self, **options: Any) -> Bridge:
        """The bridge it trained; options are those of ``Bridge.load``."""
        return Bridge.load(self.out, **options)

    def plot(self) -> list[Path]:
        """Draw its curves as curves.png and curves.html; their paths."""
        return plot(self.out)


def train(
    *,
    sender: str,
    receiver: str | list[str],
    task: str | Path,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> TrainingRun:
    """Train a bridge between two frozen models, as ``latentwire train`` does.

    >>> pair = {"sender": "builtin:neox", "receiver": "builtin:llama"}
    >>> run = latentwire.train(**pair, task="world", out=out, max_steps=2, quiet=True)
    >>> run.manifest.bridge.provenance.steps
    2

    Args:
        sender: The model that reads: ``builtin:…``, a folder or a Hub name.
        receiver: The model that answers, or several.
        task: ``world``, or a task file (.toml).
        out: Folder of the checkpoint.
        resume: Go on from the state in ``out``, if there is one.
        overwrite: Replace the checkpoint in ``out``.
        quiet: Print nothing.
        settings: Every other setting of a run, by the names of ``training.config.TrainConfig``.

    Raises:
        InvalidRequest: A setting is unknown or out of its range, or ``out`` holds a checkpoint already.
        TrainingFailed: The run cannot go on; the last saved checkpoint is kept.
        LatentWireError: A model or a task cannot be read.
    """
    given = {"sender": sender, "receiver": receiver, "task": str(task), "out": Path(out), **settings}
    config = read_config(None, given)
    manifest = loop.train(config, Console(quiet=quiet), resume=resume, overwrite=overwrite)
    return TrainingRun(config.out, manifest)
