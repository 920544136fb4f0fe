"""One step: whose gradient it has, and what it does to the weights and to nothing else."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from latentwire.bridge.checkpoint import load_bridge, save_bridge
from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.models import FrozenLM, hidden_states
from latentwire.training import features
from latentwire.training.monitor import StepRecord
from latentwire.training.run import Run
from latentwire.training.step import schedule
from tests.integration.conftest import MakeConfig
from tests.integration.runs import WEIGHTS, examples_of, measured, prepared, same, step_of, tokens_of, weights_of_run

PLAIN = {"learning_rate": 1.0, "matrix_learning_rate": 1.0, "warmup_steps": 0}


def plain(run: Run) -> Run:
    """The run under plain gradient descent, whose update shows the size of the gradient."""
    held = [optimizer.param_groups[0]["params"] for optimizer in run.optimizers]
    return replace(run, optimizers=[torch.optim.SGD(parameters, lr=1.0) for parameters in held])


def test_both_models_are_bit_identical_after_training_and_hold_no_gradients(make: MakeConfig) -> None:
    run = prepared(make(reconstruction_weight=1.0, alignment_steps=1))
    with run.residency.use(run.config.sender) as sender, run.residency.use(run.config.receivers[0]) as receiver:
        models = (sender, receiver)
    before = [{name: tensor.clone() for name, tensor in lm.model.state_dict().items()} for lm in models]
    trained = weights_of_run(run)
    for step in range(3):
        step_of(run, step)
    for lm, weights in zip(models, before, strict=True):
        assert all(torch.equal(tensor, weights[name]) for name, tensor in lm.model.state_dict().items())
        assert all(p.grad is None and not p.requires_grad for p in lm.model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(trained, run.parameters, strict=True))


@pytest.mark.parametrize("layer", [[1], [3], [3, 1]])
def test_the_layers_configured_are_the_layers_read(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch, layer: list[int]
) -> None:
    read: list[list[int]] = []

    def spying(lm: FrozenLM, ids: Tensor, mask: Tensor, layers: Any, *more: Any) -> Tensor:
        read.append(list(layers))
        return hidden_states(lm, ids, mask, layers, *more)

    monkeypatch.setattr(features, "hidden_states", spying)
    run = prepared(make(layer=layer))
    for step in range(2):
        step_of(run, step)
    assert run.bridge.config.layers == tuple(layer) and read == [layer, layer]


def test_several_layers_are_read_side_by_side(make: MakeConfig) -> None:
    run = prepared(make(layer=[1, 3]))
    assert run.bridge.config.layers == (1, 3) and run.bridge.config.encoder.sender_width == 64
    step_of(run, 5)


def test_several_layers_can_be_mixed_and_the_mix_learns_and_is_kept(make: MakeConfig) -> None:
    run = prepared(make(layer=[1, 3], layer_mix=True))
    encoder = run.bridge.config.encoder
    assert run.bridge.config.layers == (1, 3) and (encoder.sender_width, encoder.mixed_layers) == (32, 2)
    mix = run.bridge.encoder.layer_mix
    assert mix is not None
    for step in range(4):
        step_of(run, step)
    assert mix.logits[0] != mix.logits[1] and mix.scale != 1
    save_bridge(run.config.out, run.bridge)
    manifest, back = load_bridge(run.config.out)
    assert manifest.bridge.encoder == encoder and back.encoder.layer_mix is not None
    assert torch.equal(back.encoder.layer_mix.logits, mix.logits)


@pytest.mark.parametrize("layer", [None, [3], [2, 2]])
def test_a_mix_of_one_layer_is_refused(make: MakeConfig, layer: list[int] | None) -> None:
    with pytest.raises(InvalidRequest, match=r"^--layer-mix needs several layers .*; layers \[[\d, ]+\] have "):
        prepared(make(layer=layer, layer_mix=True))


@pytest.mark.parametrize("weights", [{"answer": 1.0, "reconstruction": 0.5}, {**WEIGHTS, "margin": 0, "diversity": 0}])
def test_a_row_has_the_loss_and_gradients_it_has_alone(make: MakeConfig, weights: dict[str, float]) -> None:
    on = {f"{name}_weight": weight for name, weight in weights.items()}
    run = prepared(make(mode_tokens=2 * (len(weights) > 2), alignment_steps=0, max_source_tokens=200, **on))
    rows = tokens_of(run, examples_of(run))
    assert len({len(row.source.ids) for row in rows}) == 3  # padding is needed
    together, gradient = measured(run, rows)
    each = [measured(run, [row]) for row in rows]
    assert together.losses.keys() == {name for name, weight in weights.items() if weight}
    for name, value in together.losses.items():
        assert value == pytest.approx(sum(record.losses[name] for record, _ in each) / 3, rel=1e-4, abs=1e-5)
    for i, wanted in enumerate(gradient):
        mean = sum((grads[i] for _, grads in each), torch.zeros_like(wanted)) / 3
        torch.testing.assert_close(wanted, mean, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("alignment", [0, 1])
def test_two_passes_of_a_half_batch_are_one_of_the_whole(make: MakeConfig, alignment: int) -> None:
    def stepped(**shape: int) -> tuple[StepRecord, list[Tensor]]:
        weights = {"kd_weight": 0.5, "reconstruction_weight": 0.5, "first_k_weight": 0.5}
        run = plain(prepared(make(clip_norm=1e9, alignment_steps=alignment, **PLAIN, **shape, **weights)))
        return step_of(run, 0), weights_of_run(run)

    whole, one = stepped(batch_size=4)
    halves, two = stepped(batch_size=2, accumulate=2)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    measures = ("accuracy", "first_token_top1", "first_token_top5", "entropy_nats", "wanted_entropy_nats")
    measures += ("distinct_ratio", "top_share")
    for name in ("loss", "losses", "gradient_norm", "tokens", *(() if alignment else measures)):
        assert getattr(halves, name) == pytest.approx(getattr(whole, name), rel=1e-4), name


def test_gradients_do_not_pile_up_from_step_to_step_and_are_clipped(make: MakeConfig) -> None:
    run = plain(prepared(make(clip_norm=1e-3, alignment_steps=0, **PLAIN)))
    before = weights_of_run(run)
    record = step_of(run, 0)
    moved = math.sqrt(sum(float((a - b).pow(2).sum()) for a, b in zip(before, weights_of_run(run), strict=True)))
    assert moved == pytest.approx(1e-3, rel=1e-2) and record.gradient_norm > 1e-3
    assert all(p.grad is None for p in run.parameters)


def test_the_learning_rate_warms_up_and_falls_to_a_tenth(make: MakeConfig) -> None:
    config = make(warmup_steps=4, max_steps=24)
    shares = [schedule(config, step) for step in range(25)]
    assert shares[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert shares[14] == pytest.approx(0.55) and shares[24] == pytest.approx(0.1)
    assert shares[4:] == sorted(shares[4:], reverse=True)
    assert schedule(make(warmup_steps=0), 0) == 1.0
    assert 0 < schedule(make(warmup_steps=6, max_steps=6), 5) <= 1.0


def test_the_rate_of_a_step_reaches_each_optimiser(make: MakeConfig) -> None:
    run = prepared(make(learning_rate=0.5, matrix_learning_rate=0.25, warmup_steps=4))
    record = step_of(run, 1)
    assert [group["lr"] for optimizer in run.optimizers for group in optimizer.param_groups] == [0.125, 0.25]
    assert record.learning_rate == 0.25


def test_every_trained_weight_belongs_to_exactly_one_optimiser(make: MakeConfig) -> None:
    run = prepared(make(reconstruction_weight=1.0, mode_tokens=2))
    held = [id(p) for o in run.optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in run.parameters)
    assert len(held) == len(run.bridge.parameters()) + len(run.modes) and len(run.modes) == 1


def test_weight_decay_reaches_each_optimiser(make: MakeConfig) -> None:
    def size(decay: float) -> list[float]:
        run = prepared(make(weight_decay=decay, warmup_steps=0, learning_rate=0.1, matrix_learning_rate=0.1))
        for parameter in run.parameters:
            torch.nn.init.ones_(parameter)
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in run.optimizers:
            optimizer.step()
        return [float(p.detach().mean()) for o in run.optimizers for p in o.param_groups[0]["params"]]

    assert size(0.0) == pytest.approx([1.0] * len(size(0.0)))
    assert size(0.5) == pytest.approx([0.95] * len(size(0.0)))


def test_measuring_a_step_moves_nothing(make: MakeConfig) -> None:
    run = prepared(make())
    before = weights_of_run(run)
    measured(run, tokens_of(run, examples_of(run)))
    assert same(before, weights_of_run(run))
