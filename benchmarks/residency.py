"""Sequential mode measured: encode, then generate, in a budget that fits only the larger of two models.

Each case is a process of its own with random models of 0.55 and 0.95 GB in float32. Asked: at most 1.10 × the larger
model beside what a batch needs. On a CPU the resident set over what was resident before the models came, anonymous and
file-backed apart: weights in the file's own precision are mapped and not copied; converted ones are copied, and the
file's pages, which the kernel may take back at any time, stay mapped until the load ends. On an accelerator the
allocator's peak.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PretrainedConfig

from benchmarks.record import record
from latentwire.bridge import engine
from latentwire.bridge.checkpoint import BridgeModel, make_bridge
from latentwire.bridge.config import BridgeConfig, EncoderConfig, Head, Provenance
from latentwire.bridge.engine import Encoded
from latentwire.bridge.memory import free_caches
from latentwire.bridge.models import BUILTIN, FrozenLM
from latentwire.bridge.prompt import compose, layout_for, place
from latentwire.bridge.reader import tokenize_source
from latentwire.bridge.residency import Residency
from latentwire.bridge.sampling import SamplingParams

SHAPE: dict[str, Any] = {"num_attention_heads": 16, "vocab_size": 32000, "max_position_embeddings": 1024}
MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "sender": lambda: GPTNeoXConfig(hidden_size=768, num_hidden_layers=12, intermediate_size=3072, **SHAPE),
    "receiver": lambda: LlamaConfig(hidden_size=1024, num_hidden_layers=14, intermediate_size=2816, **SHAPE),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS, SOURCE_TOKENS, ANSWER_TOKENS, TURNS = 4, 64, 4, 2
SAMPLE_SECONDS = 0.002


@dataclass(frozen=True)
class Case:
    """How weights are stored, how they are served, and whether both models may stay."""

    stored: str
    served: str
    both: bool = False


CASES = [Case("fp32", "fp32"), Case("fp32", "fp32", both=True), Case("bf16", "bf16"), Case("fp32", "bf16")]


def main() -> None:
    """Measure every case in a process of its own and record the peaks."""
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        for stored in DTYPES:
            for name in MODELS:
                _write(name, stored, Path(folder) / stored / name)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        for number, case in enumerate(CASES):
            command = [sys.executable, "-m", "benchmarks.residency", folder, str(number)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            measured.append({**asdict(case), **json.loads(done.stdout.splitlines()[-1])})
            print(case, measured[-1]["over_larger_ratio"])
    figures = {"rows": ROWS, "source_tokens": SOURCE_TOKENS, "answer_tokens": ANSWER_TOKENS, "turns": TURNS}
    record("residency", "python -m benchmarks.residency", {**figures, "cases": measured})


def _write(name: str, stored: str, folder: Path) -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(MODELS[name](), dtype=DTYPES[stored])  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    for file in (BUILTIN / "llama").glob("tokenizer*.json"):
        shutil.copy(file, folder)


def measure(folder: Path, case: Case) -> dict[str, Any]:
    """Peak bytes of turns of encoding and generating, over what was there before, and what they stand against."""
    names = [str(folder / case.stored / name) for name in MODELS]
    apart = Residency(None, dtype=DTYPES[case.served])
    with apart.use(names[0]) as sender, apart.use(names[1]) as receiver:
        bridge = _bridge(sender, receiver, apart.device)
        weights = [apart.resident()[name] for name in names]
        _read(sender)
        _read(receiver)
        encoded = _encode(bridge, sender)  # makes the kernels
        _answer(bridge, receiver, encoded)
        with _peaks() as activations:
            _answer(bridge, receiver, _encode(bridge, sender))
    del sender, receiver
    freed = {name: apart.unload(path) for name, path in zip(MODELS, names, strict=True)}
    residency = Residency(None if case.both else max(weights), dtype=DTYPES[case.served])
    started = time.perf_counter()
    with _peaks() as peaks:
        for _ in range(TURNS):
            with residency.use(names[0]) as lm:
                _read(lm)
                encoded = _encode(bridge, lm)
            del lm
            with residency.use(names[1]) as lm:
                _read(lm)
                _answer(bridge, lm, encoded)
            del lm
    return {
        "device": residency.device.type,
        "weights_bytes": dict(zip(MODELS, weights, strict=True)),
        "activation_bytes": activations["peak"],
        "peak_bytes": peaks["peak"],
        "peak_anonymous_bytes": peaks.get("RssAnon"),
        "peak_file_bytes": peaks.get("RssFile"),
        "over_larger_ratio": (peaks["peak"] - activations["peak"]) / max(weights),
        "anonymous_over_larger_ratio": (peaks.get("RssAnon", 0) - activations["peak"]) / max(weights),
        "freed_bytes": freed,
        "seconds_per_turn": (time.perf_counter() - started) / TURNS,
        "events": [event for event, _, _ in residency.history],
    }


def _read(lm: FrozenLM) -> None:
    """Touch every weight: a mapped file is resident only where it was read, which would flatter the figures."""
    for parameter in lm.model.parameters():
        parameter.sum()


def _bridge(sender: FrozenLM, receiver: FrozenLM, device: torch.device) -> BridgeModel:
    encoder = EncoderConfig(
        kind="pooling", sender_width=sender.width, latent_dim=128, hidden_dim=256, depth=1, ratio=4, num_latents=16
    )
    head = Head(receiver.ref, layout_for(receiver, "{latent}\nQuestion: {question}\nAnswer:"), receiver.embedding_rms())
    provenance = Provenance("world", "0" * 64, 0, 1, "benchmark", {})
    bridge = make_bridge(BridgeConfig(sender.ref, (8,), SOURCE_TOKENS, encoder, {receiver.name: head}, provenance))
    bridge.encoder.to(device)
    bridge.heads.to(device)
    return bridge


def _encode(bridge: BridgeModel, sender: FrozenLM) -> list[Encoded]:
    texts = [f"{row} " + "Mara wants a cup of tea. " * SOURCE_TOKENS for row in range(ROWS)]
    return engine.encode(
        bridge,
        sender,
        [tokenize_source(sender, t, sender.source_layout, max_tokens=SOURCE_TOKENS, truncate=True) for t in texts],
    )


def _answer(bridge: BridgeModel, receiver: FrozenLM, encoded: list[Encoded]) -> None:
    layout, params = bridge.config.heads[receiver.name].layout, SamplingParams(max_tokens=ANSWER_TOKENS)
    asked = []
    for row in encoded:
        composed = compose(receiver, layout, place(layout, "Who?"), latent=len(row.latent), max_tokens=512)
        asked.append(engine.LatentPrompt(composed, row.latent, params))
    engine.generate_from_latents(bridge, receiver.name, receiver, asked)


@contextmanager
def _peaks() -> Iterator[dict[str, int]]:
    """The most bytes held inside over what was held before: ``peak``, and on a CPU sampled by kind."""
    peaks: dict[str, int] = {}
    free_caches()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield peaks
        peaks["peak"] = torch.cuda.max_memory_allocated() - before
        return
    first, done = _status(), threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            now = _status()
            for kind in ("RssAnon", "RssFile"):
                peaks[kind] = max(peaks.get(kind, 0), now[kind] - first[kind])

    Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark so far
    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield peaks
    finally:
        done.set()
        sampler.join()
    peaks["peak"] = _status()["VmHWM"] - first["VmRSS"]


def _status() -> dict[str, int]:
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[0].startswith(("Vm", "Rss"))}


def command(models: str = "", case: int = -1) -> None:
    """Without arguments the whole benchmark; the arguments are those of its own processes."""
    if case < 0:
        main()
    else:
        print(json.dumps(measure(Path(models), CASES[case])))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    command(arguments[0], int(arguments[1])) if arguments else typer.run(main)
