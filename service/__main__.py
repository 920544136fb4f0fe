"""The command line, and the one place where training, serving and bridges meet.

Heavy imports stand inside the commands: ``latentwire --help`` must not wait for torch.
"""

import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import latentwire
from latentwire import missing_extra
from latentwire.bridge.errors import InferenceFailed, InvalidRequest, LatentWireError, first_line, shorten
from latentwire.bridge.files import check_writable_file
from latentwire.service.cli.corpus import app as corpus
from latentwire.service.cli.infer import encode, generate, read, score
from latentwire.service.cli.inspect import inspect
from latentwire.service.cli.key import key_command
from latentwire.service.cli.logs import configure, restore
from latentwire.service.cli.report import COMPARISON, compared, report, report_files, say_written, show
from latentwire.service.cli.serve import serve
from latentwire.service.cli.signals import ended_by_signals
from latentwire.service.health import SHARED_MEMORY
from latentwire.training.calibrate import calibrate
from latentwire.training.config import TrainConfig, read_config, read_toml
from latentwire.training.flags import flags_of
from latentwire.training.pretrain import ANSWERING, PretrainConfig
from latentwire.training.publish import pull, push
from latentwire.training.quantise import quantise
from latentwire.training.slurm import app as slurm

if TYPE_CHECKING:
    from latentwire.bridge.evaluation.context import EvaluationContext

# Read when torch is loaded, which happens inside the commands. Threads that spin while they wait made training on a
# busy machine three times slower than threads that sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Segments that grow keep the memory of mixed lengths from falling to pieces; read before the first CUDA call.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

app = typer.Typer(
    name="latentwire", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Train, measure and serve bridges that carry a text from one frozen language model to another as a latent.",
)  # fmt: skip
app.add_typer(slurm, name="slurm")
app.add_typer(corpus, name="corpus")
out, errors = Console(), Console(stderr=True)
# What a command needs beside the client; any other needs ``eval``.
EXTRAS = {"serve": "serve", "demo": "all", **dict.fromkeys(("train", "pretrain", "plan", "plot", "export"), "train")}

