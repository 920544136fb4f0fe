"""``latentwire encode`` and ``latentwire generate``: with a checkpoint here and now, or with a bridge that is served.

A key for the service is read from LATENTWIRE_API_KEY alone: on a command line others could read it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentwire.bridge.errors import InferenceFailed, InvalidMessage, InvalidRequest

if TYPE_CHECKING:
    from latentwire.service.client.client import Client
    from latentwire.service.client.types import GenerateOptions, Input

Bridge = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder, or 'builtin'; with --url, a bridge's name.")
]
Url = Annotated[str | None, typer.Option(help="Ask this service, with the key in LATENTWIRE_API_KEY if there is one.")]


def encode(
    checkpoint: Bridge,
    text: Annotated[str, typer.Option(help="The text the sender reads.")],
    out_: Annotated[Path, typer.Option("--out", help="File for the message.")],
    dtype: Annotated[str, typer.Option(help="float16, int8 or float32.")] = "float16",
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut a text that is too long.")] = False,
    url: Url = None,
) -> None:
    """Turn a text into a latent, as one message in a file. Runs here, without a server, unless --url names one."""
    made = _encoded_here if url is None else partial(_encoded_there, url)
    message, (K, C), tokens = made(checkpoint, text, dtype, truncate)
    try:
        out_.write_bytes(message)  # half of a message is refused by whoever reads it
    except OSError as error:
        raise InvalidRequest(f"--out {out_}: {error.strerror}", param="out") from None
    typer.echo(f"{out_}: {K}×{C} {dtype}, {len(message)} bytes from {tokens} sender tokens")


def generate(
    checkpoint: Bridge,
    prompt: Annotated[str, typer.Option(help="What the receiver is asked; {latent} places the soft tokens.")],
    text: Annotated[str | None, typer.Option(help="A text for the sender; the receiver does not see it.")] = None,
    latent: Annotated[Path | None, typer.Option(help="A message written by 'latentwire encode'.")] = None,
    receiver: Annotated[str | None, typer.Option(help="Which receiver answers; the first when absent.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the answer.")] = 32,
    temperature: Annotated[
        float, typer.Option(min=0, help="How freely it is sampled; 0 takes the likeliest token.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option(min=1e-6, max=1, help="Sample from the likeliest of this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from this many of the likeliest; 0 from all.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed samples the same answer.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this; repeat for several.")] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut a text that is too long.")] = False,
    url: Url = None,
) -> None:
    """Let the receiver answer from a latent, or a text it will not see. Runs here, unless --url names a service."""
    if (text is None) == (latent is None):
        raise InvalidRequest("give exactly one of --text and --latent")
    asked, stops = prompt.replace("\\n", "\n"), tuple(stop or ())
    if url is not None:
        options: GenerateOptions = {
            "bridge": checkpoint, "receiver": receiver, "max_tokens": max_tokens, "temperature": temperature,
            "top_p": top_p, "top_k": top_k, "seed": seed, "stop": stops, "truncate": truncate,
        }  # fmt: skip
        _say_there(url, text if latent is None else _message(latent), asked, options)
        return
    from latentwire.bridge.local import answer, encode_text, read_latent
    from latentwire.bridge.sampling import SamplingParams

    params = SamplingParams(max_tokens, temperature, top_p, top_k, seed, stops)
    numbers = encode_text(checkpoint, text, truncate=truncate)[1].latent if text is not None else None
    if numbers is None:
        assert latent is not None
        numbers = read_latent(checkpoint, latent)
    typer.echo(answer(checkpoint, receiver, numbers, asked, params).text)


def _encoded_here(checkpoint: str, text: str, dtype: str, truncate: bool) -> tuple[bytes, tuple[int, ...], int]:
    from latentwire.bridge import wire
    from latentwire.bridge.local import encode_text

    manifest, encoded = encode_text(checkpoint, text, truncate=truncate)
    message = wire.encode(encoded.latent, manifest.bridge_id, wire.as_dtype(dtype))
    return message, encoded.latent.shape, encoded.source_tokens


def _encoded_there(url: str, bridge: str, text: str, dtype: str, truncate: bool) -> tuple[bytes, tuple[int, ...], int]:
    with _service(url) as client:
        (latent,) = client.encode(text, bridge=bridge, dtype=dtype, truncate=truncate).latents
    return latent.data, latent.shape, latent.source_tokens


def _say_there(url: str, source: "Input | None", prompt: str, options: "GenerateOptions") -> None:
    """Print an answer; to a terminal as it is said, elsewhere all or nothing."""
    from latentwire.service.client.types import Token

    assert source is not None
    with _service(url) as client:
        if not sys.stdout.isatty():
            typer.echo(client.generate(source, prompt, **options).texts[0])
            return
        for event in client.stream(source, prompt, **options):
            typer.echo(event.text if isinstance(event, Token) else "\n", nl=False)


def _message(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InvalidMessage(f"--latent {file}: {error.strerror}", param="latent") from None


@contextmanager
def _service(url: str) -> "Iterator[Client]":
    """A client whose errors are those of a command: one line, exit code 2."""
    from latentwire.service.client.client import Client, ServiceError

    try:
        client = Client(url)
    except ValueError as error:
        raise InvalidRequest(str(error), param="url") from None
    try:
        with client:
            yield client
    except ServiceError as error:
        raise InferenceFailed(str(error), param=error.param) from None
