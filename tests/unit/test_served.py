"""Rows of a served bridge."""

from dataclasses import replace
from typing import Any

import numpy as np

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.checkpoint import load_bridge
from latentwire.bridge.residency import Residency


def test_two_checkpoints_with_one_encoder_and_different_heads_share_no_soft_tokens() -> None:
    manifest, bridge = load_bridge("builtin")
    receiver, lm = next(iter(manifest.heads)), None
    latent = np.ones((2, manifest.bridge.encoder.latent_dim), np.float32)
    other = replace(manifest, heads={receiver: replace(manifest.heads[receiver], sha256="0" * 64)})

    def key(of: Any) -> Any:
        served = Bridge("b", of, bridge, Residency())
        soft = served.soft(receiver, lm, latent)  # type: ignore[arg-type]
        assert soft is not None
        return soft.key

    assert other.bridge_id == manifest.bridge_id
    assert key(other) != key(manifest) == key(manifest)
