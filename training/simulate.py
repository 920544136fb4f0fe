"""A training step on models whose tensors have shapes but no bytes, and what is alive at each of its moments."""

import gc
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.amp.grad_scaler import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from latentwire.bridge.checkpoint import BridgeModel, make_bridge
from latentwire.bridge.config import RANDOM, Fingerprint
from latentwire.bridge.devices import DTYPES, default_device, default_dtype
from latentwire.bridge.encoder import encoder_class, slots_of
from latentwire.bridge.errors import ModelUnavailable, first_line
from latentwire.bridge.evaluation.tasks import Task
from latentwire.bridge.families import Role, check_usable
from latentwire.bridge.models import FrozenLM, folder_of, revision_of, stack_of
from latentwire.bridge.prompt import IGNORE, TEXT, Row, layout_for
from latentwire.bridge.quantised import dequantised
from latentwire.bridge.reader import SourceTokens
from latentwire.bridge.residency import Residency
from latentwire.training.config import TrainConfig
from latentwire.training.features import CachedStates, LiveStates, States
from latentwire.training.machine import Ranks, gradient_checkpointing
from latentwire.training.prepare import describe, head_of, learned_modes, optimisers, with_heads
from latentwire.training.pretrain import PretrainConfig
from latentwire.training.run import Run
from latentwire.training.step import take_step
from latentwire.training.tokens import Tokens

ROWS, DEPTHS = (2, 3), (3, 4)  # batch sizes and receiver blocks that are run; one row has no other row to compare with
TEMPLATE_TOKENS = 12  # tokens of the sentence that asks for a repetition
WORKING = "gradients in flight, losses, update"
SENDER, RECEIVER, TRAINED, GRADIENTS = "sender weights", "receiver weights", "trained weights", "trained gradients"
PARTS = (SENDER, RECEIVER, TRAINED, GRADIENTS, "optimiser state", "sender states", "bridge activations",
         "receiver activations", "passes without gradient", "logits", WORKING)  # fmt: skip
