"""What an entropy model would save: bits of a code under models learned from training sources, on held-out ones.

A code is a byte on the wire. Under each model, ideal arithmetic coding would need the cross-entropy below; zstandard,
with a dictionary trained on messages, is what a library gives today. The models: how often each code of a codebook
occurs; the same, knowing the slot's code before (counts of pairs, mixed with the former); and a recurrent network that
reads every code so far. A message also has a head (``wire.py``), which no model of codes makes smaller.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
import zstandard
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.record import record
from latentwire.bridge import wire
from latentwire.bridge.bridge import Bridge
from latentwire.bridge.codebooks import VECTORS
from latentwire.bridge.evaluation.tasks import load_task

Codes = list[NDArray[np.uint8]]
ROWS = 32
DICTIONARY = 16 << 10  # bytes


def codes_of(bridge: Bridge, sources: list[str], count: int) -> Codes:
    """Codes (K, n) of each source."""
    assert bridge.model.codebooks is not None
    parts = [sources[start : start + ROWS] for start in range(0, len(sources), ROWS)]
    return [
        bridge.model.codebooks.codes(latent.array, count)
        for part in track(parts, "encode")
        for latent in bridge.encode(part)
    ]


def by_frequency(train: Codes, test: Codes) -> list[float]:
    """Bits of each code of a slot where each has the share of the training codes it had."""
    seen, asked = np.concatenate(train), np.concatenate(test)
    found = []
    for at in range(seen.shape[1]):
        counts = np.bincount(seen[:, at], minlength=VECTORS) + 0.5
        found.append(float(-np.log2(counts / counts.sum())[asked[:, at]].mean()))
    return found


def by_code_before(train: Codes, test: Codes) -> list[float]:
    """The same, given the code before in the same slot (of the slot before, for the first)."""

    def pairs(codes: Codes, at: int) -> tuple[NDArray[Any], NDArray[Any]]:
        if at == 0:
            return np.concatenate([one[:-1, 0] for one in codes]), np.concatenate([one[1:, 0] for one in codes])
        return np.concatenate([one[:, at - 1] for one in codes]), np.concatenate([one[:, at] for one in codes])

    found = []
    for at in range(train[0].shape[1]):
        (before, seen), (given, asked) = pairs(train, at), pairs(test, at)
        alone = np.bincount(seen, minlength=VECTORS) + 0.5
        counts = np.zeros((VECTORS, VECTORS))
        np.add.at(counts, (before, seen), 1)
        strength = 64.0  # of the shares above, as so many codes seen
        shares = (counts + strength * alone / alone.sum()) / (counts.sum(axis=1, keepdims=True) + strength)
        found.append(float(-np.log2(shares)[given, asked].mean()))
    return found


def by_network(train: Codes, test: Codes, epochs: int) -> float:
    """Bits of a code in the mean, under a recurrent network that has read all before it."""
    torch.manual_seed(0)
    n = train[0].shape[1]
    embed, net = torch.nn.Embedding(n * VECTORS + 1, 64), torch.nn.GRU(64, 192, batch_first=True)
    out = torch.nn.ModuleList(torch.nn.Linear(192, VECTORS) for _ in range(n))
    weights = [*embed.parameters(), *net.parameters(), *out.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=3e-3)

    def bits(codes: Codes) -> torch.Tensor:
        flat = [torch.from_numpy(one.astype(np.int64)).flatten() for one in codes]
        wanted = torch.nn.utils.rnn.pad_sequence(flat, batch_first=True, padding_value=-1)
        place = torch.arange(wanted.shape[1]) % n
        ids = torch.where(wanted < 0, 0, wanted + place * VECTORS + 1)
        states, _ = net(embed(torch.nn.functional.pad(ids[:, :-1], (1, 0))))
        losses = [
            torch.nn.functional.cross_entropy(
                out[at](states[:, at::n]).transpose(1, 2), wanted[:, at::n], ignore_index=-1, reduction="sum"
            )
            for at in range(n)
        ]
        return torch.stack(losses).sum() / (wanted >= 0).sum() / math.log(2)

    drawn = np.random.default_rng(0)
    for _ in track(range(epochs), "learn"):
        order = drawn.permutation(len(train))
        for start in range(0, len(order), ROWS):
            optimiser.zero_grad()
            bits([train[i] for i in order[start : start + ROWS]]).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
    with torch.inference_mode():
        return float(bits(test))


def by_zstandard(train: Codes, test: Codes) -> float:
    """Bits of a code where a message's codes are packed by themselves, with a dictionary of training messages."""
    dictionary = zstandard.train_dictionary(DICTIONARY, [one.tobytes() for one in train])
    params = zstandard.ZstdCompressionParameters.from_level(19, write_content_size=0, write_checksum=0, write_dict_id=0)
    packer = zstandard.ZstdCompressor(compression_params=params, dict_data=dictionary)
    return 8 * sum(len(packer.compress(one.tobytes())) for one in test) / sum(one.size for one in test)


def main(
    checkpoint: str = "builtin", task: str = "world", examples: int = 6000, limit: int = 500, epochs: int = 6
) -> None:
    """Measure a quantised CHECKPOINT on LIMIT held-out sources, its models fitted to EXAMPLES training sources."""
    bridge, loaded = Bridge.load(checkpoint), load_task(task)
    sources = {"train": [loaded.train[i].source for i in range(min(examples, len(loaded.train)))]}
    sources["test"] = [example.source for example in loaded.test[:limit]]
    rows: list[dict[str, Any]] = []
    for count in (2, 4, 8):
        train, test = (codes_of(bridge, sources[split], count) for split in ("train", "test"))
        dtype = f"rq{count}"
        slots = sum(map(len, test)) / len(test)
        head = wire.message_bytes(1, bridge.model.config.encoder.latent_dim, wire.as_dtype(dtype)) - count
        before = by_code_before(train, test)
        row = {
            "dtype": dtype,
            "message_bytes": head + slots * count,
            "head_bytes": head,
            "bits": {
                "frequency": by_frequency(train, test),
                "code_before": before,
                "network": by_network(train, test, epochs),
                "zstandard": by_zstandard(train, test),
            },
        }
        best = min(sum(before) / count, row["bits"]["network"])  # type: ignore[index]
        row["message_bytes_at_best"] = head + slots * count * best / 8
        rows.append(row)
    name = f"entropy-{Path(task).stem}"
    record(name, f"python -m benchmarks.entropy --examples {examples} --limit {limit}", {"rows": rows})
    shown = Table("dtype", "message", "bits: frequency", "code before", "network", "zstandard", "message at best")
    for row in rows:
        bits = row["bits"]
        means = (np.mean(bits["frequency"]), np.mean(bits["code_before"]), bits["network"], bits["zstandard"])
        shown.add_row(
            row["dtype"],
            f"{row['message_bytes']:.0f}",
            *(f"{mean:.2f}" for mean in means),
            f"{row['message_bytes_at_best']:.0f}",
        )
    Console().print(shown)


if __name__ == "__main__":
    typer.run(main)
