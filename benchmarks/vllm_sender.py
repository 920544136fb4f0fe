"""A sender on vLLM: do its hidden states make our latents, and what do they cost?

vLLM's method ``extract_hidden_states`` writes the states of chosen layers to a file for each request. In vLLM's own
environment, with the layers that the bridge reads and its sender's folder:

    PYTHONPATH=benchmarks VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 .venv/vllm/bin/python -m \\
        vllm.entrypoints.openai.api_server --model SENDER --served-model-name sender --port 8001 --dtype float32 \\
        --enforce-eager --generation-config vllm \\
        --speculative-config '{"method": "extract_hidden_states", "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": [20]}}}' \\
        --kv-transfer-config '{"kv_connector": "HostHiddenStates", "kv_connector_module_path": "vllm_states",
            "kv_role": "kv_producer", "kv_connector_extra_config": {"shared_storage_path": "/tmp/states"}}'

and then ``OMP_NUM_THREADS=1 python -m benchmarks.vllm_sender CHECKPOINT``.
"""

import fcntl
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import typer
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.record import command_of, record
from latentwire.bridge import engine
from latentwire.bridge.bridge import Bridge
from latentwire.bridge.models import FrozenLM, hidden_states, pad_sources
from latentwire.bridge.reader import SourceTokens

SENTENCE = "The quick brown fox jumps over the lazy dog, and Ben lives in Rome. "
REPEATED = (1, 4, 16)
AT_ONCE = 8
ROUNDS = 7


def main(checkpoint: str, url: str = "http://127.0.0.1:8001") -> None:
    """Compare states and latents, time both in turns, and write the result."""
    bridge = Bridge.load(checkpoint)
    server = httpx.Client(base_url=url, trust_env=False, timeout=120, limits=httpx.Limits(max_connections=AT_ONCE))
    sources = [bridge.tokenize((SENTENCE * times).strip()) for times in REPEATED]
    with bridge.lend(bridge.sender) as sender, server, ThreadPoolExecutor(AT_ONCE) as pool:
        layers = list(bridge.model.config.layers)
        rows = [compared(bridge, sender, server, source) for source in sources]
        batch = [sources[1]] * AT_ONCE
        here, there = in_turns(
            lambda: engine.encode(bridge.model, sender, batch),
            lambda: list(pool.map(lambda one: read_there(server, one), batch)),
        )
    figures = {
        "sender": Path(bridge.sender).name, "sender_layers": sender.layers, "layers_read": layers,
        "one_text": rows, "at_once": {"texts": AT_ONCE, "tokens_each": len(batch[0].ids), **milliseconds(here, there)},
    }  # fmt: skip
    record("vllm_sender", command_of("vllm_sender", url=url) + f" {Path(checkpoint).name}", figures)


def read_there(server: httpx.Client, source: SourceTokens) -> tuple[Tensor, int]:
    """The states that the server wrote, float (S, layers, D), and the size of their file, which is deleted."""
    asked = {"model": "sender", "prompt": source.ids, "max_tokens": 1}
    answer = server.post("/v1/completions", json=asked).raise_for_status().json()
    file = Path(answer["kv_transfer_params"]["hidden_states_path"])
    lock = file.with_name(file.name + ".lock")
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        found, size = load_file(file), file.stat().st_size
    file.unlink()
    lock.unlink()
    assert found["token_ids"].tolist() == source.ids
    return found["hidden_states"].float(), size


@torch.inference_mode()
def compared(bridge: Bridge, sender: FrozenLM, server: httpx.Client, source: SourceTokens) -> dict[str, Any]:
    """How far the server's states and the latent made of them are from ours, and milliseconds of both."""
    ids, mask = pad_sources(sender, [source])
    ours = hidden_states(sender, ids, mask, bridge.model.config.layers)
    states, size = read_there(server, source)
    theirs = states.flatten(1)[None]
    (latent,) = engine.encode(bridge.model, sender, [source])
    made, slots = bridge.model.encoder(theirs, mask)
    here, there = in_turns(
        lambda: engine.encode(bridge.model, sender, [source]),
        lambda: bridge.model.encoder(read_there(server, source)[0].flatten(1)[None], mask),
    )
    first = bridge.model.config.layers[0]
    beside = [
        hidden_states(sender, ids, mask, [layer])[0] for layer in (first - 1, first + 1) if layer <= sender.layers
    ]
    return {
        "tokens": len(source.ids),
        "states_relative_difference": float((theirs - ours).norm() / ours.norm()),
        "of_the_layers_beside": [float((states[:, 0] - other).norm() / other.norm()) for other in beside],
        "latent_largest_difference": float(np.abs(made[0][slots[0]].numpy() - latent.latent).max()),
        "latent_rms": float(np.sqrt((latent.latent**2).mean())),
        "file_bytes": size,
        **milliseconds(here, there),
    }


def in_turns(*ways: Callable[[], object]) -> list[list[float]]:
    """Seconds of each way, in turns, after one round that is not counted."""
    took: list[list[float]] = [[] for _ in ways]
    for number in range(ROUNDS + 1):
        for way, seconds in zip(ways, took, strict=True):
            started = time.perf_counter()
            way()
            if number:
                seconds.append(time.perf_counter() - started)
    return took


def milliseconds(here: list[float], there: list[float]) -> dict[str, float]:
    """Medians, and that of the ratios of neighbours in time."""
    return {
        "here_ms": 1000 * statistics.median(here),
        "vllm_ms": 1000 * statistics.median(there),
        "vllm_over_here": statistics.median(b / a for a, b in zip(here, there, strict=True)),
    }


if __name__ == "__main__":
    typer.run(main)
