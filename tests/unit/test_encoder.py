"""A row's latent is its own, whatever stands beside it; its scale is fixed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latentwire.bridge.config import EncoderConfig
from latentwire.bridge.encoder import KINDS, Encoder, LayerMix, make_encoder

N, C = 12, 8
READING = tuple(kind for kind in KINDS if kind != "prompt")
FIXED = ("perceiver", "pooled-perceiver", "mean", "prompt")
each_kind = pytest.mark.parametrize("kind", KINDS)


def encoder_of(kind: str, *, ratio: int = 4, num_latents: int = 3, depth: int = 2, mixed_layers: int = 1) -> Encoder:
    torch.manual_seed(0)
    return make_encoder(EncoderConfig(kind, N, C, 32, depth, ratio, num_latents, mixed_layers))


def states_of(length: int, seed: int = 0) -> Tensor:
    return torch.randn(length, N, generator=torch.Generator().manual_seed(seed)) * 30


def batch_of(rows: list[Tensor], *, side: str = "right", extra: int = 0, filler: float = 0.0) -> tuple[Tensor, Tensor]:
    """Rows in one padded tensor, ``filler`` at padding."""
    S = max(len(row) for row in rows) + extra
    states, mask = torch.full((len(rows), S, N), filler), torch.zeros(len(rows), S, dtype=torch.bool)
    for i, row in enumerate(rows):
        here = slice(S - len(row), S) if side == "left" else slice(0, len(row))
        states[i, here], mask[i, here] = row, True
    return states, mask


def alone(encoder: Encoder, row: Tensor) -> Tensor:
    latent, mask = encoder(*batch_of([row]))
    return latent[0][mask[0]].detach()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["pooling", "linear"])
@pytest.mark.parametrize("length, ratio, slots", [(1, 4, 1), (4, 4, 1), (5, 4, 2), (16, 4, 4), (16, 1, 16), (3, 8, 1)])
def test_slots_grow_with_the_source(kind: str, length: int, ratio: int, slots: int) -> None:
    assert alone(encoder_of(kind, ratio=ratio), states_of(length)).shape == (slots, C)


def test_hybrid_slots_are_global_ones_and_then_those_of_the_windows() -> None:
    hybrid, row = encoder_of("hybrid", num_latents=2, depth=0), states_of(9)
    assert [hybrid.slot_count(hybrid.config, tokens) for tokens in (0, 1, 8, 9)] == [2, 3, 4, 5]
    for kind, at in (("pooled-perceiver", slice(0, 2)), ("pooling", slice(2, 5))):
        alike = encoder_of(kind, num_latents=2, depth=0)
        weights = {name: hybrid.state_dict()[name] for name in alike.state_dict()}
        alike.load_state_dict(weights)
        torch.testing.assert_close(alone(alike, row), alone(hybrid, row)[at])


@pytest.mark.parametrize("kind", FIXED)
@pytest.mark.parametrize("length", [1, 2, 40])
def test_slots_are_as_many_as_asked_for_whatever_the_source(kind: str, length: int) -> None:
    assert alone(encoder_of(kind, num_latents=5), states_of(length)).shape == (5, C)


@each_kind
@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 11), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    extra=st.integers(0, 9),
    filler=st.sampled_from([0.0, 1e4, float("nan"), float("inf")]),
)
def test_a_latent_depends_on_neither_batch_nor_padding(
    kind: str, lengths: list[int], side: str, extra: int, filler: float
) -> None:
    encoder = encoder_of(kind)
    rows = [states_of(length, seed) for seed, length in enumerate(lengths)]
    latents, mask = encoder(*batch_of(rows, side=side, extra=extra, filler=filler))
    for latent, real, row in zip(latents, mask, rows, strict=True):
        torch.testing.assert_close(latent[real].detach(), alone(encoder, row), rtol=1e-4, atol=1e-5)
        assert (latent[~real] == 0).all() and bool(real[0])
        assert bool((real.int().diff() <= 0).all())  # right-padded: real slots first


@each_kind
def test_gradients_of_a_row_do_not_depend_on_its_padding(kind: str) -> None:
    def gradients(extra: int) -> list[Tensor]:
        encoder = encoder_of(kind)
        encoder(*batch_of([states_of(5)], side="left", extra=extra, filler=float("nan")))[0][:, :, 0].sum().backward()
        return [p.grad for p in encoder.parameters() if p.grad is not None]

    for plain, padded in zip(gradients(0), gradients(7), strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-3, atol=1e-4)


@each_kind
def test_a_row_of_padding_gives_zeros_and_spoils_no_neighbour(kind: str) -> None:
    encoder = encoder_of(kind)
    states, mask = batch_of([states_of(6), states_of(6)], filler=float("nan"))
    states[1], mask[1] = float("nan"), False
    latents, slots = encoder(states, mask)
    assert (latents[1] == 0).all() and not slots[1].any()
    torch.testing.assert_close(latents[0][slots[0]].detach(), alone(encoder, states_of(6)), rtol=1e-4, atol=1e-5)
    latents.sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in encoder.parameters())


@each_kind
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e4])
def test_every_slot_leaves_with_rms_1_whatever_the_scale_of_the_states(kind: str, scale: float) -> None:
    latent = alone(encoder_of(kind), states_of(10) * scale)
    torch.testing.assert_close(latent.pow(2).mean(dim=-1).sqrt(), torch.ones(len(latent)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", READING)
def test_another_source_gives_another_latent(kind: str) -> None:
    encoder = encoder_of(kind)
    assert not torch.allclose(alone(encoder, states_of(8, 0)), alone(encoder, states_of(8, 1)), atol=0.1)


def test_the_learned_prompt_ignores_the_source() -> None:
    encoder = encoder_of("prompt")
    assert torch.equal(alone(encoder, states_of(3, 0)), alone(encoder, states_of(9, 1)))


@pytest.mark.parametrize(
    "kind, ordered", [("pooling", True), ("pooled-perceiver", True), ("linear", False), ("mean", False)]
)
def test_pooling_reads_the_tokens_of_a_window_in_order(kind: str, ordered: bool) -> None:
    encoder, row = encoder_of(kind), states_of(4)
    same = torch.allclose(alone(encoder, row), alone(encoder, row.flip(0)), atol=1e-3)
    assert same is not ordered


def test_a_slot_of_the_linear_baseline_sees_its_own_window_only() -> None:
    encoder, row = encoder_of("linear"), states_of(8)
    changed = row.clone()
    changed[4:] += 50 * states_of(4, 9)
    before, after = alone(encoder, row), alone(encoder, changed)
    torch.testing.assert_close(before[0], after[0])
    assert not torch.allclose(before[1], after[1], atol=0.1)


def test_pooled_slots_are_mixed_by_depth_only() -> None:
    row, changed = states_of(8), states_of(8)
    changed[4:] = states_of(4, 9)
    for depth in (0, 1):
        encoder = encoder_of("pooling", depth=depth)
        assert torch.allclose(alone(encoder, row)[0], alone(encoder, changed)[0], atol=1e-4) is (depth == 0)


@pytest.mark.parametrize("kind", READING)
def test_layers_that_are_mixed_are_read_as_one_in_which_each_counts_whatever_its_norm(kind: str) -> None:
    plain, mixed = encoder_of(kind), encoder_of(kind, mixed_layers=2)
    assert mixed.layer_mix is not None and plain.layer_mix is None
    mixed.load_state_dict(plain.state_dict(), strict=False)
    first, second = states_of(8, 1), states_of(8, 2)

    def latent(loud: float = 1.0, logits: tuple[float, float] = (0.0, 0.0)) -> Tensor:
        assert mixed.layer_mix is not None
        mixed.layer_mix.logits.data = torch.tensor(logits)
        states, mask = torch.cat([first, loud * second], dim=-1)[None], torch.ones(1, 8, dtype=torch.bool)
        return mixed(states, mask)[0][0].detach()  # type: ignore[no-any-return]

    torch.testing.assert_close(latent(loud=100.0), latent(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(latent(logits=(99.0, 0.0)), alone(plain, first))
    torch.testing.assert_close(latent(logits=(0.0, 99.0)), alone(plain, second))
    assert not torch.allclose(latent(), alone(plain, first), atol=0.1)


def test_a_layer_mix_begins_as_the_mean_and_learns_weights_and_a_scale() -> None:
    mix, states = LayerMix(3), torch.randn(2, 5, 3, N)
    torch.testing.assert_close(mix(states), states.mean(dim=2))
    mix.logits.data, mix.scale.data = torch.tensor([0.0, 1.0, 0.0]).log(), torch.tensor(2.0)
    torch.testing.assert_close(mix(states), 2 * states[:, :, 1])
    mix.logits.data.zero_()
    mix(states).square().sum().backward()
    assert mix.logits.grad is not None and mix.scale.grad is not None
    assert bool((mix.logits.grad != 0).all()) and mix.scale.grad > 0
