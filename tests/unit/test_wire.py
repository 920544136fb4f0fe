"""A message decodes to what was sent, or is refused before anything reads it."""

import struct
import zlib
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from latentwire.bridge import wire
from latentwire.bridge.errors import IncompatibleBridge, InvalidMessage, InvalidRequest

DTYPES = [dtype for dtype in get_args(wire.DType) if dtype not in wire.CODED]
BRIDGE = "00112233445566778899aabbccddeeff"
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def latent_of(K: int, C: int, seed: int = 0) -> NDArray[np.float32]:
    """Slots of RMS 1, as encoders send them."""
    drawn = np.random.default_rng(seed).normal(size=(K, C)).astype(np.float32)
    unit: NDArray[np.float32] = drawn / np.sqrt(np.square(drawn).mean(axis=1, keepdims=True))
    return unit


def forged(K: int, C: int, code: int, data: bytes) -> bytes:
    """A message with a right checksum, whatever it says."""
    fields = (wire.MAGIC, wire.VERSION, code, 0, bytes.fromhex(BRIDGE), K, C)
    crc = zlib.crc32(data, zlib.crc32(wire.HEADER.pack(*fields, 0)))
    return wire.HEADER.pack(*fields, crc) + data


shapes = st.tuples(st.integers(1, 40), st.integers(1, 64), st.integers(0, 2**32))


@settings(max_examples=60, deadline=None)
@given(shape=shapes, dtype=st.sampled_from(DTYPES))
def test_a_latent_comes_back_within_the_stated_error(shape: tuple[int, int, int], dtype: wire.DType) -> None:
    latent = latent_of(*shape)
    message = wire.encode(latent, BRIDGE, dtype)
    back = wire.decode(message, bridge_id=BRIDGE, latent_dim=shape[1], max_slots=shape[0])
    assert (back.bridge_id, back.dtype, back.latent.dtype, back.latent.shape) == (BRIDGE, dtype, np.float32, shape[:2])
    assert len(message) == wire.message_bytes(shape[0], shape[1], dtype)
    error = np.abs(back.latent.astype(np.float64) - latent)
    largest = np.abs(latent).max(axis=1, keepdims=True)
    groups = [latent[:, start : start + wire.GROUP] for start in range(0, shape[1], wire.GROUP)]
    near = np.concatenate([np.abs(part).max(axis=1, keepdims=True).repeat(part.shape[1], 1) for part in groups], axis=1)
    bound = {
        "float32": 0,
        "float16": np.abs(latent) * 2.0**-11 + 2.0**-25,
        "int8": largest / 254 * (1 + 1e-5),
        "int4": near / 14 * (1 + 2.0**-7) + 2.0**-22,  # the scale is a float16
    }[dtype]
    assert (error <= bound).all()


@each_dtype
def test_encoding_a_decoded_latent_gives_the_same_bytes(dtype: wire.DType) -> None:
    message = wire.encode(latent_of(3, 5), BRIDGE, dtype)
    assert wire.encode(wire.decode(message).latent, BRIDGE, dtype) == message


@each_dtype
def test_a_slot_of_zeros_stays_zeros(dtype: wire.DType) -> None:
    latent = latent_of(3, 8)
    latent[1] = 0
    assert not wire.decode(wire.encode(latent, BRIDGE, dtype)).latent[1].any()


def test_int8_scales_each_slot_by_itself() -> None:
    latent = latent_of(2, 64) * np.array([[1.0], [1e-3]], dtype=np.float32)
    error = np.abs(wire.decode(wire.encode(latent, BRIDGE, "int8")).latent - latent).max(axis=1)
    assert error[1] < 1e-4 < error[0]


def test_a_latent_that_is_a_view_is_sent_as_it_reads() -> None:
    latent = latent_of(6, 4)
    for dtype in DTYPES:
        assert wire.encode(latent.T[:, ::2], BRIDGE, dtype) == wire.encode(latent.T[:, ::2].copy(), BRIDGE, dtype)


@each_dtype
def test_every_truncation_and_every_addition_is_refused(dtype: wire.DType) -> None:
    message = wire.encode(latent_of(2, 3), BRIDGE, dtype)
    for end in range(len(message)):
        with pytest.raises(InvalidMessage):
            wire.decode(message[:end])
    with pytest.raises(InvalidMessage, match=f"has {len(message) + 1} bytes; .* makes {len(message)}"):
        wire.decode(message + b"\0")


@each_dtype
def test_every_single_flipped_bit_is_refused(dtype: wire.DType) -> None:
    message = wire.encode(latent_of(2, 3), BRIDGE, dtype)
    for bit in range(8 * len(message)):
        damaged = bytearray(message)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(InvalidMessage):
            wire.decode(bytes(damaged), bridge_id=BRIDGE)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=120))
def test_noise_is_refused_and_nothing_else_goes_wrong(noise: bytes) -> None:
    with pytest.raises(InvalidMessage):
        wire.decode(noise)
    with pytest.raises(InvalidMessage):
        wire.decode(wire.encode(latent_of(2, 2), BRIDGE)[:24] + noise)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, 1e3])