Cost = dict[str, tuple[int, int]]
"""By part: bytes whatever the batch, and bytes for each row."""
Moments = dict[tuple[str, int, int], Counter[str]]
"""Bytes alive by part, by (segment of the step, how often it was entered, allocation in it)."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of the longest example."""

    source: int
    prompt: int
    answer: int


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes alive by part, noted at every allocation; moments are known by segment (block and pass) at any depth."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part, self.live, self.moments = WORKING, Counter[str](), Moments()
        self.vocabulary = 0
        self._segment: str | None = None
        self._entered, self._index = Counter[str](), 0
        self._held: dict[int, tuple[str, int, Any]] = {}

    def restart(self) -> None:
        """Forget the moments so far."""
        self.moments, self._entered, self.part = {}, Counter(), WORKING
        self.enter("before")

    def enter(self, segment: str | None) -> None:
        """What follows belongs to ``segment``; None: blocks between first and last, whose memory lies between."""
        self._segment, self._index = segment, 0
        self._entered[segment or ""] += 1

    @contextmanager
    def charged(self, part: str) -> Iterator[None]:
        """What is allocated inside belongs to ``part``."""
        before, self.part = self.part, part
        yield
        self.part = before

    def hold(self, tensor: Tensor, part: str) -> None:
        """Count a tensor's storage as ``part``, whatever it was counted as."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._drop(key)
        self._held[key] = (part, storage.nbytes(), weakref.ref(storage, lambda _: self._drop(key)))
        self.live[part] += storage.nbytes()

    def _drop(self, key: int) -> None:
        part, size, _ = self._held.pop(key, (WORKING, 0, None))
        self.live[part] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return torch.zeros((), dtype=args[0].dtype).item()  # what is logged of numbers nobody computes
        result = func(*args, **(kwargs or {}))
        new = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self._held]
        for tensor in new:
            self.hold(tensor, "logits" if self.vocabulary in tensor.shape else self.part)
        if self._segment is not None and any(isinstance(tensor, FakeTensor) for tensor in new):
            moment = self.live.copy()
            if func is torch.ops.aten._log_softmax.default and not args[0].is_contiguous():
                moment["logits"] += args[0].nbytes  # the kernel makes a contiguous copy that no dispatcher sees
            self.moments[self._segment, self._entered[self._segment], self._index] = moment
            self._index += 1
        return result


def total(cost: Cost) -> tuple[int, int]:
    """All parts together: bytes whatever the batch, and bytes for each row."""
    fixed, row = zip(*cost.values(), strict=True)
    return sum(fixed), sum(row)


def moments_of(config: TrainConfig, lengths: Lengths) -> tuple[Cost, ...]:
    found = [cost for name in config.receivers for cost in _simulate(config, name, lengths)]
    fixed, row = np.array([total(cost) for cost in found]).T
    peaks = {int((fixed + rows * row).argmax()) for rows in range(1, 4097)}
    return tuple(found[i] for i in sorted(peaks))


def _simulate(config: TrainConfig, name: str, lengths: Lengths) -> list[Cost]:
    """Every moment of a step with one of the receivers."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        device = torch.device(config.device) if config.device else default_device()  # of another machine, maybe
        dtype = DTYPES[config.precision] if config.precision else default_dtype(device)
        lms = {each: _shapes(each, dtype, "receiver") for each in config.receivers}
        sender, receiver = _shapes(config.sender, dtype, "sender"), lms[name]
    held = [(RECEIVER, lm.model) for lm in lms.values()]
    if not config.cache_features and config.sender not in lms:
        held.append((SENDER, sender.model))
    ledger = Ledger()
    stack, depth = stack_of(receiver), receiver.layers
    if config.gradient_checkpointing:
        gradient_checkpointing(receiver)
    _watch(ledger, receiver, stack)
    whole = list(stack)  # keeps what is cut: freed by the garbage collector at any time, it would seem a cost of rows
    depths = DEPTHS if _alike(receiver, stack) and depth > DEPTHS[1] else (depth,)
    with ledger:
        for part, model in held:
            for tensor in (*model.parameters(), *model.buffers()):
                ledger.hold(tensor, part)
        run = _prepare(config, sender, receiver, lms, ledger, mode, lengths)
        runs: list[dict[int, Moments]] = []
        for blocks in sorted(depths, reverse=True):
            del stack[blocks:]
            receiver.model.config.get_text_config().num_hidden_layers = blocks
            runs.append({rows: _step(run, ledger, rows) for rows in ROWS})
    assert len(whole) == depth
    return _extend(runs, sorted(depths, reverse=True), depth)


def _extend(runs: list[Any], depths: Sequence[int], depth: int) -> list[Cost]:
    """Each moment's cost at the real depth; what is linear is known from two points."""

    def line(values: Sequence[int], at: Sequence[int], to: int) -> int:
        return values[0] if len(values) == 1 else values[0] + (values[0] - values[1]) * (to - at[0]) // (at[0] - at[1])

    shared = set.intersection(*(set(moments) for by_rows in runs for moments in by_rows.values()))
    costs = []
    for key in shared:
        cost: Cost = {}
        for part in PARTS:
            few, many = ([by_rows[rows][key][part] for by_rows in runs] for rows in ROWS)
            row = [(m - f) // (ROWS[1] - ROWS[0]) for f, m in zip(few, many, strict=True)]
            fixed = [f - ROWS[0] * r for f, r in zip(few, row, strict=True)]
            cost[part] = (line(fixed, depths, depth), line(row, depths, depth))
        costs.append(cost)
    return costs


def _shapes(name: str, dtype: torch.dtype, role: Role) -> FrozenLM:
    """A model of the right shapes; call it under a ``FakeTensorMode``."""
    plain = name.removeprefix(RANDOM)
    try:
        local = plain.startswith("builtin:") or Path(plain).exists()
        where, revision = (folder_of(plain), None) if local else revision_of(plain)
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=False)
        check_usable(name, config, role)
        model = AutoModelForCausalLM.from_config(dequantised(config), dtype=dtype)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelUnavailable(f"model {name!r} cannot be planned: {first_line(error)}") from None
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)  # type: ignore[no-untyped-call]
    model = model.eval().requires_grad_(False)
    return FrozenLM(name, tokenizer, model.config, (1,), model, Fingerprint("", "", ""))


def _alike(lm: FrozenLM, stack: nn.ModuleList) -> bool:
    """Whether every block has the same shapes and the same kind of attention, so that few stand for all."""
    kinds = getattr(lm.model.config.get_text_config(), "layer_types", None) or [""]
    return len({str([p.shape for p in block.parameters()]) for block in stack}) == len(set(kinds)) == 1