Debug = Annotated[bool, typer.Option("--debug", help="Log everything; print some answers, where there are any.")]
LogLevel = Annotated[str, typer.Option(help="Least that is logged: debug, info, warning or error.")]
Receiver = Annotated[str | None, typer.Option(help="Which receiver answers; the checkpoint's first when absent.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        _say(f"latentwire {latentwire.__version__}")
        raise typer.Exit


@app.callback()
def _start(
    context: typer.Context,
    _: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    context.call_on_close(restore)


def _training(kind: type[TrainConfig], without: Collection[str] = ()) -> Callable[..., None]:
    """The command of a run of a kind."""

    @flags_of(kind, without)
    def command(
        resume: Annotated[
            bool, typer.Option("--resume", help="Go on from the state in --out, if there is one.")
        ] = False,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in --out.")] = False,
        find_lr: Annotated[
            bool, typer.Option("--find-lr", help="Train nothing: try growing learning rates, and suggest some.")
        ] = False,
        debug: Debug = False,
        log_level: LogLevel = "warning",
        **flags: Any,
    ) -> None:
        from latentwire.training.loop import train as run

        shown = {"debug_print_first": 3, "debug_topk": 5} if debug and kind is TrainConfig else {}
        settings = read_config(flags.pop("config", None), shown | _given(flags), kind)
        started, level = time.monotonic(), "debug" if debug else log_level
        configure(level, console=errors)
        if find_lr:
            _find_lr(settings, resume=resume, overwrite=overwrite)
            return
        keep_log = partial(configure, level, file=settings.out / "run.log", console=errors)
        manifest = run(settings, out, resume=resume, overwrite=overwrite, ready=keep_log)
        _say(f"{settings.out} holds bridge {manifest.bridge_id}, {time.monotonic() - started:.0f} s")

    return command


train = app.command("train", help="Train a bridge between two frozen models.")(_training(TrainConfig))
pretrain = app.command("pretrain", help="Train a bridge on plain text, before 'train --init' trains it for a task.")(
    _training(PretrainConfig, ANSWERING)
)


def _find_lr(settings: TrainConfig, *, resume: bool, overwrite: bool) -> None:
    """Suggest learning rates for a run, of which nothing is kept but the curve."""
    from latentwire.training.find_lr import beside
    from latentwire.training.find_lr import find_lr as test

    if resume or overwrite:
        given = "--resume" if resume else "--overwrite"
        raise InvalidRequest(f"--find-lr begins nothing and continues nothing; give it without {given}")
    check_writable_file(beside(settings.out, ".json"))
    found = test(settings, out)
    ends = f"{found.matrix_learning_rates[0]:.1g} to {found.matrix_learning_rates[-1]:.2g}"
    how = "where the loss blew up" if found.blown_up else "the highest tried"
    _say(f"loss {found.curve} {found.smoothed[-1]:.3f}, matrix learning rates {ends}, {how}")
    _say(f"suggested: {found.flags}")
    _say(f"{beside(settings.out, '.json')} and .png hold the curve")


@app.command()
@flags_of(TrainConfig)
def plan(
    source_tokens: Annotated[
        int | None, typer.Option(min=1, help=r"Longest source. \[default: --max-source-tokens]")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Longest prompt, in receiver tokens.")] = 32,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in receiver tokens.")] = 32,
    device_memory: Annotated[
        str | None, typer.Option(help=r"Memory of the device, e.g. 80GB. \[default: this one's]")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also take a few real steps and say how long the run takes.")
    ] = False,
    **flags: Any,
) -> None:
    """Predict the peak memory of a training run, and what would fit; reads configurations only, but for --measure."""
    from latentwire.bridge.devices import device_named
    from latentwire.training.machine import memory_of
    from latentwire.training.plan import plan as predict
    from latentwire.training.plan import table

    file = flags.pop("config", None)
    kind = PretrainConfig if "text" in read_toml(file) else TrainConfig
    settings = read_config(file, ({} if file else {"task": "world", "out": Path("unused")}) | _given(flags), kind)
    device = _bytes(device_memory) if device_memory else memory_of(device_named(settings.device)).device_bytes
    source = source_tokens or settings.max_source_tokens
    with out.status("simulating a step, and what would change it"):
        made = predict(
            settings, source_tokens=source, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens,
            device_bytes=device, compare=True,
        )  # fmt: skip
    out.print(table(made))
    if measure:
        from latentwire.training.duration import measure as take_steps

        _say(str(take_steps(settings, out)))


@app.command()
def plot(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The --out folder of a training run.")],
    out_: Annotated[Path | None, typer.Option("--out", help=r"Folder for the pictures. \[default: RUN]")] = None,
) -> None:
    """Draw a run's curves, as curves.png and as a page curves.html."""
    from latentwire.training.plot import plot as draw

    for path in draw(run, out_):
        _say(str(path))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The --out folder of a training run.")],
    out_: Annotated[Path, typer.Option("--out", help="Folder for the checkpoint.")],
    best: Annotated[bool, typer.Option("--best", help="The best one by validation, not the last.")] = False,
) -> None:
    """Write a run's checkpoint without its resumable state."""
    from latentwire.training.export import export as export_run

    done = export_run(run, out_, best=best)
    _say(
        f"{out_}: {done.checkpoint_bytes:,} bytes, bridge {done.manifest.bridge_id}; "
        f"the resumable states of {run} take {done.state_bytes:,} bytes"
    )


@app.command()
def evaluate(
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="CHECKPOINT…", help="Checkpoint folders, or 'builtin'; several are compared.")
    ],
    task: Annotated[str, typer.Option(help="'world' or a task file (.toml).")],
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first N test examples.")] = None,
    out_: Annotated[
        Path | None,
        typer.Option("--out", help="The report: JSON, or a page (.html). Of several checkpoints, a folder for them."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="What latents travel in, as of 'encode'.")] = "float16",
    receiver: Receiver = None,
    device: Annotated[
        str | None, typer.Option(help=r"Where models compute; as in 'train'. \[default: the best there is]")
    ] = None,
    precision: Annotated[str | None, typer.Option(help=r"bf16, fp16 or fp32. \[default: bf16; fp32 on a CPU]")] = None,
    controls: Annotated[
        bool, typer.Option("--controls", help="Also train and measure every control, each as long as the bridge.")
    ] = False,
    control: Annotated[
        list[str] | None,
        typer.Option(help="Train and measure this control: direct_tuned, receiver_lora, probe, prompt, random_sender."),
    ] = None,
    latency: Annotated[
        bool, typer.Option("--latency", help="Also time 16 tokens of every side: warm, in turns, 1 and 8 at once.")
    ] = False,
    debug: Debug = False,
    log_level: LogLevel = "warning",
    debug_print_first: Annotated[int, typer.Option(min=0, help="Print the first N answers from latents.")] = 0,
    debug_topk: Annotated[int, typer.Option(min=0, help="Print the N likeliest first answer tokens.")] = 0,
) -> None:
    """Measure a bridge against every condition, and print one table."""
    from latentwire.bridge.checkpoint import read_manifest
    from latentwire.bridge.evaluation.conditions import TRAINED
    from latentwire.bridge.evaluation.debug import shown
    from latentwire.bridge.evaluation.html import save
    from latentwire.training.controls import check_controls, train_controls

    check_controls(control or ())
    configure("debug" if debug else log_level, console=errors)
    files = report_files(checkpoints, out_)
    for planned in filter(None, files.values()):
        check_writable_file(planned)
    for checkpoint in checkpoints:  # one that is not there is named before the first is measured
        read_manifest(checkpoint)
    first, topk = debug_print_first or 3 * debug, debug_topk or 5 * debug
    documents = {}
    for checkpoint, file in files.items():
        context = _open(checkpoint, task, limit, dtype, receiver, device, precision)
        for line in shown(context, context.latents(range(min(max(first, 1), len(context.examples)))), first, topk):
            _say(line)
        trained = train_controls(context, out, TRAINED if controls else control or ())
        document = documents[str(file or checkpoint)] = _measure(context, trained, latency)
        if file is not None:
            save(file, document)
            say_written(file, out)
    if len(documents) > 1:
        compared(documents, None if out_ is None else out_ / COMPARISON, out)


