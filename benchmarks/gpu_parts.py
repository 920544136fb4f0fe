"""The parts of ``benchmarks.gpu``, and the process that runs some of them: ``python -m benchmarks.gpu_parts``."""

import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_decode import Figures, answers, ask, beside, decode, question, race
from benchmarks.gpu_models import SCALES, Bench, copy_tokenizer, drawn_on, say, write_configurations
from latentwire.bridge.errors import LatentWireError, ModelUnavailable, first_line
from latentwire.bridge.files import replace_file
from latentwire.bridge.generation.base import Kind
from latentwire.bridge.generation.continuous import token_bytes
from latentwire.bridge.generation.select import open_engine
from latentwire.bridge.memory import device_bytes, free_caches, held_bytes, weights_bytes
from latentwire.bridge.models import blocks_of, fingerprint_of, load_model
from latentwire.bridge.parking import HostCopies
from latentwire.bridge.prompt import IGNORE, Row
from latentwire.bridge.sampling import SamplingParams
from latentwire.training import prepare as preparing
from latentwire.training.config import TrainConfig
from latentwire.training.plan import plan
from latentwire.training.prepare import prepare
from latentwire.training.run import Run
from latentwire.training.simulate import Lengths, tokens_of
from latentwire.training.step import take_step
from latentwire.training.tokens import Tokens

REPEATS = 10
CPU_BYTES = 8 << 20
FP8_BLOCK, FP8_MOST = 128, 448.0
STEPS = 3
UNFINISHED = {"error": "ended before it was whole"}


def rates(bench: Bench) -> Figures:
    """Versions, the device, how fast it copies and multiplies."""
    side, count = bench.scale.side, bench.scale.copied_bytes
    here = torch.zeros(count, dtype=torch.uint8, device=bench.device)
    there = torch.empty_like(here)
    left, right = (torch.randn(side, side, device=bench.device, dtype=bench.scale.dtype) for _ in range(2))
    host = torch.zeros(count // 4, dtype=torch.uint8, pin_memory=bench.device.type == "cuda")
    seconds = {
        "copy": _seconds(bench, lambda: there.copy_(here)),
        "host_to_device": _seconds(bench, lambda: there[: len(host)].copy_(host, non_blocking=True)),
        "matmul": _seconds(bench, lambda: left @ right),
    }
    found: Figures = {
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "safetensors")},
        "optional": {name: find_spec(name) is not None for name in ("flash_attn", "kernels", "triton")},
        "memory_bytes": device_bytes(bench.device),
        "copied_bytes_per_second": 2 * count / seconds["copy"],  # read and written
        "host_to_device_bytes_per_second": len(host) / seconds["host_to_device"],
        "matmul_flops_per_second": 2 * side**3 / seconds["matmul"],
        "matmul_dtype": str(bench.scale.dtype).removeprefix("torch."),
    }
    if bench.device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(bench.device)
        found["cuda"] = {"runtime": torch.version.cuda, "capability": torch.cuda.get_device_capability(bench.device)}
    return found


def _seconds(bench: Bench, work: Callable[[], object]) -> float:
    """Of one of several in a row, once the device is warm."""
    work()
    bench.synchronize()
    started = time.perf_counter()
    for _ in range(REPEATS):
        work()
    bench.synchronize()
    return (time.perf_counter() - started) / REPEATS


def load(bench: Bench) -> Figures:
    """From files that were just written, and so lie in the machine's memory, to the device; away from it, and back."""
    folder, file = bench.folder / "stored", bench.folder / "stored" / "model.safetensors"
    lm = bench.lm("exact")
    weights = weights_bytes(lm.model)
    lm.model.save_pretrained(folder, max_shard_size="1TB")
    copy_tokenizer("llama", folder)
    del lm
    free_caches()
    before = held_bytes(bench.device)
    times = dict[str, float]()

    def timed(name: str, work: Callable[[], object]) -> Any:
        started = time.perf_counter()
        made = work()
        bench.synchronize()
        times[name] = time.perf_counter() - started
        bench.say(f"{name}: {weights / times[name] / 1e9:.2f} GB/s")
        return made

    timed("safetensors", lambda: load_file(file, device=str(bench.device)))
    timed("fingerprint", lambda: fingerprint_of(str(folder)))
    lm = timed("load_model", lambda: load_model(str(folder), device=bench.device, dtype=bench.scale.dtype))
    held = held_bytes(bench.device) - before
    copies = HostCopies(2 * weights)
    timed("leaves first", lambda: copies.park(lm))
    timed("returns", lambda: copies.bring("returned", lm.fingerprint, bench.device))
    timed("leaves again", lambda: copies.park(lm))
    del lm
    free_caches()
    return {
        "weights_bytes": weights,
        "seconds": times,
        "bytes_per_second": {name: weights / seconds for name, seconds in times.items()},
        "held_bytes": {"loaded": held, "freed": held_bytes(bench.device) - before},
    }


