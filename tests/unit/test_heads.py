"""Soft tokens arrive at the receiver's own scale, whatever the latent."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentwire.bridge.config import Fingerprint, Head, Layout, ModelRef
from latentwire.bridge.heads import SoftTokenHead
from latentwire.bridge.models import FrozenLM


def head_of(width: int, rms: float, **settings: Any) -> SoftTokenHead:
    torch.manual_seed(0)
    ref = ModelRef("any", Fingerprint("0", "0", "0"), width, 1)
    return SoftTokenHead(6, Head(ref, Layout("{latent}{prompt}", None, None), rms, **settings))


@settings(max_examples=40, deadline=None)
@given(rms=st.floats(1e-3, 10), scale=st.floats(1e-2, 1e6), seed=st.integers(0, 99))
def test_every_soft_token_has_the_measured_rms_however_large_the_latent(rms: float, scale: float, seed: int) -> None:
    latent = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(seed)) * scale
    soft = head_of(16, rms)(latent)
    assert soft.shape == (2, 3, 16)
    torch.testing.assert_close(soft.pow(2).mean(dim=-1).sqrt(), torch.full((2, 3), rms), rtol=1e-3, atol=0)


def test_the_rms_is_measured_on_the_receivers_embedding_rows(lm: FrozenLM) -> None:
    rows = lm.embed(torch.arange(len(lm.tokenizer)))
    assert lm.embedding_rms() == pytest.approx(float(rows.pow(2).mean(dim=1).sqrt().mean()), rel=1e-5)


def test_families_differ_in_scale_and_each_gets_its_own(lms: dict[str, FrozenLM]) -> None:
    latent = torch.randn(1, 2, 6)
    for lm in lms.values():
        soft = SoftTokenHead(6, Head(lm.ref, Layout("{latent}", None, None), lm.embedding_rms()))(latent)
        assert soft.shape[-1] == lm.width
        torch.testing.assert_close(soft.pow(2).mean(dim=-1).sqrt(), torch.full((1, 2), lm.embedding_rms()))


def test_padding_and_its_neighbours_stay_finite_and_apart() -> None:
    head, latent = head_of(16, 0.1), torch.randn(1, 2, 6)
    padded = torch.cat([latent, torch.zeros(1, 3, 6)], dim=1)
    assert head(padded).isfinite().all()
    torch.testing.assert_close(head(padded)[:, :2], head(latent))


def rms_of(soft: torch.Tensor) -> torch.Tensor:
    return soft.pow(2).mean(dim=-1).sqrt()


def test_a_learned_gain_begins_at_one_and_stays_within_its_bounds() -> None:
    plain, head, latent = head_of(16, 0.1), head_of(16, 0.1, gain=True), torch.randn(2, 3, 6)
    torch.testing.assert_close(head(latent), plain(latent))
    assert head.log_gain is not None
    for x, gain in [(-3.0, 1.0), (0.0, 1.0), (0.5, 16.0), (1.0, 256.0), (9.0, 256.0)]:
        head.log_gain.data.fill_(x)
        torch.testing.assert_close(rms_of(head(latent * 1e3)), torch.full((2, 3), 0.1 * gain), rtol=1e-3, atol=0)


def test_a_gain_that_has_met_its_bound_comes_back() -> None:
    head = head_of(16, 0.1, gain=True)
    assert head.log_gain is not None
    for bound, wanted in [(-0.5, 10.0), (1.5, 10.0)]:
        head.log_gain.data.fill_(bound)
        head.log_gain.grad = None
        (head(torch.randn(1, 2, 6)).pow(2).mean().sqrt() - 0.1 * wanted).abs().backward()
        assert head.log_gain.grad is not None and (head.log_gain.grad > 0) == (bound > 1)


def test_a_head_of_an_old_checkpoint_is_twice_as_wide_as_its_receiver_and_has_no_gain() -> None:
    old, narrow = head_of(16, 0.1), head_of(16, 0.1, hidden_dim=5)
    shapes = {name: tuple(tensor.shape) for name, tensor in old.state_dict().items() if name.endswith("weight")}
    assert shapes == {"widen.0.weight": (32, 6), "widen.2.weight": (16, 32), "skip.weight": (16, 6)}
    assert "log_gain" not in old.state_dict() and narrow.state_dict()["widen.0.weight"].shape == (5, 6)
