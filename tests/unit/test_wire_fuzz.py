"""Whatever bytes come, the decoder gives a sound latent or one of the product's errors, within the declared memory."""

import warnings

import numpy as np
import pytest

from benchmarks.fuzz import BRIDGE, DTYPES, KEY, Case, Seen, decode, fuzz, latent_of, sealed
from latentwire.bridge import wire
from latentwire.bridge.errors import InvalidMessage

COUNT = 2000
KINDS = {"decoded", "InvalidMessage", "Forbidden", "IncompatibleBridge"}


def test_two_thousand_hostile_messages_are_decoded_or_refused_within_the_cap() -> None:
    seen = Seen()
    fuzz(COUNT, seen)
    assert sum(seen.outcomes.values()) >= COUNT
    assert set(seen.outcomes) == KINDS  # the cases reach every way a message can end
    assert min(seen.outcomes.values()) >= COUNT // 100, seen.outcomes


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sealing_a_sound_message_again_changes_nothing(dtype: wire.DType, key: bytes | None) -> None:
    message = wire.encode(latent_of(3, 5, 0), BRIDGE, dtype, key=key)
    unsigned = message if key is None else message[: -wire.SIGNATURE_BYTES]
    assert sealed(unsigned, key) == message  # so a case that was changed and sealed gets past both seals


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_message_takes_the_declared_memory_and_no_more(dtype: wire.DType) -> None:
    seen = Seen()
    message = wire.encode(np.ones((512, 4096), np.float32), BRIDGE, dtype)
    decode(Case(message, {"max_slots": 512, "latent_dim": 4096}), seen)
    assert 4 * 512 * 4096 < seen.peak_bytes


def test_every_half_that_is_no_number_is_refused_without_a_warning() -> None:
    message = bytearray(wire.encode(np.ones((1, 1), np.float32), BRIDGE, "float16"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for bits in range(1 << 16):
            if bits & 0x7C00 == 0x7C00:
                message[wire.HEADER.size :] = bits.to_bytes(2, "little")
                with pytest.raises(InvalidMessage, match="NaN or infinite"):
                    wire.decode(sealed(bytes(message), None))
