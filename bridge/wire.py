"""Latent ↔ bytes. numpy alone: a client needs no torch to read or check a message.

A message, little-endian:

    offset  size  field
    0       4     magic ``LWIR``
    4       1     version (1)
    5       1     dtype: 0 float32, 1 float16, 2 int8
    6       2     reserved, zero
    8       16    bridge id: which latent space this is
    24      4     K, slots
    28      4     C, width
    32      4     CRC-32 of the whole message with this field zero
    36      …     int8: K float32 scales; then K×C numbers, row by row

Dimensions used in this file:
    K slots    C latent width
"""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bridge.errors import IncompatibleBridge, InvalidMessage, InvalidRequest

Latent = NDArray[np.float32]
DType = Literal["float32", "float16", "int8"]
MAGIC, VERSION = b"LWIR", 1
HEADER = struct.Struct("<4sBBH16sIII")
CODES: dict[DType, int] = {"float32": 0, "float16": 1, "int8": 2}
NUMPY: dict[DType, Any] = {"float32": "<f4", "float16": "<f2", "int8": "i1"}
MAX_SLOTS, MAX_WIDTH = 1 << 16, 1 << 14
MAX_MESSAGE_BYTES = 64 << 20
MAX_RMS = 4.0  # encoders send slots of RMS 1; rounding moves that by a percent, an attack by more


@dataclass(frozen=True, eq=False)
class Message:
    """A decoded message: the latent as float32 (K, C), the bridge it came from, the dtype it travelled in."""

    latent: NDArray[np.float32]
    bridge_id: str
    dtype: DType


def encode(latent: NDArray[np.float32], bridge_id: str, dtype: DType = "float16") -> bytes:
    """Pack a latent (K, C).

    float16 halves float32 at a relative error of 2⁻¹¹. int8 keeps one scale per slot, so that a slot's error
    is at most 1/254 of its own largest number.

    Args:
        latent: Slots of RMS 1.
        bridge_id: 32 hex digits.
        dtype: What the numbers travel in.

    Raises:
        InvalidMessage: The latent could not be decoded again: not finite, empty or over the limits.
    """
    K, C = latent.shape
    _check_shape(K, C, CODES[dtype], message_bytes(K, C, dtype))
    _check_numbers(latent)
    if dtype == "int8":
        scale = (np.abs(latent).max(axis=1, initial=0.0) / 127).astype("<f4")
        whole = np.rint(latent / np.where(scale > 0, scale, 1)[:, None]).astype("i1")
        data = scale.tobytes() + whole.tobytes()
    else:
        data = np.ascontiguousarray(latent, dtype=NUMPY[dtype]).tobytes()
    fields = (MAGIC, VERSION, CODES[dtype], 0, bytes.fromhex(bridge_id), K, C)
    crc = zlib.crc32(data, zlib.crc32(HEADER.pack(*fields, 0)))
    return bytes(HEADER.pack(*fields, crc) + data)


