"""With a key, a message is taken exactly as it was signed, or refused before anything of it is used."""

import hashlib
import hmac
import zlib
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from latentwire.bridge import wire
from latentwire.bridge.errors import InvalidMessage, InvalidRequest

DTYPES = [dtype for dtype in get_args(wire.DType) if dtype not in wire.CODED]
BRIDGE, OTHER = "00112233445566778899aabbccddeeff", "ff" * 16
KEY, WRONG = b"sixteen bytes ok", b"sixteen bytes no"
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
refused = pytest.raises(wire.Forbidden)


def latent_of(K: int, C: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-1, 1, size=(K, C)).astype(np.float32)


def flipped(message: bytes, bit: int) -> bytes:
    damaged = bytearray(message)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def forged(numbers: NDArray[Any], *, key: bytes) -> bytes:
    """A float32 message with a right checksum, whatever it holds, signed."""
    fields = (wire.MAGIC, wire.VERSION, 0, wire.SIGNED, bytes.fromhex(BRIDGE), *numbers.shape)
    data = numbers.astype("<f4").tobytes()
    message = wire.HEADER.pack(*fields, zlib.crc32(data, zlib.crc32(wire.HEADER.pack(*fields, 0)))) + data
    return message + hmac.digest(key, message, "sha256")


@each_dtype
def test_a_signed_message_decodes_with_its_key_and_without_any(dtype: wire.DType) -> None:
    latent = latent_of(3, 5)
    signed, unsigned = wire.encode(latent, BRIDGE, dtype, key=KEY), wire.encode(latent, BRIDGE, dtype)
    plain = wire.decode(unsigned)
    for key in (KEY, None):
        back = wire.decode(signed, bridge_id=BRIDGE, latent_dim=5, max_slots=3, key=key)
        assert (back.bridge_id, back.dtype) == (plain.bridge_id, plain.dtype)
        np.testing.assert_array_equal(back.latent, plain.latent)


@each_dtype
def test_a_signed_message_is_the_unsigned_one_with_a_flag_and_a_signature_of_it_all(dtype: wire.DType) -> None:
    signed, unsigned = (wire.encode(latent_of(3, 5), BRIDGE, dtype, key=key) for key in (KEY, None))
    body, signature = signed[:-32], signed[-32:]
    assert signature == hmac.new(KEY, body, hashlib.sha256).digest()
    assert body[6:8] == b"\1\0" and unsigned[6:8] == b"\0\0"
    assert body[:6] + body[8:32] + body[36:] == unsigned[:6] + unsigned[8:32] + unsigned[36:]
    assert int.from_bytes(body[32:36], "little") == zlib.crc32(body[:32] + bytes(4) + body[36:])


@each_dtype
def test_every_flipped_bit_of_a_small_signed_message_is_refused(dtype: wire.DType) -> None:
    message = wire.encode(latent_of(2, 3), BRIDGE, dtype, key=KEY)
    for bit in range(8 * len(message)):
        with refused:
            wire.decode(flipped(message, bit), key=KEY)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), K=st.integers(1, 40), C=st.integers(1, 64))
def test_any_flipped_bit_of_any_signed_message_is_refused(data: st.DataObject, dtype: Any, K: int, C: int) -> None:
    message = wire.encode(latent_of(K, C, seed=K * C), BRIDGE, dtype, key=KEY)
    bit = data.draw(st.integers(0, 8 * len(message) - 1))
    assert wire.decode(message, key=KEY).latent.shape == (K, C)
    with refused:
        wire.decode(flipped(message, bit), key=KEY)


@settings(max_examples=100, deadline=None)
@given(noise=st.binary(max_size=150))
def test_noise_is_refused_as_what_nobody_signed(noise: bytes) -> None:
    for message in (noise, wire.encode(latent_of(2, 2), BRIDGE, key=KEY)[:36] + noise):
        with refused:
            wire.decode(message, key=KEY)


def test_every_truncation_and_every_addition_is_refused() -> None:
    message = wire.encode(latent_of(2, 3), BRIDGE, key=KEY)
    for end in range(len(message)):
        with refused:
            wire.decode(message[:end], key=KEY)
    with refused:
        wire.decode(message + b"\0", key=KEY)


def test_an_unsigned_message_is_refused_and_so_is_one_whose_signature_was_taken_off() -> None:
    latent = latent_of(9, 8)
    stripped = bytearray(wire.encode(latent, BRIDGE, key=KEY)[:-32])
    stripped[6] = 0
    for message in (wire.encode(latent, BRIDGE), bytes(stripped)):
        with pytest.raises(wire.Forbidden, match="is not signed"):
            wire.decode(message, key=KEY)


def test_a_message_signed_with_another_key_is_refused() -> None:
    with pytest.raises(wire.Forbidden, match="another key signed it"):
        wire.decode(wire.encode(latent_of(2, 3), BRIDGE, key=WRONG), key=KEY)


def test_a_header_and_a_signature_hold_for_no_other_message() -> None:
    one = wire.encode(latent_of(2, 3, seed=1), BRIDGE, key=KEY)
    other = wire.encode(latent_of(2, 3, seed=2), OTHER, key=KEY)
    for mixed in (one[:36] + other[36:], one[:-32] + other[-32:], one[:8] + other[8:24] + one[24:]):
        assert len(mixed) == len(one)
        with refused:
            wire.decode(mixed, key=KEY)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e3])
def test_what_is_wrong_with_a_message_is_told_only_to_who_could_sign_it(value: float) -> None:
    numbers = np.array([[1, 1, 1], [1, value, 1]], dtype=np.float32)
    with refused:
        wire.decode(forged(numbers, key=WRONG), key=KEY)
    with pytest.raises(InvalidMessage, match=r"finite|RMS"):
        wire.decode(forged(numbers, key=KEY), key=KEY)


def test_a_message_that_no_header_could_describe_is_refused_without_hashing_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hashed: list[int] = []
    monkeypatch.setattr(wire.hmac, "digest", lambda key, signed, name: hashed.append(len(signed)) or bytes(32))
    message = bytearray(wire.MAX_MESSAGE_BYTES + wire.SIGNATURE_BYTES + 1)
    message[6] = wire.SIGNED
    with pytest.raises(wire.Forbidden, match=f"at most {wire.MAX_MESSAGE_BYTES}"):
        wire.decode(bytes(message), key=KEY)
    assert hashed == []


def test_signatures_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest
    monkeypatch.setattr(wire.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    message = wire.encode(latent_of(2, 3), BRIDGE, key=KEY)
    wire.decode(message, key=KEY)
    assert compared == [(message[-32:], message[-32:])]


def test_a_flag_that_this_version_does_not_know_is_named() -> None:
    with pytest.raises(InvalidMessage, match=r"flags 0x2 and version 1; .* 0 and 1 of version 1"):
        wire.decode(flipped(wire.encode(latent_of(1, 1), BRIDGE), 8 * 6 + 1))


def test_a_signing_key_has_at_least_sixteen_bytes_and_is_not_repeated() -> None:
    assert wire.as_key("ä" * 8) == b"\xc3\xa4" * 8
    with pytest.raises(InvalidRequest, match="has 15 bytes; at least 16") as caught:
        wire.as_key("fifteen-letters")
    assert "fifteen" not in str(caught.value)
