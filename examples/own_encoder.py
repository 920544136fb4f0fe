"""Train a bridge whose encoder is your own: a subclass of ``Encoder`` with a ``kind`` is known once it is defined.

This one gives each slot the largest value of every channel, by a linear map of its own.
"""

import argparse
from pathlib import Path

from torch import nn

import latentwire
from latentwire.bridge.config import EncoderConfig
from latentwire.bridge.encoder import Encoder, Mask, Slots, States


class Maximum(Encoder):
    """Slots out of each channel's largest value."""

    kind = "maximum"

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.read = nn.Linear(config.sender_width, config.num_latents * config.hidden_dim)

    def slots(self, states: States, mask: Mask) -> Slots:
        largest = states.masked_fill(~mask[..., None], -1e4).amax(dim=1)
        slots = self.read(largest).unflatten(-1, (self.config.num_latents, -1))
        return slots, mask.any(dim=1, keepdim=True).expand(-1, self.config.num_latents)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("runs/maximum"), help="Folder of the checkpoint.")
parser.add_argument("--steps", type=int, default=400, help="Optimiser steps.")
parser.add_argument("--limit", type=int, default=50, help="Test examples.")
options = parser.parse_args()

run = latentwire.train(
    sender="builtin:neox", receiver="builtin:llama", task="world", out=options.out, overwrite=True,
    encoder="maximum", num_latents=8, max_steps=options.steps,
)  # fmt: skip
print(latentwire.evaluate(run.bridge(), limit=options.limit, conditions=["bridge", "none", "mismatched"]))