def fp8(bench: Bench) -> Figures:
    """A checkpoint of 8-bit weights is read as what they stand for, or refused; without a named method, refused."""
    folder = bench.folder / "fp8"
    config = {"quant_method": "fp8", "weight_block_size": [FP8_BLOCK] * 2, "activation_scheme": "dynamic"}
    lm = load_model("builtin:llama", device=bench.device, dtype=torch.float32)
    weights, packed = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, weight in lm.model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")):  # 128 × 128
            scale = weight.abs().amax().reshape(1, 1) / FP8_MOST
            packed[name], packed[f"{name}_scale_inv"] = (weight / scale).to(torch.float8_e4m3fn), scale
            weights[name] = packed[name].float() * scale
        else:
            weights[name] = packed[name] = weight
    lm.model.save_pretrained(folder)
    copy_tokenizer("llama", folder)
    save_file({name: tensor.cpu().contiguous() for name, tensor in packed.items()}, folder / "model.safetensors")
    unnamed = _read_as(bench, folder, weights)
    path = folder / "config.json"
    others = ["lm_head", *(f"model.layers.{i}.mlp" for i in range(lm.layers))]
    named = {**config, "modules_to_not_convert": others}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": named}))
    return {"named": _read_as(bench, folder, weights), "unnamed": unnamed}


def _read_as(bench: Bench, folder: Path, wanted: dict[str, torch.Tensor]) -> Figures:
    try:
        found = load_model(str(folder), device=bench.device, dtype=torch.float32).model.state_dict()
    except ModelUnavailable as error:
        return {"outcome": "refused", "says": first_line(error)}
    apart = max(float((found[name] - weight).abs().max()) for name, weight in wanted.items())
    return {"outcome": "right" if apart < 1e-6 else "WRONG", "largest_difference": apart}


class SmallMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A device of ``CPU_BYTES`` for a dry run, as far as single tensors go: a cache that is made smaller until it fits
    would otherwise take the machine's memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().nbytes() > CPU_BYTES:
            raise torch.OutOfMemoryError(f"out of memory: a dry run has {CPU_BYTES} bytes for a tensor")
        return result


def oversized(bench: Bench) -> Figures:
    """What becomes of an engine whose cache cannot fit, and of the memory and the next engine after it."""
    lm = bench.lm("exact")
    on_gpu, before = bench.device.type == "cuda", held_bytes(bench.device)
    tokens = (2 * device_bytes(bench.device) if on_gpu else 4 * CPU_BYTES) // token_bytes(lm)
    found: Figures = {"kv_tokens": tokens, "token_bytes": token_bytes(lm)}
    tried: dict[str, Kind | None] = {"required": "continuous", "not_required": None}
    for name, required in tried.items():
        started = time.monotonic()
        try:
            with nullcontext() if on_gpu else SmallMemory():  # type: ignore[no-untyped-call]
                made = open_engine(lm, kv_tokens=tokens, required=required)
            with closing(made):
                found[name] = {"opened": made.kind, "capacity_tokens": made.capacity_tokens, "max_rows": made.max_rows}
        except (LatentWireError, RuntimeError) as error:
            found[name] = {"error": type(error).__name__, "says": first_line(error)}
        found[name]["seconds"] = time.monotonic() - started
        bench.say(f"{name}: {found[name]}")
    free_caches()
    found["held_bytes_after"] = held_bytes(bench.device) - before
    asked = question(lm, 0, min(bench.scale.contexts), bench.scale.soft_tokens)
    with closing(open_engine(lm, kv_tokens=1024, required="continuous")) as made:
        found["next_engine_generates"] = len(ask(made, [asked], [SamplingParams(4)])[0].ids)
    return found


