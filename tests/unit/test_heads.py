"""Soft tokens arrive at the receiver's own scale, whatever the latent."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentwire.bridge.config import Fingerprint, Head, Layout, ModelRef
from latentwire.bridge.heads import SoftTokenHead
from latentwire.bridge.models import FrozenLM


def head_of(width: int, rms: float) -> SoftTokenHead:
    torch.manual_seed(0)
    ref = ModelRef("any", Fingerprint("0", "0", "0"), width, 1)
    return SoftTokenHead(6, Head(ref, Layout("{latent}{prompt}", None, None), rms))


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