def _watch(ledger: Ledger, lm: FrozenLM, stack: nn.ModuleList) -> None:
    """Tell the ledger which block of the receiver runs, forwards or backwards."""
    whole = len(stack)

    def role(block: nn.Module) -> str | None:
        place = list(stack).index(block)
        ends = {len(stack) - 1: "last", 0: "first"}
        return ends.get(place, str(place) if len(stack) == whole else None)

    def back(tensor: Tensor, segment: str | None) -> None:
        if tensor.requires_grad:
            tensor.register_hook(lambda _: ledger.enter(segment))  # type: ignore[no-untyped-call]

    def before(block: nn.Module, args: Any, kwargs: Any) -> None:
        here = role(block)
        if here == "first":
            back(next(t for t in tree_leaves((args, kwargs)) if isinstance(t, FakeTensor)), "backward below")
        ledger.enter(here and f"forward {here}")

    def after(block: nn.Module, _args: Any, output: Any) -> None:
        here = role(block)
        back(output[0] if isinstance(output, tuple) else output, here and f"backward {here}")
        if here == "last":
            ledger.enter("forward above")

    for block in stack:
        block.register_forward_pre_hook(before, with_kwargs=True)
        block.register_forward_hook(after)

    def begin(_module: nn.Module, _args: Any) -> None:
        ledger.part = "receiver activations" if torch.is_grad_enabled() else "passes without gradient"
        ledger.enter("forward below")

    lm.model.base_model.register_forward_pre_hook(begin)
    lm.model.base_model.register_forward_hook(lambda *_: setattr(ledger, "part", WORKING))
    ledger.vocabulary = int(lm.model.config.get_text_config().vocab_size)


class _Given(Residency):
    """Lends the models it was given; nothing is loaded, measured or dropped."""

    @contextmanager
    def use(self, name: str, wait_seconds: float = 0.0) -> Iterator[FrozenLM]:
        yield self.load(name)


