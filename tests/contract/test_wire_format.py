"""Messages kept from version 1 of the format: whatever changes, they still decode, and still look like this."""

import numpy as np
import pytest

from latentwire.bridge import wire

BRIDGE = "00112233445566778899aabbccddeeff"
LATENT = np.array([[1.0, -1.0, 0.5], [0.25, 1.5, -0.75]], dtype=np.float32)
GOLDEN: dict[wire.DType, str] = {
    "float32": (
        "4c5749520100000000112233445566778899aabbccddeeff02000000030000002c701243"
        "0000803f000080bf0000003f0000803e0000c03f000040bf"
    ),
    "float16": "4c5749520101000000112233445566778899aabbccddeeff0200000003000000ddb45714003c00bc00380034003e00ba",
    "int8": ("4c5749520102000000112233445566778899aabbccddeeff0200000003000000a5c4188d0402013c0683413c7f8140157fc0"),
    "int4": "4c5749520103000000112233445566778899aabbccddeeff02000000030000003074531c9230db329704710c",
}
each = pytest.mark.parametrize("dtype", GOLDEN)


@each
def test_a_message_kept_from_version_1_still_decodes(dtype: wire.DType) -> None:
    message = wire.decode(bytes.fromhex(GOLDEN[dtype]), bridge_id=BRIDGE, latent_dim=3, max_slots=2)
    assert (message.bridge_id, message.dtype) == (BRIDGE, dtype)
    np.testing.assert_allclose(message.latent, LATENT, rtol=0, atol={"int8": 1.5 / 254, "int4": 1.5 / 14}.get(dtype, 0))


@each
def test_the_same_latent_still_makes_the_same_bytes(dtype: wire.DType) -> None:
    assert wire.encode(LATENT, BRIDGE, dtype).hex() == GOLDEN[dtype]
