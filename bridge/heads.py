"""Latent → soft tokens of one receiver.

Dimensions used in this file:
    B batch    K slots    C latent width    D receiver width
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from latentwire.bridge.config import Head


class SoftTokenHead(nn.Module):
    """Widens a latent to the receiver's width and puts it at the receiver's scale.

    Every soft token leaves with the RMS measured on the receiver's embedding rows, for any latent that float32 can
    square: language models read anything far from that scale as noise, and their scales differ by 100× between
    families. A norm that cannot be left also bounds what a hostile latent can do.
    """

    def __init__(self, latent_dim: int, head: Head) -> None:
        super().__init__()
        width = head.receiver.width
        self.embedding_rms = head.embedding_rms
        self.widen = nn.Sequential(nn.Linear(latent_dim, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.skip = nn.Linear(latent_dim, width)

    def forward(self, latent: Float[Tensor, "B K C"]) -> Float[Tensor, "B K D"]:
        """Soft tokens; a slot of zeros (padding) gives an arbitrary token that the caller masks."""
        wide: Tensor = self.skip(latent) + self.widen(latent)
        return F.rms_norm(wide, wide.shape[-1:]) * self.embedding_rms
