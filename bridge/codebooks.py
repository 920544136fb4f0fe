"""Codebooks of a bridge: a slot as a few bytes, each the number of a vector.

The first byte names the vector of the first codebook that is nearest to the slot; each further byte names one of the
next codebook, nearest to what the ones before have left over. A slot is the sum of its vectors. Fewer bytes are the
same slot, coarser. Residual vector quantisation: Chen et al. 2010 (doi:10.3390/s101211259); between neural encoder and
decoder: SoundStream, arXiv:2107.03312 §III-C.

Dimensions used in this file:
    K slots    C latent width    N codebooks    n codes of a slot
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from latentwire.bridge.errors import CorruptCheckpoint, IncompatibleBridge
from latentwire.bridge.files import replace_file

CODEBOOKS = "codebooks.safetensors"
VECTORS = 256  # of a codebook: what a byte can name
REMEDY = "(delete it, and quantise)"


@dataclass(frozen=True, eq=False)
class Codebooks:
    """Some codebooks, and what they were made from.

    Attributes:
        vectors: (N, 256, C), float16 numbers as float32.
        about: Plain words: ``bridge_id``, ``task``, ``data_sha256``, ``slots``.
    """

    vectors: NDArray[np.float32]
    about: Mapping[str, str]

    @cached_property
    def digest(self) -> int:
        """CRC-32 of the vectors as float16: codes are read by the codebooks that made them, and by no others."""
        return zlib.crc32(self.vectors.astype("<f2").tobytes())

    @cached_property
    def _squares(self) -> NDArray[np.float32]:
        return cast(NDArray[np.float32], np.square(self.vectors).sum(axis=2))

    def codes(self, latent: NDArray[np.float32], count: int) -> NDArray[np.uint8]:
        """The first ``count`` codes (K, n) of every slot of a latent (K, C)."""
        left = np.array(latent, np.float32)
        codes = np.empty((len(left), count), np.uint8)
        for at, (vectors, squares) in enumerate(zip(self.vectors[:count], self._squares, strict=False)):
            codes[:, at] = (squares - 2 * left @ vectors.T).argmin(axis=1)
            left -= vectors[codes[:, at]]
        return codes

    def latent(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The latent (K, C) that codes (K, n) stand for."""
        latent = np.zeros((len(codes), self.vectors.shape[2]), np.float32)
        for at in range(codes.shape[1]):  # one after the other: a sum over all at once would take n times the memory
            latent += self.vectors[at, codes[:, at]]
        return latent


def load_codebooks(folder: Path, bridge_id: str, latent_dim: int) -> Codebooks | None:
    """The codebooks of the checkpoint in ``folder``; None where none were made.

    Raises:
        CorruptCheckpoint: The file is damaged, or holds something else.
        IncompatibleBridge: It is of another bridge; both are named.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / CODEBOOKS
    if not path.is_file():
        return None
    try:
        with cast(Any, safe_open(path, "np")) as file:
            about, vectors = file.metadata() or {}, file.get_tensor("vectors")
    except (SafetensorError, OSError) as error:
        raise CorruptCheckpoint(f"{path} is no whole safetensors file of codebooks: {error} {REMEDY}") from None
    if (of := about.get("bridge_id")) != bridge_id:
        raise IncompatibleBridge(f"{path} is of bridge {of}; this one is {bridge_id} {REMEDY}")
    if vectors.dtype != np.float16 or vectors.ndim != 3 or vectors.shape[1:] != (VECTORS, latent_dim):
        raise CorruptCheckpoint(
            f"{path}: vectors are {vectors.dtype} {vectors.shape}; "
            f"expected float16 (any, {VECTORS}, {latent_dim}) {REMEDY}"
        )
    found = Codebooks(vectors.astype(np.float32), about)
    if not np.isfinite(found.vectors).all() or about.get("crc32") != f"{found.digest:08x}":
        raise CorruptCheckpoint(
            f"{path}: its vectors are damaged: checksum {found.digest:08x}, not {about.get('crc32')} {REMEDY}"
        )
    return found


def save_codebooks(folder: Path, codebooks: Codebooks) -> None:
    """Write ``codebooks.safetensors``, whole or not at all."""
    from safetensors.numpy import save

    about = {**codebooks.about, "crc32": f"{codebooks.digest:08x}"}
    replace_file(folder / CODEBOOKS, save({"vectors": codebooks.vectors.astype(np.float16)}, metadata=about))
