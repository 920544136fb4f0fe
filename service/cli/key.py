"""``latentwire key``."""

from typing import Annotated

import typer

from latentwire.service.auth.keys import key_line, new_key


def key_command(
    name: Annotated[str, typer.Argument(help="Who will use it; limits and stored latents belong to this name.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="infer, evaluate or admin; repeat for several. Without one it reads /metrics and no more."),
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(help=r"Most requests in a minute. \[default: no limit]")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help=r"Most tokens in a minute. \[default: no limit]")
    ] = None,
) -> None:
    """Make an API key: shown once, on stderr. stdout gets its line for LW_API_KEYS_FILE, so that >> appends it."""
    key, digest = new_key()
    line = key_line(name, digest, scope or (), requests_per_minute, tokens_per_minute)
    typer.echo(f"The key of {name}, not shown again: {key}", err=True)
    typer.echo(line)
