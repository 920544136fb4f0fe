"""Latent → soft tokens of one receiver.

Dimensions used in this file:
    B batch    K slots    C latent width    D receiver width
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from latentwire.bridge.config import Head

MAX_GAIN = 256.0


class SoftTokenHead(nn.Module):
    """Widens a latent to the receiver's width and puts it at the receiver's scale.

    Every soft token leaves with the RMS measured on the receiver's embedding rows, for any latent that float32 can
    square: language models read anything far from that scale as noise, and their scales differ by 100× between
    families. A norm that cannot be left also bounds what a hostile latent can do.

    Where the head has a gain, that RMS is multiplied by one learned number between 1 and ``MAX_GAIN``, the same for
    every latent: still no latent can choose its norm. Source of the range: "Frozen LLMs are Native Decoders for
    High-Norm Semantic Vectors" (ACL 2026), where a norm of about 100 × was needed.
    """

    def __init__(self, latent_dim: int, head: Head) -> None:
        super().__init__()
        width = head.receiver.width
        hidden = head.hidden_dim or 2 * width
        self.embedding_rms = head.embedding_rms
        self.widen = nn.Sequential(nn.Linear(latent_dim, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.skip = nn.Linear(latent_dim, width)
        self.log_gain = nn.Parameter(torch.zeros(())) if head.gain else None

    @property
    def gain(self) -> Tensor | float:
        """``MAX_GAIN`` ** x with x in 0 to 1, begun at 0; at an end x is held there and can still come back."""
        if self.log_gain is None:
            return 1.0
        bounded = self.log_gain + (self.log_gain.clamp(0, 1) - self.log_gain).detach()
        return torch.as_tensor(MAX_GAIN**bounded)

    def forward(self, latent: Float[Tensor, "B K C"]) -> Float[Tensor, "B K D"]:
        """Soft tokens; a slot of zeros (padding) gives an arbitrary token that the caller masks."""
        wide: Tensor = self.skip(latent) + self.widen(latent)
        return F.rms_norm(wide, wide.shape[-1:]) * (self.embedding_rms * self.gain)
