"""``latentwire push`` and ``pull``: checkpoints to and from the Hugging Face Hub.

Importing this module needs no torch.
"""

from pathlib import Path
from typing import Annotated

import typer


def push(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder, or a run's.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub; made where it is not there.")],
    report: Annotated[
        Path | None, typer.Option(help="Report of 'evaluate' for the model card; its texts stay here.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    message: Annotated[str, typer.Option(help="Message of the commit.")] = "A checkpoint of LatentWire",
) -> None:
    """Put a checkpoint on the Hugging Face Hub, with a model card.

    The token is HF_TOKEN, or that of 'hf auth login'.
    """
    from latentwire.training.hub import push_to_hub

    typer.echo(push_to_hub(checkpoint, repository, report=report, private=private, message=message))


def pull(
    checkpoint: Annotated[str, typer.Argument(metavar="NAME", help="OWNER/NAME on the Hub, with @REVISION if wanted.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint.")],
) -> None:
    """Write a checkpoint of the Hugging Face Hub into a folder, once all of it is here and whole."""
    from latentwire.training.hub import pull as run

    made = run(checkpoint, out)
    typer.echo(f"{out} holds bridge {made.manifest.bridge_id}: {made.checkpoint_bytes:,} bytes of weights")