def training(bench: Bench) -> Figures:
    """A training step: tokens per second, operations per second, and the peak of memory against the plan's."""
    preparing.CHECKED = 1  # the rows of the step are made here
    source, prompt, answer = bench.scale.lengths
    config = TrainConfig(
        sender=bench.name("sender"), receiver=[bench.name("receiver")], task="world", out=bench.folder / "run",
        cache=bench.folder / "cache", batch_size=max(bench.scale.trained), max_source_tokens=source, max_steps=100,
        alignment_steps=0, validate_every=0, probe_every=0, gradient_checkpointing=True, device=bench.scale.device,
        precision="bf16" if bench.scale.dtype == torch.bfloat16 else "fp32",
    )  # fmt: skip
    planned = plan(config, source_tokens=source, prompt_tokens=prompt, answer_tokens=answer)
    bench.say("planned")
    run, steps = prepare(config, Console(quiet=True)), []
    for rows in bench.scale.trained:
        made = [tokens_of(run, Lengths(source, prompt, answer), i) for i in range(rows)]
        sized = replace(run, config=config.model_copy(update={"batch_size": rows}), micro_batch=rows)
        steps.append({"batch_size": rows, **_trained(bench, sized, made), "planned_bytes": planned.peak_bytes(rows)})
        bench.say(f"{rows} rows: {steps[-1]['seconds']:.2f} s a step")
    return {
        "lengths": {"source": source, "prompt": prompt, "answer": answer},
        "gradient_checkpointing": config.gradient_checkpointing,
        "steps": steps,
    }


def _trained(bench: Bench, run: Run, rows: Sequence[Tokens]) -> Figures:
    take_step(run, 0, rows)  # makes the kernels and the optimiser's state
    bench.synchronize()
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    started = time.perf_counter()
    records = [take_step(run, step, rows) for step in range(1, 1 + STEPS)]
    bench.synchronize()
    seconds = (time.perf_counter() - started) / STEPS
    return {
        "seconds": seconds,
        "tokens_per_second": records[-1].tokens / seconds,
        "flops_per_second": model_flops(run, rows) / seconds,
        # The allocator's own; a CPU cannot tell (``benchmarks.memory`` measures there).
        "peak_bytes": torch.cuda.max_memory_allocated(bench.device) if bench.device.type == "cuda" else None,
        "micro_batch": run.micro_batch,
        "out_of_memory_count": run.out_of_memory_count,
    }


def model_flops(run: Run, rows: Sequence[Tokens]) -> int:
    """Operations that a step needs in the frozen models' matrices: 2 for each weight and token, forwards through the
    sender, forwards and backwards through the receiver. Attention, the bridge and what is computed twice do not count.
    """

    def weights(*modules: Any) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    with run.residency.use(run.config.sender) as sender, run.residency.use(run.config.receivers[0]) as receiver:
        below = weights(*blocks_of(sender)[: max(run.bridge.config.layers)])
        output: Any = receiver.model
        blocks, head = weights(*blocks_of(receiver)), weights(output.get_output_embeddings())
    read: list[Row] = [row for one in rows for row in (one.answer, one.reconstruction) if row is not None]
    labelled = sum(label != IGNORE for row in read for label in row.labels)
    sent = sum(len(one.source.ids) for one in rows)
    return 2 * below * sent + 4 * blocks * sum(map(len, read)) + 4 * head * labelled


PARTS: dict[str, Callable[[Bench], Figures]] = {
    part.__name__: part for part in (rates, decode, race, beside, answers, training, load, fp8, oversized)
}


def attempt(name: str, seconds: float, scale: str, folder: Path) -> None:
    """Leave a part's figures in ``folder``, or how it failed."""
    started = time.monotonic()

    def keep(found: Figures) -> None:
        replace_file(folder / f"{name}.json", json.dumps(found).encode())

    bench = Bench(SCALES[scale], folder, started + seconds, say(name), lambda found: keep({**found, **UNFINISHED}))
    try:
        with drawn_on(bench.device):
            found = PARTS[name](bench)
    except Exception as error:  # of this part: the others run
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {first_line(error)}"}
    keep({**found, "part_seconds": time.monotonic() - started})


def main(scale: str, folder: Path, parts: Mapping[str, float]) -> None:
    """Run parts one after the other, each with so many seconds, and leave its figures in ``folder``."""
    write_configurations(SCALES[scale], folder)
    for name, seconds in parts.items():
        attempt(name, seconds, scale, folder)
        free_caches()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