def decode(
    message: bytes, *, bridge_id: str | None = None, latent_dim: int | None = None, max_slots: int | None = None
) -> Message:
    """Unpack a message, trusting nothing: sizes before memory, checksum before numbers, numbers before use.

    A receiver that once read NaN answers later, normal requests wrongly, so nothing unchecked may reach one.

    Args:
        message: The bytes.
        bridge_id: The latent space expected; None accepts any.
        latent_dim: The width C expected; None accepts any up to ``MAX_WIDTH``.
        max_slots: The most slots this caller takes.

    Raises:
        InvalidMessage: Truncated, altered, of an unknown version, not finite or out of bounds.
        IncompatibleBridge: Intact, but of another bridge or width.
    """
    if len(message) < HEADER.size:
        raise InvalidMessage(f"the message has {len(message)} bytes; a header alone has {HEADER.size}")
    magic, version, code, reserved, sender_id, K, C, crc = HEADER.unpack_from(message)
    if magic != MAGIC:
        raise InvalidMessage(f"the message starts with {magic!r}; a latent starts with {MAGIC!r}")
    if version != VERSION or reserved:
        raise InvalidMessage(f"the message is of version {version}; this program reads version {VERSION}")
    dtype = _check_shape(K, C, code, len(message))
    data = memoryview(message)[HEADER.size :]
    actual = zlib.crc32(data, zlib.crc32(message[: HEADER.size - 4] + bytes(4)))
    if actual != crc:
        raise InvalidMessage(f"the message's checksum is {crc:08x} but its bytes give {actual:08x}: it was altered")
    if bridge_id is not None and sender_id.hex() != bridge_id:
        raise IncompatibleBridge(f"the latent is of bridge {sender_id.hex()}; this bridge is {bridge_id}")
    if latent_dim is not None and latent_dim != C:
        raise IncompatibleBridge(f"the latent is {C} wide; this bridge reads {latent_dim}")
    if max_slots is not None and max_slots < K:
        raise InvalidMessage(f"the latent has {K} slots; this bridge sends at most {max_slots}")
    latent = _NUMBERS[dtype](data, K, C)
    _check_numbers(latent)
    return Message(latent, sender_id.hex(), dtype)


def as_dtype(name: str) -> DType:
    """A dtype by name (InvalidRequest when there is none)."""
    for known in CODES:
        if known == name:
            return known
    raise InvalidRequest(f"dtype {name!r} is unknown; expected one of {', '.join(CODES)}", param="dtype")


def message_bytes(slots: int, latent_dim: int, dtype: DType) -> int:
    """Length of a message in bytes."""
    scales = 4 * slots if dtype == "int8" else 0
    return HEADER.size + scales + slots * latent_dim * int(np.dtype(NUMPY[dtype]).itemsize)


def _check_shape(K: int, C: int, code: int, length: int) -> DType:
    names = {number: name for name, number in CODES.items()}
    if code not in names:
        raise InvalidMessage(f"the message's dtype code is {code}; known are {CODES}")
    if not (1 <= K <= MAX_SLOTS and 1 <= C <= MAX_WIDTH):
        raise InvalidMessage(f"the message says {K}×{C}; at least 1×1 and at most {MAX_SLOTS}×{MAX_WIDTH} is taken")
    expected = message_bytes(K, C, names[code])
    if expected > MAX_MESSAGE_BYTES:
        raise InvalidMessage(f"a {K}×{C} message has {expected} bytes; at most {MAX_MESSAGE_BYTES} are taken")
    if expected != length:
        raise InvalidMessage(f"the message has {length} bytes; {K}×{C} {names[code]} makes {expected}")
    return names[code]


def _check_numbers(latent: NDArray[np.float32]) -> None:
    if not np.isfinite(latent).all():
        raise InvalidMessage("the latent holds NaN or infinite numbers; every number must be finite")
    rms = float(np.sqrt(np.square(latent, dtype=np.float64).mean(axis=1)).max(initial=0.0))
    if rms > MAX_RMS:
        raise InvalidMessage(f"a slot of the latent has RMS {rms:.3g}; encoders send 1 and at most {MAX_RMS} is taken")


def _read_int8(data: memoryview, K: int, C: int) -> NDArray[np.float32]:
    scale = np.frombuffer(data, "<f4", count=K)
    whole = np.frombuffer(data, "i1", offset=4 * K).reshape(K, C)
    with np.errstate(over="ignore", invalid="ignore"):  # a hostile scale is refused with the numbers it makes
        latent: NDArray[np.float32] = whole.astype(np.float32) * scale[:, None]
    return latent


def _read_float(dtype: DType) -> Callable[[memoryview, int, int], NDArray[np.float32]]:
    return lambda data, K, C: np.frombuffer(data, NUMPY[dtype]).reshape(K, C).astype(np.float32)


_NUMBERS: dict[DType, Callable[[memoryview, int, int], NDArray[np.float32]]] = {
    "float32": _read_float("float32"),
    "float16": _read_float("float16"),
    "int8": _read_int8,
}
