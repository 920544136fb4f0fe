"""``latentwire encode``, ``generate``, ``score`` and ``read``: with a checkpoint here and now, or one that is served.

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
from latentwire.service.cli.corpus import encode_here

if TYPE_CHECKING:
    from latentwire.bridge import bridge
    from latentwire.bridge.results import Latent
    from latentwire.service.client.client import Client
    from latentwire.service.client.types import GenerateOptions, Input, ReadOptions, ScoreOptions

Bridge = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder, or 'builtin'; with --url, a bridge's name.")
]
Url = Annotated[str | None, typer.Option(help="Ask this service, with the key in LATENTWIRE_API_KEY if there is one.")]


def encode(
    checkpoint: Bridge,
    out_: Annotated[Path, typer.Option("--out", help="File for the message, or for the corpus.")],
    text: Annotated[str | None, typer.Option(help="The text the sender reads.")] = None,
    input_: Annotated[
        Path | None, typer.Option("--input", help="A .jsonl[.gz] file of documents, for a corpus: an object each line.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float16, int8, int4, float32; quantised: rq2, rq4, rq8.")] = "float16",
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut a text that is too long.")] = False,
    text_field: Annotated[str, typer.Option(help="With --input: the field that holds a text.")] = "text",
    id_field: Annotated[
        str | None, typer.Option(help=r"With --input: the field that holds an id. \[default: the number of the line]")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="With --input: a field to keep beside each latent; repeat for several.")
    ] = None,
    keep_text: Annotated[bool, typer.Option("--keep-text", help="With --input: keep the texts too.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --input: begin anew, not where an earlier run stopped.")
    ] = False,
    url: Url = None,
) -> None:
    """Turn a text into a latent, as one message in a file, or many documents into a corpus: killed, it goes on.

    Runs here, without a server, unless --url names one, which takes a text.
    """
    if (text is None) == (input_ is None):
        raise InvalidRequest("give exactly one of --text and --input")
    if input_ is not None:
        if url is not None:
            raise InvalidRequest("--input runs here; --url takes --text", param="input")
        encode_here(
            checkpoint, input_, out_, dtype=dtype, truncate=truncate, keep_text=keep_text, overwrite=overwrite,
            text_field=text_field, id_field=id_field, keep=tuple(keep or ()),
        )  # fmt: skip
        return
    assert text is not None
    made = _encoded_here if url is None else partial(_encoded_there, url)
    latent = made(checkpoint, text, dtype, truncate)
    try:
        out_.write_bytes(latent.data)  # half of a message is refused by whoever reads it
    except OSError as error:
        raise InvalidRequest(f"--out {out_}: {error.strerror}", param="out") from None
    K, C = latent.shape
    typer.echo(f"{out_}: {K}×{C} {dtype}, {len(latent.data)} bytes from {latent.source_tokens} sender tokens")


def generate(
    checkpoint: Bridge,
    prompt: Annotated[str, typer.Option(help="What the receiver is asked; {latent} places the soft tokens.")],
    text: Annotated[str | None, typer.Option(help="A text for the sender; the receiver does not see it.")] = None,
    latent: Annotated[Path | None, typer.Option(help="A message written by 'latentwire encode'.")] = None,
    receiver: Annotated[
        str | None,
        typer.Option(help="Which receiver answers, or vllm:http://HOST:PORT where it does; the first when absent."),
    ] = None,
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
    message = b"" if latent is None else _message(latent)
    asked, stops = prompt.replace("\\n", "\n"), tuple(stop or ())
    if url is not None:
        options: GenerateOptions = {
            "bridge": checkpoint, "receiver": receiver, "max_tokens": max_tokens, "temperature": temperature,
            "top_p": top_p, "top_k": top_k, "seed": seed, "stop": stops, "truncate": truncate,
        }  # fmt: skip
        _say_there(url, message if text is None else text, asked, options)
        return
    here, receiver = _opened(checkpoint, receiver)
    source = here.encode(text, dtype="float32", truncate=truncate)[0] if text is not None else message
    here.unload()  # one model in memory at a time
    answers = here.generate(
        source, asked, receiver=receiver, max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
        seed=seed, stop=stops,
    )  # fmt: skip
    typer.echo(answers.texts[0])


def score(
    checkpoint: Bridge,
    prompt: Annotated[str, typer.Option(help="What the receiver is asked; {latent} places the soft tokens.")],
    choice: Annotated[list[str], typer.Option(help="What may follow, with the space that leads it; repeat for each.")],
    text: Annotated[str | None, typer.Option(help="A text for the sender; the receiver does not see it.")] = None,
    latent: Annotated[Path | None, typer.Option(help="A message written by 'latentwire encode'.")] = None,
    receiver: Annotated[str | None, typer.Option(help="Which receiver is asked; the first when absent.")] = None,
    end: Annotated[bool, typer.Option("--end/--no-end", help="Exactly this is said; or it may go on.")] = True,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut a text that is too long.")] = False,
    url: Url = None,
) -> None:
    """Show how likely the receiver finds each choice, the likeliest first. Runs here, unless --url names a service."""
    if (text is None) == (latent is None):
        raise InvalidRequest("give exactly one of --text and --latent")
    message = b"" if latent is None else _message(latent)
    given = prompt.replace("\\n", "\n"), [one.replace("\\n", "\n") for one in choice]
    if url is not None:
        with _service(url) as client:
            options: ScoreOptions = {"bridge": checkpoint, "receiver": receiver, "end": end, "truncate": truncate}
            scored = client.score(message if text is None else text, *given, **options)
    else:
        here, receiver = _opened(checkpoint, receiver)
        source = message if text is None else here.encode(text, dtype="float32", truncate=truncate)[0]
        here.unload()  # one model in memory at a time
        scored = here.score(source, *given, receiver=receiver, end=end)
    for one in sorted(scored[0].choices, key=lambda one: -one.logprob):
        typer.echo(f"{one.probability:.4f}  {one.logprob:9.3f} nats  {one.token_count:3} tokens  {one.text!r}")


def read(
    checkpoint: Bridge,
    latent: Annotated[
        list[Path] | None, typer.Option(help="A message written by 'latentwire encode'; repeat for several.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text for the sender; repeat for several.")] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="What the message should say, to see how likely that is; one for each.")
    ] = None,
    receiver: Annotated[str | None, typer.Option(help="Which receiver reads; the first when absent.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help=r"Most tokens of a reading. \[default: by the size of the latent]")
    ] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut a text that is too long.")] = False,
    url: Url = None,
) -> None:
    """Show what the receiver takes messages to say, from the latent alone. Runs here, unless --url names a service."""
    if bool(text) == bool(latent):
        raise InvalidRequest("give exactly one of --text and --latent")
    messages, originals = [_message(file) for file in latent or ()], against or None
    if url is not None:
        with _service(url) as client:
            options: ReadOptions = {
                "bridge": checkpoint, "receiver": receiver, "against": originals, "max_tokens": max_tokens,
                "truncate": truncate,
            }  # fmt: skip
            back = client.read(text or messages, **options)
    else:
        here, receiver = _opened(checkpoint, receiver)
        sources = here.encode(text, dtype="float32", truncate=truncate) if text else messages
        here.unload()  # one model in memory at a time
        back = here.read(sources, against=originals, receiver=receiver, max_tokens=max_tokens)
    if not back.trained:
        untaught = "was not trained to repeat without mode tokens: what it says is no evidence of what a latent holds"
        typer.echo(f"latentwire: {checkpoint} {untaught}", err=True)
    for reading in back.readings:
        cut = "  cut at --max-tokens" if reading.finish_reason == "length" else ""
        for said, what in ((reading, "says"), (reading.against, "against")):
            if said is not None:
                nats = f"{said.logprob:9.3f} nats  {said.token_count:3} tokens"
                typer.echo(f"{what:7}  {nats}  {said.text!r}{cut if said is reading else ''}")


def _opened(checkpoint: str, receiver: str | None) -> "tuple[bridge.Bridge, str]":
    """A checkpoint and which of its receivers is asked, here or where an address says."""
    from latentwire.bridge.bridge import Bridge
    from latentwire.bridge.remote import is_address

    remote = receiver if is_address(receiver) else None
    here = Bridge.load(checkpoint, receiver=remote)
    return here, next(iter(here.remote)) if remote else here.receiver(receiver)


def _encoded_here(checkpoint: str, text: str, dtype: str, truncate: bool) -> "Latent":
    from latentwire.bridge.bridge import Bridge

    return Bridge.load(checkpoint).encode(text, dtype=dtype, truncate=truncate)[0]


def _encoded_there(url: str, bridge: str, text: str, dtype: str, truncate: bool) -> "Latent":
    with _service(url) as client:
        return client.encode(text, bridge=bridge, dtype=dtype, truncate=truncate).latents[0]


def _say_there(url: str, source: "Input", prompt: str, options: "GenerateOptions") -> None:
    """Print an answer; to a terminal as it is said, elsewhere all or nothing."""
    from latentwire.service.client.types import Token

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
    from latentwire.service.client.client import Client
    from latentwire.service.client.types import ServiceError

    try:
        client = Client(url)
    except ValueError as error:
        raise InvalidRequest(str(error), param="url") from None
    try:
        with client:
            yield client
    except ServiceError as error:
        raise InferenceFailed(str(error), param=error.param) from None