class _Kept(CachedStates):
    """States of the right shape, as if read from a cache."""

    def __init__(self, mode: FakeTensorMode, width: int, dtype: torch.dtype) -> None:
        super().__init__(Path(), torch.device("cpu"))
        self._mode, self._width, self._dtype = mode, width, dtype

    def read(self, sources: Sequence[SourceTokens], *, multiple: int = 1) -> States:
        S = -(-max(len(source.ids) for source in sources) // multiple) * multiple
        mask = torch.arange(S) < torch.tensor([[len(source.ids)] for source in sources])
        with self._mode:
            return torch.zeros(len(sources), S, self._width, dtype=self._dtype), mask


def _prepare(
    config: TrainConfig, sender: FrozenLM, receiver: FrozenLM, lms: dict[str, FrozenLM], ledger: Ledger,
    mode: FakeTensorMode, lengths: Lengths,
) -> Run:  # fmt: skip
    """What ``prepare`` makes, from shapes, after some steps: with optimiser state, and gradients where they add up."""
    task = Task("plan", "generation", [], [], "{latent}\n{question}", "0" * 64)
    heads = {name: head_of(config, lm, layout_for(lm, task.template), 1.0) for name, lm in lms.items()}
    described = with_heads(describe(config, task, sender), heads)
    with mode:
        bridge = make_bridge(described)
        modes = learned_modes(config, bridge, torch.device("cpu"))
    if config.add_receiver is not None:
        bridge.encoder.requires_grad_(False)
        for name in set(described.heads) - set(lms):
            bridge.head(name).requires_grad_(False)
    parameters = [p for p in bridge.parameters() if p.requires_grad] + list(modes.parameters())
    for p in [*bridge.parameters(), *modes.parameters()]:
        ledger.hold(p, TRAINED)
    optimizers = optimisers(bridge, modes, config)
    with ledger.charged("optimiser state"):
        for p in parameters:
            p.grad = torch.zeros_like(p)
        for optimizer in optimizers:
            optimizer.step()
    for p in parameters:
        ledger.hold(cast(Tensor, p.grad), GRADIENTS)
        cast(Any, p).register_post_accumulate_grad_hook(lambda p: ledger.hold(p.grad, GRADIENTS))
    _charge(ledger, bridge, sender)
    # One receiver and one probe in every step, and the teacher's rows in one pass, as they are at the fullest.
    update = {"receiver": [receiver.name], "add_receiver": None, "bridge": None, "kd_chunk": None, "probe_every": 1}
    width = described.encoder.sender_width * described.encoder.mixed_layers
    kept = _Kept(mode, width, sender.model.dtype)
    residency = _Given(load={**lms, config.sender: sender, receiver.name: receiver}.__getitem__)
    lora, layers = bridge.encoder.lora, described.layers
    live = LiveStates(residency, config.sender, layers if lora else _nearer(layers), lora)
    run = Run(
        config=config.model_copy(update=update if config.probe_every else {**update, "probe_every": 0}),
        task=task,
        train=[],
        validation=[],
        bridge=bridge,
        modes=modes,
        states=kept if config.cache_features else live,
        residency=residency,
        tokenisers={},
        sample=lambda _name, index: tokens_of(run, lengths, index),
        parameters=parameters,
        optimizers=optimizers,
        scaler=GradScaler("cpu", enabled=False),
        ranks=Ranks(),
        identity={},
        alignment_steps=0,
        micro_batch=config.batch_size,
    )
    return run


def _nearer(layers: Sequence[int]) -> tuple[int, ...]:
    """Layers that hold as much memory as ``layers`` and run fewer blocks: of each gap only that there is one."""
    made = {0: 0}
    for layer in sorted(set(layers) - {0}):
        below = max(made)
        made[layer] = made[below] + min(layer - below, 2)
    return tuple(made[layer] for layer in layers)


def _charge(ledger: Ledger, bridge: BridgeModel, sender: FrozenLM) -> None:
    """Name what the sender and the bridge allocate."""
    parts = {"sender states": [sender.model.base_model], "bridge activations": [bridge.encoder, *bridge.heads.values()]}

    def begin(part: str) -> None:
        ledger.part = part
        ledger.enter(part)

    for part, modules in parts.items():
        for module in modules:
            module.register_forward_pre_hook(lambda *_, part=part: begin(part))
            # The sender's pass is left by an exception once its highest layer is read.
            module.register_forward_hook(lambda *_: setattr(ledger, "part", WORKING), always_call=True)


def _step(run: Run, ledger: Ledger, rows: int) -> Moments:
    """The moments of one step with so many rows."""
    for p in run.parameters:
        if run.config.accumulate == 1:
            p.grad = None
        elif p.grad is None:
            p.grad = torch.zeros_like(p)
            ledger.hold(p.grad, GRADIENTS)
    gc.collect()
    ledger.restart()
    run.micro_batch = rows
    take_step(run, 0, [run.sample(run.config.receiver[0], i) for i in range(rows)])
    ledger.enter(None)
    return ledger.moments


MARK_TOKENS = 4  # before each of several sources


def tokens_of(run: Run, lengths: Lengths, index: int) -> Tokens:
    """The longest example; every second one is a token shorter, since batches without padding spare their mask."""
    config, described = run.config, run.bridge.config
    S, P = max(lengths.source - index % 2, 1), lengths.prompt
    A = S if isinstance(config, PretrainConfig) else lengths.answer
    half, M = max(S // 2, 1), config.mode_tokens
    K, H = slots_of(described.encoder, S), slots_of(described.encoder, half)
    aligned = config.alignment_weight > 0 and encoder_class(config.encoder).windowed
    return Tokens(
        source=SourceTokens([index] * S, S),
        half=half,
        words=[(slots_of(described.encoder, 0) + token // config.ratio, 0) for token in range(S)] if aligned else [],
        answer=_row(P + (config.sources_per_example - 1) * (K + MARK_TOKENS), K, A),
        reconstruction=_row(TEMPLATE_TOKENS, K + M, S) if config.reconstruction_weight else None,
        continuation=_row(1, H + M, max(S - half, 1)) if config.continuation_weight else None,
        teacher=_row(P + S, 0, A) if config.kd_weight else None,
    )


def _row(prompt: int, slots: int, answer: int) -> Row:
    read = prompt + slots
    return Row([0] * (read + answer), [*range(slots), *[TEXT] * (prompt + answer)], [IGNORE] * read + [0] * answer)
