"""Before the first step: load the task and both models, make the bridge, and refuse what would stop a later step."""

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import AdamW, Optimizer

from latentwire.bridge.checkpoint import BridgeModel, check_sender, head_key, read_manifest
from latentwire.bridge.config import BridgeConfig, EncoderConfig, Head, Layout, Provenance
from latentwire.bridge.devices import device_named, dtype_named, multiply_float32
from latentwire.bridge.encoder import encoder_class, slots_of
from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.evaluation.tasks import Example, Task, load_task
from latentwire.bridge.models import FrozenLM, check_role, fingerprint_of, load_model
from latentwire.bridge.prompt import compose, layout_for
from latentwire.bridge.reader import Reader, source_tokens
from latentwire.bridge.residency import Residency
from latentwire.training.base import adapted, bridge_of, check_adapted, earlier_runs
from latentwire.training.config import TrainConfig
from latentwire.training.data import Sampler, split_off
from latentwire.training.features import CachedStates, LiveStates, build, features_key, held_whole, open_cache
from latentwire.training.machine import Ranks, compile_model, gradient_checkpointing, join_ranks, processes, shard
from latentwire.training.muon import Muon
from latentwire.training.objectives import OBJECTIVES, weights_of
from latentwire.training.pretrain import PretrainConfig
from latentwire.training.run import Run
from latentwire.training.text import cut, text_task
from latentwire.training.tokens import Tokeniser, Tokens, tokenise, unflatten

CHECKED = 2000  # examples of a generated task that are looked at before the first step


def prepare(config: TrainConfig, console: Console) -> Run:
    """Everything a step needs, checked.

    Raises:
        InvalidRequest: A model cannot play its part, or an example does not fit.
    """
    check_adapted(config)
    device = device_named(config.device)
    ranks, dtype = join_ranks(device), dtype_named(config.precision, device)
    multiply_float32(device, tf32=config.tf32)
    console = console if ranks.first else Console(quiet=True)
    task = text_task(config, console) if isinstance(config, PretrainConfig) else load_task(config.task)
    check_writable(config.out)
    for name in (config.sender, *config.receivers):
        check_role(name, "sender" if name == config.sender else "receiver")
    residency = Residency(config.memory_budget, device, dtype, partial(_load, config))
    sides, described = _meet(config, task, residency)
    if isinstance(config, PretrainConfig):
        task = cut(task, described, sides[config.sender], console)
    torch.manual_seed(config.seed)
    bridge = bridge_of(config, described)
    bridge.encoder.to(device)
    bridge.heads.to(device)
    modes = learned_modes(config, bridge, device)
    parameters = [p for p in bridge.parameters() if p.requires_grad] + list(modes.parameters())
    held = config.validation_examples if config.validate_every else 0
    train, validation = split_off(task.train, validation=held, limit=config.max_examples, seed=config.seed)
    unaligned = not_aligned(config, sides)
    if unaligned and (config.alignment_steps or config.alignment_weight):
        raise InvalidRequest(f"alignment was asked for, but {unaligned}", param="alignment_steps")
    usual = config.max_steps // 3 if config.init is None else 0
    wanted = usual if config.alignment_steps is None else config.alignment_steps
    alignment_steps = 0 if unaligned else wanted
    aligned = bool(alignment_steps or config.alignment_weight)
    tokenisers = {
        name: Tokeniser(config, described, task.reconstruction, sides[config.sender], sides[name], aligned)
        for name in config.receivers
    }
    _check_validation(config, task, tokenisers, validation)
    console.print(f"{len(train)} training examples, {len(validation)} of the training split held out for validation")
    sample = _samples(config, task, tokenisers, train, ranks, console)
    run = Run(
        config=config,
        task=task,
        train=train,
        validation=validation,
        bridge=bridge,
        modes=modes,
        states=LiveStates(residency, config.sender, described.layers, bridge.encoder.lora),
        residency=residency,
        tokenisers=tokenisers,
        sample=sample,
        parameters=parameters,
        optimizers=optimisers(bridge, modes, config),
        scaler=GradScaler(device.type, enabled=dtype == torch.float16),
        ranks=ranks,
        identity=identity_of(config, described, task, ranks),
        alignment_steps=alignment_steps,
        micro_batch=config.batch_size,
    )
    if config.cache_features:
        run.states = _cached(run, console)
    return run


