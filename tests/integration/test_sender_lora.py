"""LoRA on the sender: trained with the bridge, there while that bridge encodes, and nowhere else."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.checkpoint import BridgeModel, load_bridge, make_bridge, read_manifest, save_bridge
from latentwire.bridge.config import LoraShape
from latentwire.bridge.engine import encode
from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.evaluation.context import open_context
from latentwire.bridge.evaluation.measure import measure
from latentwire.bridge.lora import Lora, lora_shape
from latentwire.bridge.models import FrozenLM, hidden_states, pad_sources, stack_of
from latentwire.bridge.reader import SourceTokens, tokenize_source
from latentwire.training.base import completed
from latentwire.training.config import TrainConfig
from latentwire.training.controls import control_config
from latentwire.training.duration import measure as take_steps
from latentwire.training.loop import train
from latentwire.training.plan import plan
from tests.conftest import bridge_config
from tests.integration.conftest import MakeConfig
from tests.integration.runs import interrupted, parts, prepared, quiet, same, step_of

RANK = 3
TEXTS = ("Mara lives in Rome.", "Nobody knew, and nobody asked.", "No")


def sources_of(lm: FrozenLM) -> list[SourceTokens]:
    return [tokenize_source(lm, text, lm.source_layout, max_tokens=48) for text in TEXTS]


def bridge_from(lm: FrozenLM, receiver: FrozenLM, lora: LoraShape | None) -> BridgeModel:
    """A fresh bridge that reads layer 2, always with the same weights."""
    torch.manual_seed(7)
    bridge = make_bridge(bridge_config(lm, receiver, lora=lora))
    bridge.encoder.requires_grad_(False)
    return bridge


def learnt(lora: Lora | None) -> Lora:
    """The additions as if they had learnt something."""
    assert lora is not None
    torch.manual_seed(8)
    for up in lora.up.values():
        nn.init.normal_(up, std=0.3)
    return lora


def latents(bridge: BridgeModel, lm: FrozenLM, sources: Sequence[SourceTokens]) -> list[NDArray[np.float32]]:
    return [each.latent for each in encode(bridge, lm, sources)]


def equal(one: Sequence[NDArray[np.float32]], other: Sequence[NDArray[np.float32]]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def hooks_of(lm: FrozenLM) -> int:
    return sum(len(module._forward_hooks) for module in lm.model.modules())


@pytest.fixture
def two(lm: FrozenLM, lms: dict[str, FrozenLM]) -> tuple[BridgeModel, BridgeModel]:
    """Bridges from one sender that differ in nothing but LoRA, which has learnt nothing yet."""
    shape = lora_shape(stack_of(lm), RANK, 2)
    assert shape is not None
    return bridge_from(lm, lms["llama"], None), bridge_from(lm, lms["llama"], shape)


def test_every_linear_layer_up_to_the_one_read_is_adapted(lm: FrozenLM, lms: dict[str, FrozenLM]) -> None:
    shape = lora_shape(stack_of(lm), RANK, 2)
    assert shape is not None and {name.partition(".")[0] for name in shape.layers} == {"0", "1"}
    in_blocks = [p for name, p in stack_of(lm).named_parameters() if p.ndim == 2 and name[0] in "01"]
    assert len(shape.layers) == len(in_blocks) > 6
    gpt2 = lora_shape(stack_of(lms["gpt2"]), RANK, 2)
    assert gpt2 is not None and gpt2.layers["0.mlp.c_fc"] == (128, 32)


def test_before_it_has_learnt_it_changes_no_bit(two: tuple[BridgeModel, BridgeModel], lm: FrozenLM) -> None:
    plain, adapted = two
    weights = adapted.encoder.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in plain.encoder.state_dict().items())
    assert equal(latents(plain, lm, sources_of(lm)), latents(adapted, lm, sources_of(lm)))


def test_what_it_adds_is_what_its_product_added_to_the_weights_would(
    two: tuple[BridgeModel, BridgeModel], lm: FrozenLM, lms: dict[str, FrozenLM]
) -> None:
    lora = learnt(two[1].encoder.lora)
    ids, mask = pad_sources(lm, sources_of(lm))
    found = hidden_states(lm, ids, mask, (2,), lora)
    before = [p.clone() for p in lm.model.parameters()]
    for key, name in lora.names.items():
        weight = stack_of(lm).get_submodule(name).weight
        added = lora.up[key] @ lora.down[key]
        weight.add_(added if lm is not lms["gpt2"] else added.T)  # its linear layers hold inputs × outputs
    try:
        torch.testing.assert_close(found[mask], hidden_states(lm, ids, mask, (2,))[mask], rtol=1e-3, atol=1e-3)
    finally:
        for p, old in zip(lm.model.parameters(), before, strict=True):
            p.copy_(old)


def test_one_that_has_learnt_changes_its_own_bridge_alone_and_outlives_its_file(
    two: tuple[BridgeModel, BridgeModel], lm: FrozenLM, tmp_path: Path
) -> None:
    (plain, adapted), sources, hooks = two, sources_of(lm), hooks_of(lm)
    before, ids = latents(plain, lm, sources), pad_sources(lm, sources)[0]
    with torch.inference_mode():
        says = lm.model(input_ids=ids).logits
    learnt(adapted.encoder.lora)
    changed = latents(adapted, lm, sources)
    assert not any(np.allclose(a, b, atol=1e-2) for a, b in zip(changed, before, strict=True))
    save_bridge(tmp_path, adapted)
    assert equal(latents(load_bridge(tmp_path, device=lm.device)[1], lm, sources), changed)
    assert equal(latents(plain, lm, sources), before) and hooks_of(lm) == hooks
    with torch.inference_mode():
        assert torch.equal(lm.model(input_ids=ids).logits, says)


def test_nothing_is_left_behind_by_a_pass_that_fails(two: tuple[BridgeModel, BridgeModel], lm: FrozenLM) -> None:
    hooks = hooks_of(lm)
    with pytest.raises(IndexError):
        encode(two[1], lm, [SourceTokens([lm.rows + 9], 1)])
    assert hooks_of(lm) == hooks


def test_another_thread_meets_the_sender_as_it_is(lms: dict[str, FrozenLM]) -> None:
    lm, sources = lms["gpt2"], sources_of(lms["gpt2"])
    plain, adapted = (bridge_from(lm, lms["llama"], s) for s in (None, lora_shape(stack_of(lm), RANK, 2)))
    learnt(adapted.encoder.lora)
    alone, changed = latents(plain, lm, sources), latents(adapted, lm, sources)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lambda: [latents(adapted, lm, sources) for _ in range(50)])
        while not reading.done():
            assert equal(latents(plain, lm, sources), alone)
        assert all(equal(each, changed) for each in reading.result())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_row(two: tuple[BridgeModel, BridgeModel], lm: FrozenLM, side: str) -> None:
    lora = learnt(two[1].encoder.lora)
    source = sources_of(lm)[0].ids
    ids, mask = torch.full((2, len(source) + 9), 5), torch.zeros(2, len(source) + 9, dtype=torch.bool)
    at = slice(9, None) if side == "left" else slice(0, len(source))
    ids[:, at], mask[0, at] = torch.tensor(source), True
    states = hidden_states(lm, ids, mask, (1, 2), lora)
    alone = hidden_states(lm, torch.tensor([source]), torch.ones(1, len(source), dtype=torch.bool), (1, 2), lora)
    assert states.isfinite().all()
    torch.testing.assert_close(states[0][mask[0]], alone[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("family", "precision"), [("neox", "fp32"), ("neox", "bf16"), ("gpt2", "fp32")])
def test_it_learns_with_the_bridge_and_the_sender_stays_bit_for_bit(
    make: MakeConfig, model_folders: dict[str, Path], family: str, precision: str
) -> None:
    run = prepared(make(sender=str(model_folders[family]), sender_lora=RANK, precision=precision))
    lora = run.bridge.encoder.lora
    assert lora is not None and {id(p) for p in lora.parameters()} < {id(p) for p in run.parameters}
    with run.residency.use(run.config.sender) as sender:
        weights = {name: tensor.clone() for name, tensor in sender.model.state_dict().items()}
    before = [p.detach().clone() for p in lora.parameters()]
    for step in range(3):  # one of the warm start alone, then of answers
        step_of(run, step)
    assert not any(torch.equal(one, other) for one, other in zip(before, lora.parameters(), strict=True))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in sender.model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in sender.model.parameters())


def test_without_it_no_graph_of_the_sender_is_kept(make: MakeConfig) -> None:
    kept = {}
    for rank in (0, RANK):
        run = prepared(make(sender_lora=rank))
        states, _ = run.states.read([run.sample(run.config.receiver[0], 0).source])
        kept[rank] = states.requires_grad
    assert kept == {0: False, RANK: True}


@pytest.fixture
def first(make: MakeConfig) -> TrainConfig:
    """A run with LoRA, done."""
    config = make(sender_lora=RANK, max_steps=4, validate_every=2, validation_examples=2)
    train(config, quiet())
    return config


def lora_of(bridge: BridgeModel) -> list[Tensor]:
    assert bridge.encoder.lora is not None
    return [p.detach().cpu() for p in bridge.encoder.lora.parameters()]


def test_a_run_goes_on_exactly_and_its_checkpoint_answers(first: TrainConfig, make: MakeConfig, tmp_path: Path) -> None:
    config = first.model_copy(update={"out": tmp_path / "again"})
    interrupted(config, 3)
    assert parts(train(config, quiet(), resume=True)) == parts(read_manifest(first.out))
    bridge = Bridge.load(first.out)
    assert len(bridge.generate(TEXTS[0], "Where does Mara live?", max_tokens=2).outputs) == 1


def test_runs_after_it_keep_it_and_learn_it_on_or_leave_it(
    first: TrainConfig, model_folders: dict[str, Path], make: MakeConfig
) -> None:
    trained = lora_of(load_bridge(first.out)[1])
    told = {"task": first.task, "out": first.out.parent / "then", "cache": first.cache, "batch_size": 2}
    on = prepared(completed(TrainConfig.model_validate({**told, "init": str(first.out)})))
    assert same(lora_of(on.bridge), trained) and on.config.sender_lora == RANK
    assert all(p.requires_grad for p in on.bridge.encoder.parameters())
    added = {**told, "bridge": str(first.out), "add_receiver": str(model_folders["gpt2"]), "alignment_steps": 0}
    more = prepared(completed(TrainConfig.model_validate({**added, "reconstruction_weight": 0.0})))
    step_of(more, 0)
    assert same(lora_of(more.bridge), trained)
    ids = [more.sample(more.config.receivers[0], 0).source]
    states, _ = more.states.read(ids)
    with more.residency.use(more.config.sender) as lm:
        assert torch.equal(states, hidden_states(lm, *pad_sources(lm, ids), (2,), more.bridge.encoder.lora))
        assert not torch.equal(states, hidden_states(lm, *pad_sources(lm, ids), (2,)))
    with pytest.raises(InvalidRequest, match=r"sender_lora 5: the bridge at .* has 3, which a run with its weights"):
        completed(TrainConfig.model_validate({**told, "init": str(first.out), "sender_lora": 5}))
    with pytest.raises(InvalidRequest, match=r"--cache-features keeps the states of the sender as it is"):
        prepared(completed(TrainConfig.model_validate({**added, "cache_features": True})))


def test_an_evaluation_names_it_and_its_controls_adapt_an_untrained_sender_or_none(
    first: TrainConfig, tmp_path: Path
) -> None:
    context = open_context(first.out, first.task, limit=2, dtype="float16", receiver=None)
    assert measure(context, conditions=["bridge"])["about"]["encoder"]["lora"] == RANK
    random = control_config("random_sender", context, tmp_path / "random")
    assert random.sender_lora == RANK and train(random, quiet()).bridge.encoder.lora == first_shape(first)
    for name in ("prompt", "direct_tuned", "receiver_lora"):
        assert control_config(name, context, tmp_path / name).sender_lora == 0


def first_shape(config: TrainConfig) -> LoraShape | None:
    return read_manifest(config.out).bridge.encoder.lora


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"cache_features": True},
            "--cache-features keeps the states of the sender as it is, and this bridge .* rank 3",
        ),
        ({"fsdp": True}, "--fsdp spreads the sender's layers over processes, and this bridge reads it with LoRA"),
        ({"layer": [0]}, "--sender-lora 3: .* has no linear layer below layer 0"),
        ({"encoder": "prompt", "alignment_steps": 0}, "--sender-lora 3: the encoder 'prompt' never sees the sender"),
        ({"sender_lora": 5000}, "--sender-lora 5000: .* is [0-9]+ wide; expected a smaller rank"),
    ],
    ids=["cached", "sharded", "embedding", "prompt", "rank"],
)
def test_what_does_not_go_with_it_is_one_sentence(make: MakeConfig, changes: dict[str, bool], message: str) -> None:
    config = make(**{"sender_lora": RANK, **changes})
    with pytest.raises(InvalidRequest, match=message):
        train(config, quiet())
    assert not config.out.exists()
    with pytest.raises(InvalidRequest, match=message):
        plan(config, source_tokens=20, prompt_tokens=5, answer_tokens=5)


def test_a_plan_follows_it_and_offers_no_cache(make: MakeConfig) -> None:
    tokens = {"source_tokens": 40, "prompt_tokens": 5, "answer_tokens": 5}
    made = plan(make(sender_lora=RANK, depth=0, layer=[1]), **tokens, compare=True)
    assert list(made.others) == ["with --gradient-checkpointing", "with distillation"]
    assert take_steps(make(sender_lora=RANK, max_steps=1, alignment_steps=0), quiet()).seconds > 0


def test_a_bridge_from_before_has_none(checkpoint: Path) -> None:
    for name in ("builtin", checkpoint):
        manifest, bridge = load_bridge(name)
        assert manifest.bridge.encoder.lora is None and bridge.encoder.lora is None
    described = replace(read_manifest("builtin").bridge.encoder, lora=LoraShape(1, {"0.dense": (2, 2)}))
    assert "lora" not in repr(described)  # from which the ids of old bridges are made
