"""``latentwire inspect``: what a checkpoint is."""

from typing import Annotated

import typer
from rich.console import Console

Checkpoint = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder, or 'builtin'.")]


def inspect(checkpoint: Checkpoint) -> None:
    """Show what a checkpoint is: models, fingerprints, sizes, gates, codebooks; and whether the models are those."""
    from latentwire.bridge.checkpoint import check_models, folder_of_checkpoint, load_bridge
    from latentwire.bridge.config import dump_manifest
    from latentwire.bridge.drift import load_statistics
    from latentwire.bridge.gate import load_gates

    manifest, bridge = load_bridge(checkpoint)
    folder = folder_of_checkpoint(checkpoint)
    gates, statistics = load_gates(folder, manifest), load_statistics(folder, manifest)
    weights = sum(p.numel() for p in bridge.parameters())
    size = manifest.encoder.bytes + sum(part.bytes for part in manifest.heads.values())
    Console().print_json(dump_manifest(manifest).decode())
    typer.echo(f"{weights:,} weights, {size:,} bytes; every file matches its digest")
    for receiver, gate in gates.items():
        typer.echo(f"gate of {receiver!r}: {gate}")
    if (books := bridge.codebooks) is not None:
        typer.echo(f"{len(books.vectors)} codebooks of {books.about['task']!r}, fitted to {books.about['slots']} slots")
    if statistics is not None:
        typer.echo(f"statistics of the latents of {statistics.texts} texts of {statistics.task!r}")
    check_models(manifest.bridge)
    typer.echo("sender and receivers are the models it was trained with")