def check_writable(out: Path) -> None:
    """Refuse before the work a folder that could not be written after it; nothing is left behind."""
    there = next(path for path in (out, *out.resolve().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise InvalidRequest(f"--out {out}: {error.strerror}", param="out") from None


def _load(config: TrainConfig, name: str, **where: Any) -> FrozenLM:
    lm = load_model(name, device_map=config.device_map, **where)
    if config.gradient_checkpointing and name != config.sender:
        lm = gradient_checkpointing(lm)
    if config.fsdp and not (config.cache_features and name == config.sender):  # one process alone fills the cache
        lm = shard(lm)
    return compile_model(lm) if config.compile and name != config.sender else lm


def _meet(config: TrainConfig, task: Task, residency: Residency) -> tuple[dict[str, Reader], BridgeConfig]:
    """Load each model in turn, look at it, and describe the bridge between them."""
    sides: dict[str, Reader] = {}
    heads: dict[str, Head] = {}
    with residency.use(config.sender) as lm:
        sides[lm.name] = lm.reader
        described = describe(config, task, lm)
        if (given := config.bridge or config.init) is not None:
            check_sender(read_manifest(given).bridge, lm)
    added = _provenance(config, task) if config.bridge else None
    for name in config.receivers:
        if config.add_receiver is None and _same(config.sender, name):  # one added later may be the sender's
            message = f"sender and receiver are the same model, {name!r}; a bridge needs two"
            raise InvalidRequest(message, param="receiver")
        with residency.use(name) as lm:
            if lm.tokenizer.eos_token_id is None:
                message = f"the tokenizer of receiver {name!r} has no end-of-text token: its answers could not end"
                raise InvalidRequest(message, param="receiver")
            sides[name] = lm.reader
            layout = layout_for(lm, task.template, chat=config.template == "chat", system=config.system)
            heads[name] = head_of(config, lm, layout, lm.embedding_rms(), added, repeat=task.reconstruction)
    return sides, with_heads(described, heads)


def head_of(
    config: TrainConfig,
    lm: FrozenLM,
    layout: Layout,
    rms: float,
    added: Provenance | None = None,
    *,
    repeat: str | None = None,
) -> Head:
    """The head that ``config`` asks for; ``added`` is its provenance where it extends a bridge.

    ``repeat`` is the prompt of the reconstruction objective, kept where that is on.

    Twice a width of 4,096 would make heads of 38 M weights, and their Muon step a minute on a CPU core.
    """
    return Head(
        lm.ref,
        layout,
        rms,
        added,
        config.head_dim or min(2 * lm.width, 1024),
        config.gain,
        repeat if config.reconstruction_weight > 0 else None,
    )


def with_heads(described: BridgeConfig, heads: dict[str, Head]) -> BridgeConfig:
    """The description completed by its receivers' side, which decides the latent's width unless asked for."""
    encoder, width = described.encoder, list(heads.values())[-1].receiver.width
    if not encoder.latent_dim:
        encoder = replace(encoder, latent_dim=min(width, 512))
    return replace(described, encoder=encoder, heads={**described.heads, **heads})


def _same(sender: str, receiver: str) -> bool:
    """Whether both names stand for one model: the same configuration and weights."""
    mine, theirs = fingerprint_of(sender), fingerprint_of(receiver)
    return (mine.config, mine.weights) == (theirs.config, theirs.weights)


def describe(config: TrainConfig, task: Task, sender: FrozenLM) -> BridgeConfig:
    """The bridge that ``config`` asks for, still without the receivers' side; or the one that is extended."""
    if config.bridge is not None:
        return read_manifest(config.bridge).bridge
    layers = tuple(config.layer or (round(sender.layers * 2 / 3),))
    if bad := [layer for layer in layers if not 0 <= layer <= sender.layers]:
        raise InvalidRequest(f"--layer {bad[0]}: {sender.name!r} has layers 0 to {sender.layers}", param="layer")
    widths = [sender.state_width(layer) for layer in layers]
    if config.layer_mix and (len(set(layers)) < 2 or len(set(widths)) > 1):
        message = f"--layer-mix needs several layers of one width; layers {list(layers)} have the widths {widths}"
        raise InvalidRequest(message, param="layer_mix")
    return BridgeConfig(
        sender=sender.ref,
        layers=layers,
        max_source_tokens=min(config.max_source_tokens, sender.max_tokens),
        encoder=EncoderConfig(
            kind=config.encoder,
            sender_width=widths[0] if config.layer_mix else sum(widths),
            latent_dim=config.latent_dim or 0,  # decided by the receiver, which is not loaded yet
            hidden_dim=config.hidden_dim or min(max(sender.width // 32 * 32, 64), 1024),
            depth=config.depth,
            ratio=config.ratio,
            num_latents=config.num_latents,
            mixed_layers=len(layers) if config.layer_mix else 1,
            lora=adapted(config, sender, layers),
        ),
        heads={},
        provenance=_provenance(config, task),
        source=sender.source_layout,
        earlier=earlier_runs(config),
    )


def _provenance(config: TrainConfig, task: Task) -> Provenance:
    return Provenance(
        task=task.name,
        data_sha256=task.data_sha256,
        seed=config.seed,
        steps=config.max_steps,
        code_version=code_version(),
        recipe=config.model_dump(mode="json", exclude={"out", "cache", "device"}),
        processes=processes(),
    )


def learned_modes(config: TrainConfig, bridge: BridgeModel, device: torch.device) -> nn.ParameterDict:
    """Learned tokens that tell each long objective from answering; part of the run, not of the checkpoint."""
    wanted = [name for name in weights_of(config, "answer") if OBJECTIVES[name].needs == "text"]
    return nn.ParameterDict(
        {
            f"{head_key(receiver)}·{name}": nn.Parameter(
                torch.randn(config.mode_tokens, bridge.config.heads[receiver].receiver.width).to(device)
            )
            for receiver in config.receivers
            for name in wanted
            if config.mode_tokens
        }
    )


def not_aligned(config: TrainConfig, sides: dict[str, Reader]) -> str | None:
    """Why no soft token can be held against the words it covers, or None where it can."""
    if not encoder_class(config.encoder).windowed:
        return f"{config.encoder} slots cover no words of their own"
    slow = [side.name for side in sides.values() if not side.tokenizer.is_fast]
    return f"the tokenizer of {slow[0]!r} gives no character offsets" if slow else None


def optimisers(bridge: BridgeModel, modes: nn.ParameterDict, config: TrainConfig) -> list[Optimizer]:
    """Muon for the matrices, AdamW for the rest.

    AdamW alone lost on the world task what the warm start had built (0.03 against 0.82 after the same steps).
    """
    trained = [p for p in bridge.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim == 2]
    others = [p for p in trained if p.ndim != 2] + list(modes.parameters())
    return [
        Muon(matrices, lr=config.matrix_learning_rate, decay=config.weight_decay),
        AdamW(others, lr=config.learning_rate, weight_decay=config.weight_decay),
    ]


def identity_of(config: TrainConfig, described: BridgeConfig, task: Task, ranks: Ranks) -> dict[str, Any]:
    """Everything that decides the result: the settings, and what the models and the data were."""
    given = config.bridge or config.init
    return {
        **config.model_dump(mode="json"),
        "sender_fingerprint": str(described.sender.fingerprint),
        "receiver_fingerprint": ", ".join(str(described.heads[r].receiver.fingerprint) for r in config.receivers),
        "data_sha256": task.data_sha256,
        "processes": ranks.count,
        "bridge_extended": read_manifest(given).bridge_id if given else None,
    }


def _samples(
    config: TrainConfig, task: Task, tokenisers: dict[str, Tokeniser], train: Sequence[Example], ranks: Ranks,
    console: Console,
) -> Callable[[str, int], Tokens]:  # fmt: skip
    """How to get an example's tokens; what is cut is counted, and what does not fit is refused.

    A data set is tokenised whole; of a generated task the first ``CHECKED`` examples stand for all.
    """
    if task.generated:
        looked = [tokeniser(train[i]) for tokeniser in tokenisers.values() for i in range(min(CHECKED, len(train)))]
        _say_cut(console, [t.source.full_length - len(t.source.ids) for t in looked], "the first ")
        return lambda name, i: tokenisers[name](train[i])
    tables: dict[str, Any] = {}
    for name, tokeniser in tokenisers.items():
        refs = (tokeniser.bridge.sender, tokeniser.bridge.heads[name].receiver)
        key = tokeniser.key(task.data_sha256, task.template, [str(ref.fingerprint) for ref in refs])
        if not ranks.first:
            ranks.barrier()
        tables[name] = tokenise(tokeniser, train, key, config.cache)
        if ranks.first:
            ranks.barrier()
    table = tables[config.receivers[0]]
    lengths = zip(table["source"], table["lengths"], strict=True)
    _say_cut(console, [full - len(ids) for ids, (full, _) in lengths], "all ")
    return lambda name, i: unflatten(tables[name][i])


def _check_validation(
    config: TrainConfig, task: Task, tokenisers: dict[str, Tokeniser], validation: Sequence[Example]
) -> None:
    """Refuse now what the first validation would trip over."""
    if config.validate_every and not validation:
        message = f"{len(task.train)} training example is too few to hold one out; --validate-every 0 does without"
        raise InvalidRequest(message, param="validate_every")
    for tokeniser in tokenisers.values():
        room = tokeniser.receiver.max_tokens - task.max_answer_tokens
        for example in validation:
            slots = slots_of(tokeniser.bridge.encoder, len(tokeniser(example).source.ids))
            compose(tokeniser.receiver, tokeniser.layout, example.prompt, latent=slots, max_tokens=room)


def _say_cut(console: Console, missing: Sequence[int], of: str) -> None:
    """Nothing is cut silently."""
    if cut := sum(tokens > 0 for tokens in missing):
        console.print(f"{cut} of {of}{len(missing)} sources exceed --max-source-tokens: only their start is read")


def sampler_of(run: Run) -> Sampler:
    """The sampler of a run: in which order it sees its examples."""
    return Sampler(
        len(run.train),
        batch_size=run.rows_per_step,
        seed=run.config.seed,
        length=(lambda index: len(run.train[index].source)) if run.config.group_by_length else None,
    )


def _cached(run: Run, console: Console) -> CachedStates:
    """The sender's states of every example the run will see, and no sender in memory any more."""
    config, described = run.config, run.bridge.config
    sampler = sampler_of(run)
    seen = sorted({i for step in range(config.max_steps) for i in sampler.batch(step)})
    key = features_key(
        sender=str(described.sender.fingerprint),
        layers=described.layers,
        data=run.task.data_sha256,
        template=run.task.template,
        longest=described.max_source_tokens,
        precision=config.precision,
        device=str(run.residency.device),
    )
    folder = config.cache.expanduser() / "features" / key
    asked = features_key(seen=seen, held=len(run.validation), limit=config.max_examples, seed=config.seed)
    if run.ranks.first:
        states = held_whole(folder, run.residency.device, asked) or _read_all(run, seen, folder, asked, console)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        console.print(f"sender states of {len(states.rows)} sources: {size:,} bytes in {folder}", soft_wrap=True)
    run.ranks.barrier()
    run.residency.unload(config.sender)
    return states if run.ranks.first else open_cache(folder, run.residency.device)


def _read_all(run: Run, seen: Sequence[int], folder: Path, asked: str, console: Console) -> CachedStates:
    """Let the sender read the examples that the cache does not have."""
    config, described = run.config, run.bridge.config
    side = run.tokenisers[config.receivers[0]].sender
    texts = [run.train[i].source for i in seen] + [example.source for example in run.validation]
    sources = [source_tokens(described, side, text, truncate=True) for text in texts]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("the sender reads", total=len(sources))
        with run.residency.use(config.sender) as lm:
            return build(
                lm, described.layers, sources, folder, asked=asked,
                progress=lambda done, total: progress.update(bar, completed=done, total=total),
            )  # fmt: skip


def code_version() -> str:
    """The package's version, with the commit where the code runs from a checkout."""
    root, number = Path(__file__).resolve().parents[1], version("latentwire").partition("+")[0]
    git = shutil.which("git") if (root / ".git").exists() else None
    if git is None:
        return version("latentwire")
    command = [git, "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    commit = done.stdout.strip() if done.returncode == 0 else ""
    return number + (f"+{commit}" if commit else "")
