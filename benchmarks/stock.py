"""The service against a stock one: ``transformers serve`` with continuous batching, or vLLM; same receiver and texts.

Both are asked through ``/v1/completions``, greedily, with limits of 8 to 128 tokens, by 1, 8 and 32 callers at once on
the same cores; sides take turns. No latent is involved: what is compared is the way from a request to its tokens. The
other's cache and steps get the sizes of ours: left to itself it fills a machine's memory with a cache.

vLLM (``make test-vllm`` installs it) also answers from latents that our engine answers from: how many tokens are equal.
"""

import asyncio
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import typer

from benchmarks import callers
from benchmarks.callers import Met, closed_loop
from benchmarks.direct import ONE_CORE, ROWS, questions
from benchmarks.record import record
from latentwire.bridge.bridge import Bridge
from latentwire.bridge.checkpoint import make_bridge, read_manifest, save_bridge
from latentwire.bridge.config import Head
from latentwire.bridge.models import folder_of, load_model, load_reader
from latentwire.bridge.prompt import layout_for
from latentwire.bridge.results import Latent
from latentwire.service.cli.demo import running
from latentwire.service.cli.signals import ended_by_signals

CALLERS = (1, 8, 32)
START_SECONDS, END_SECONDS = 300.0, 30.0
PORTS = {"latentwire": 8126, "transformers": 8127, "vllm": 8128}


def transformers_serve(model: Path, port: int) -> list[str]:
    """``transformers serve`` of a model, as fast as its flags make it on a CPU."""
    return [
        str(Path(sys.executable).with_name("transformers")), "serve", str(model), "--continuous-batching", "--device",
        "cpu", "--dtype", "float32", "--port", str(port), "--attn-implementation", "sdpa", "--log-level", "error",
        "--cb-block-size", "32", "--cb-num-blocks", "256", "--cb-max-batch-tokens", "512",  # as ours by default
    ]  # fmt: skip


def vllm_serve(model: Path, port: int) -> list[str]:
    """vLLM of a model, from the environment that ``make test-vllm`` makes."""
    return [
        ".venv/vllm/bin/python", "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port),
        "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--generation-config", "vllm",
        "--enable-prompt-embeds", "--max-num-seqs", str(ROWS), "--max-num-batched-tokens", "512", "--max-model-len",
        "512",
    ]  # fmt: skip


STOCK = {"transformers": transformers_serve, "vllm": vllm_serve}
QUIET = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}


@contextmanager
def stock(command: list[str], port: int, log: Path) -> Iterator[None]:
    """A stock server, until the block ends."""
    environment = {**os.environ, **ONE_CORE, **QUIET, "DO_NOT_TRACK": "1"}
    with log.open("wb") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the stock server did not start: {log.read_text()[-2000:]}")
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        yield
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # an engine may be a process of its own
        try:
            server.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def untrained(model: str, folder: Path) -> Path:
    """A bridge to a receiver that was never trained: its soft tokens mean nothing, and are as loud as others."""
    sender, receiver = load_reader("builtin:neox"), load_model(model, device=torch.device("cpu"))
    layout = layout_for(receiver, "{latent}{question}")
    manifest = read_manifest("builtin")
    config = replace(
        manifest.bridge,
        heads={model: Head(receiver.ref, layout, receiver.embedding_rms())},
        source=sender.source_layout,
    )
    torch.manual_seed(0)
    save_bridge(folder, make_bridge(config))
    return folder


def equal_tokens(checkpoint: Path, port: int, count: int = 32) -> dict[str, Any]:
    """Greedy answers from the same latents by our engine and by vLLM: how many are equal, and up to where."""
    here = Bridge.load(checkpoint, device="cpu")
    there = Bridge.load(checkpoint, device="cpu", receiver=f"vllm:http://127.0.0.1:{port}")
    asked = questions(count)
    arrays = [np.asarray(one.source) for one in asked]
    latents = [Latent(here.message(array, "float32"), array.shape, 0, "float32") for array in arrays]
    answers = [
        bridge.generate(latents, [str(one.prompt) for one in asked], max_tokens=32, logprobs=0)
        for bridge in (here, there)
    ]
    there.unload()
    equal = tokens = whole = 0
    for ours, theirs in zip(answers[0].outputs, answers[1].outputs, strict=True):
        said = [[one.token for one in output.logprobs or ()] for output in (ours, theirs)]
        same = next((at for at, pair in enumerate(zip(*said, strict=False)) if pair[0] != pair[1]), min(map(len, said)))
        equal, tokens, whole = equal + same, tokens + max(map(len, said)), whole + (said[0] == said[1])
    return {"answers": count, "equal_answers": whole, "tokens": tokens, "tokens_before_a_difference": equal}


def bodies(model: str, **more: Any) -> list[dict[str, Any]]:
    """The questions of ``benchmarks.direct`` without their latents."""
    return [
        {"model": model, "prompt": one.prompt, "max_tokens": one.params.max_tokens, "temperature": 0, **more}
        for one in questions(256)
    ]


def ask(side: str, asked: list[dict[str, Any]], count: int, seconds: float) -> Met:
    callers.PORT = PORTS[side]
    return asyncio.run(closed_loop("/v1/completions", asked, count, seconds, warm=seconds / 3))


@ended_by_signals()
def main(seconds: float = 8.0, rounds: int = 5, model: str = "builtin:llama", against: str = "transformers") -> None:
    """Measure ROUNDS of both sides at each number of callers, and record them."""
    found: dict[str, Any] = {}
    more: dict[str, Any] = {}
    sides = ("latentwire", against)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        copied = folder / "receiver"
        shutil.copytree(folder_of(model), copied)
        checkpoint = Path("builtin") if model == "builtin:llama" else untrained(str(copied), folder / "bridge")
        asked = {"latentwire": bodies("demo", condition="none"), against: bodies(str(copied))}
        with (
            running(checkpoint, PORTS["latentwire"], folder / "ours", **ONE_CORE, LW_MAX_BATCH=str(ROWS)),
            stock(STOCK[against](copied, PORTS[against]), PORTS[against], folder / "theirs"),
        ):
            for count in CALLERS:
                met: dict[str, list[Met]] = {side: [] for side in sides}
                for _ in range(rounds):
                    for side in sides:
                        met[side].append(ask(side, asked[side], count, seconds))
                rates = {side: [one.tokens_per_second for one in each] for side, each in met.items()}
                found[str(count)] = {
                    "tokens_per_second": rates,
                    "ms": {side: [one.quantiles_ms("200") for one in each] for side, each in met.items()},
                    "statuses": {side: [one.counts() for one in each] for side, each in met.items()},
                    "tokens_ratio": _ratio(*rates.values()),
                    "p99_ratio": _ratio(*([one.quantiles_ms("200")["p99"] for one in each] for each in met.values())),
                }
                print(json.dumps({count: found[str(count)]}), flush=True)
            if against == "vllm":
                more["from_latents"] = equal_tokens(checkpoint, PORTS[against])
                print(json.dumps(more), flush=True)
    name = "stock" if against == "transformers" else f"stock-{against}"
    flags = f"--seconds {seconds:g} --rounds {rounds} --model {Path(model).name} --against {against}"
    record(name, f"python -m benchmarks.stock {flags}", {"callers": found, **more})


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Of each round, and the median of these; 0 where nothing was answered."""
    return statistics.median(our / their if their else 0.0 for our, their in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    typer.run(main)