@pytest.mark.parametrize("dtype, code", [("<f4", 0), ("<f2", 1)])
def test_numbers_that_would_poison_a_receiver_are_refused_behind_a_right_checksum(
    value: float, dtype: str, code: int
) -> None:
    with np.errstate(over="ignore"):
        numbers = np.array([[1, 1, 1], [1, value, 1]], dtype=dtype)
    with pytest.raises(InvalidMessage, match=r"finite|RMS"):
        wire.decode(forged(2, 3, code, numbers.tobytes()))


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, 3e38, 1e3])
def test_a_hostile_int8_scale_is_refused_behind_a_right_checksum(scale: float) -> None:
    scales = np.array([0.01, scale], dtype="<f4")
    for whole in ([100, 0, 1], [127, 127, -127]):
        data = scales.tobytes() + np.array([[1, 2, 3], whole], dtype="i1").tobytes()
        with pytest.raises(InvalidMessage, match=r"finite|RMS"):
            wire.decode(forged(2, 3, 2, data))


def test_int4_scales_each_32_numbers_by_themselves_and_takes_4_and_a_half_bits_a_number() -> None:
    latent = latent_of(3, 64)
    latent[:, 32:] *= 1e-2
    message = wire.encode(latent, BRIDGE, "int4")
    error = np.abs(wire.decode(message).latent - latent)
    assert error[:, 32:].max() < 3e-3 < 0.02 < error[:, :32].max()
    assert len(message) - wire.HEADER.size == 3 * 64 * 4.5 / 8


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, 6e4])
def test_a_hostile_int4_scale_is_refused_behind_a_right_checksum(scale: float) -> None:
    data = np.array([0.5, scale], dtype="<f2").tobytes() + bytes([0x11, 0x01, 0x21, 0x01])
    with pytest.raises(InvalidMessage, match=r"finite|RMS"):
        wire.decode(forged(2, 3, 3, data))


@each_dtype
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38, 1e5])
def test_a_latent_that_could_not_be_decoded_is_not_sent(dtype: wire.DType, value: float) -> None:
    latent = latent_of(2, 3)
    latent[1, 1] = value
    with pytest.raises(InvalidMessage, match=r"finite|RMS"):
        wire.encode(latent, BRIDGE, dtype)


@each_dtype
@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_an_empty_latent_is_not_sent(dtype: wire.DType, shape: tuple[int, int]) -> None:
    with pytest.raises(InvalidMessage):
        wire.encode(np.zeros(shape, dtype=np.float32), BRIDGE, dtype)


def test_a_latent_of_another_bridge_is_refused_with_both_ids() -> None:
    other = "ff" * 16
    with pytest.raises(IncompatibleBridge, match=f"{BRIDGE}.*{other}"):
        wire.decode(wire.encode(latent_of(2, 3), BRIDGE), bridge_id=other)


def test_a_latent_of_another_width_is_refused_with_both_widths() -> None:
    with pytest.raises(IncompatibleBridge, match="3 wide; this bridge reads 4"):
        wire.decode(wire.encode(latent_of(2, 3), BRIDGE), bridge_id=BRIDGE, latent_dim=4)


def test_more_slots_than_the_caller_takes_are_refused_with_both_numbers() -> None:
    message = wire.encode(latent_of(5, 3), BRIDGE)
    assert wire.decode(message, max_slots=5).latent.shape == (5, 3)
    with pytest.raises(InvalidMessage, match=r"5 slots; .* at most 4"):
        wire.decode(message, max_slots=4)


@pytest.mark.parametrize("K, C", [(0xFFFFFFFF, 0xFFFFFFFF), (1 << 16, 1 << 14), (1 << 16, 1), (0, 5), (5, 0)])
@pytest.mark.parametrize("code", [0, 1, 2])
def test_an_absurd_size_is_refused_by_its_header_alone(K: int, C: int, code: int) -> None:
    with pytest.raises(InvalidMessage, match=f"{K}×{C}"):
        wire.decode(forged(K, C, code, b"\0" * 8))


def test_a_message_at_the_byte_limit_is_named_with_both_numbers() -> None:
    with pytest.raises(InvalidMessage, match=f"at most {wire.MAX_MESSAGE_BYTES} are taken"):
        wire.decode(forged(1 << 16, 1 << 14, 0, b""))


def test_an_unknown_version_or_dtype_is_named() -> None:
    message = wire.encode(latent_of(1, 1), BRIDGE)
    with pytest.raises(InvalidMessage, match=r"version 2; .* version 1"):
        wire.decode(message[:4] + b"\2" + message[5:])
    with pytest.raises(InvalidMessage, match="dtype code is 9"):
        wire.decode(message[:5] + b"\x09" + message[6:])


def test_the_header_is_as_documented() -> None:
    message = wire.encode(latent_of(2, 3), BRIDGE, "int8")
    assert (message[:4], message[4], message[5], message[6:8]) == (b"LWIR", 1, 2, b"\0\0")
    assert message[8:24].hex() == BRIDGE and struct.unpack("<II", message[24:32]) == (2, 3)
    assert struct.unpack("<I", message[32:36])[0] == zlib.crc32(message[:32] + bytes(4) + message[36:])


def test_a_dtype_is_known_by_its_name() -> None:
    assert [wire.as_dtype(name) for name in DTYPES] == list(DTYPES)
    with pytest.raises(InvalidRequest, match="'float64' is unknown; expected one of float32, float16, int8, int4"):
        wire.as_dtype("float64")