app.command()(calibrate)
app.command()(quantise)
app.command()(report)
app.command()(encode)
app.command()(generate)
app.command()(score)
app.command()(read)


app.command()(inspect)
app.command()(serve)
app.command()(push)
app.command()(pull)


@app.command()
@ended_by_signals()
def demo(
    out_: Annotated[Path, typer.Option("--out", help="Folder of the demo's checkpoint.")] = Path("runs/demo"),
    serve_: Annotated[bool, typer.Option("--serve/--no-serve", help="Stay up after the requests.")] = True,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the service.")] = 8000,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Fewer steps make a quicker, worse bridge.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Held-out examples per condition.")] = 100,
) -> None:
    """Train a bridge between the built-in models, measure it, serve it and ask it something.

    Ctrl-C ends it at any moment: with exit code 0, and with nothing left running.
    """
    from latentwire.service.cli.demo import ask, check_free, running
    from latentwire.training.config import demo_config
    from latentwire.training.loop import train as run

    check_free(port)
    config = demo_config(out_, max_steps)
    started = time.monotonic()
    out.rule("train: two frozen models, a bridge between them")
    run(config, out, overwrite=True)
    out.print(f"trained in {time.monotonic() - started:.0f} s")
    out.rule("evaluate: what crossed, on facts never seen in training")
    context = _open(str(out_), "world", limit, "float16", None)
    _measure(context, {})
    out.rule("serve: the same bridge over HTTP")
    log_file = out_ / "serve.log"
    with running(out_, port, log_file) as server:
        ask(out, port, context.examples[0])
        if serve_:
            _say(f"\nServing on http://127.0.0.1:{port} (reference: /docs, metrics: /metrics). Ctrl-C ends it.")
            if code := server.wait():
                raise InferenceFailed(f"the service ended by itself, with exit code {code}; see {log_file}")


app.command("key")(key_command)


def _say(line: str) -> None:
    """Print a line as it is: others read it, and a name in it is no markup."""
    out.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None}


def _bytes(text: str) -> int:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        raise InvalidRequest(f"--device-memory {text!r}: expected a size like 80GB", param="device_memory") from None


def _settle_temporary_folder() -> None:
    """Libraries want one when they are loaded. Where the root is read-only and none is mounted, there is memory."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        if not os.access(SHARED_MEMORY, os.W_OK):
            raise InvalidRequest(
                "no temporary folder can be written; mount one at /tmp or name one in TMPDIR"
            ) from None
        tempfile.tempdir = os.environ["TMPDIR"] = str(SHARED_MEMORY)


def _open(
    checkpoint: str, task: str, limit: int | None, dtype: str, receiver: str | None,
    device: str | None = None, precision: str | None = None,
) -> "EvaluationContext":  # fmt: skip
    from latentwire.bridge.evaluation.context import open_context
    from latentwire.bridge.wire import as_dtype

    return open_context(
        checkpoint, task, limit=limit, dtype=as_dtype(dtype), receiver=receiver, device=device, precision=precision
    )


def _measure(
    context: "EvaluationContext", trained: "dict[str, EvaluationContext]", timed: bool = False
) -> dict[str, Any]:
    from latentwire.bridge.evaluation.evaluate import progress_bar
    from latentwire.bridge.evaluation.latency import latency
    from latentwire.bridge.evaluation.measure import measure

    with progress_bar(out) as progress:
        command = shlex.join(["latentwire", *sys.argv[1:]])
        document = measure(context, trained=trained, progress=progress, keep_examples=True, command=command)
        document |= {"latency": latency(context, progress=progress)} if timed else {}
    show(document, out)
    return document


def main() -> None:
    """Entry point of ``latentwire`` and ``python -m latentwire``: bad input is one line and exit code 2."""
    try:
        _settle_temporary_folder()
        app()
    except LatentWireError as error:
        print(f"latentwire: {first_line(error)}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if (message := missing_extra(error, EXTRAS.get(sys.argv[1], "eval"))) is None:
            raise
        print(f"latentwire: {message}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"latentwire: {shorten(str(error.filename), 200)!r}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
