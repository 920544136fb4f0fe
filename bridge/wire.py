"""Latent ↔ bytes. numpy alone: a client needs no torch to read or check a message.

A message, little-endian:

    offset  size  field
    0       4     magic ``LWIR``
    4       1     version (1)
    5       1     dtype: 0 float32, 1 float16, 2 int8, 3 int4, 4 rq2, 5 rq4, 6 rq8
    6       2     flags: 1 signed; no other is known
    8       16    bridge id: which latent space this is
    24      4     K, slots
    28      4     C, width
    32      4     CRC-32 of header and data with this field zero
    36      …     int8: K float32 scales; int4: a float16 scale for each 32 numbers of a slot; then K×C numbers, row by
                  row, of int4 two to a byte, the first in the low half, each row from a byte of its own
                  rq2, rq4, rq8: CRC-32 of the bridge's codebooks, then as many codes of a byte for each slot
    end-32  32    signed: HMAC-SHA256 of everything before it

The checksum finds accidents: anyone can make one. The signature finds forgeries: only who holds the key can.

Dimensions used in this file:
    K slots    C latent width
"""

import hmac
import math
import struct
import zlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from latentwire.bridge.codebooks import Codebooks
from latentwire.bridge.errors import Forbidden, IncompatibleBridge, InvalidMessage, InvalidRequest

Latent = NDArray[np.float32]
DType = Literal["float32", "float16", "int8", "int4", "rq2", "rq4", "rq8"]
MAGIC, VERSION = b"LWIR", 1
HEADER = struct.Struct("<4sBBH16sIII")
CODES: dict[DType, int] = {"float32": 0, "float16": 1, "int8": 2, "int4": 3, "rq2": 4, "rq4": 5, "rq8": 6}
CODED: dict[DType, int] = {"rq2": 2, "rq4": 4, "rq8": 8}
"""Bytes of a slot in the dtypes whose numbers are only in the bridge's codebooks."""
CODEBOOKS_ID = struct.Struct("<I")
NUMPY: dict[DType, Any] = {"float32": "<f4", "float16": "<f2"}
GROUP = 32  # numbers that share a scale in int4
MAX_SLOTS, MAX_WIDTH = 1 << 16, 1 << 14
MAX_MESSAGE_BYTES = 64 << 20
SIGNED = 1  # the flag; a message without it is byte for byte what version 1 always was
SIGNATURE_BYTES = 32
NUMBER_BYTES = 5  # that decoding takes for each number: a float32, and whether it is finite
MIN_KEY_BYTES = 16
MAX_RMS = 4.0  # encoders send slots of RMS 1; rounding moves that by a percent, an attack by more


@dataclass(frozen=True, eq=False)
class Message:
    """A decoded message: the latent as float32 (K, C), the bridge it came from, the dtype it travelled in."""

    latent: NDArray[np.float32]
    bridge_id: str
    dtype: DType


def encode(
    latent: NDArray[np.float32], bridge_id: str, dtype: DType = "float16", *, key: bytes | None = None,
    codebooks: Codebooks | None = None,
) -> bytes:  # fmt: skip
    """Pack a latent (K, C), and sign it when there is a key.

    float16 has a relative error of 2⁻¹¹; int8, with a scale per slot, errs by at most 1/254 of a slot's largest number;
    int4, with a scale for each 32 numbers, by 1/14 of the largest of these, and takes 4.5 bits a number. rq2, rq4 and
    rq8 take 2, 4 and 8 bytes a slot, however wide it is, and err by what the bridge's codebooks leave over.

    Args:
        latent: Slots of RMS 1.
        bridge_id: 32 hex digits.
        dtype: What the numbers travel in.
        key: What ``as_key`` gave; None leaves the message unsigned.
        codebooks: The bridge's; rq2, rq4 and rq8 need them.

    Raises:
        InvalidRequest: The codebooks that the dtype needs are not there.
        InvalidMessage: The latent could not be decoded again: not finite, empty or over the limits.
    """
    check_codebooks(dtype, codebooks)
    K, C = latent.shape
    _check_shape(K, C, CODES[dtype], message_bytes(K, C, dtype))
    _check_numbers(latent)
    data = _numbers(latent, dtype, codebooks)
    return _packed((MAGIC, VERSION, CODES[dtype], 0, bytes.fromhex(bridge_id), K, C), data, key)


def sign(message: bytes, key: bytes) -> bytes:
    """The same numbers, signed: of an unsigned message that was made or checked here."""
    return _packed(HEADER.unpack_from(message)[:-1], message[HEADER.size :], key)


def _packed(fields: tuple[Any, ...], data: bytes, key: bytes | None) -> bytes:
    magic, version, code, _, *rest = fields
    header = (magic, version, code, 0 if key is None else SIGNED, *rest)
    crc = zlib.crc32(data, zlib.crc32(HEADER.pack(*header, 0)))
    message = bytes(HEADER.pack(*header, crc) + data)
    return message if key is None else message + _signature(message, key)


def decode(
    message: bytes,
    *,
    bridge_id: str | None = None,
    latent_dim: int | None = None,
    max_slots: int | None = None,
    key: bytes | None = None,
    codebooks: Codebooks | None = None,
) -> Message:
    """Unpack a message, trusting nothing: signature before anything, sizes before memory, checksum before numbers.

    A receiver that once read NaN answers later, normal requests wrongly, so nothing unchecked may reach one. The memory
    taken is ``NUMBER_BYTES`` for each number that is there, whatever the header says; of codes, for each of a slot's C.

    Args:
        message: The bytes.
        bridge_id: The latent space expected; None accepts any.
        latent_dim: The width C expected; None accepts any up to ``MAX_WIDTH``.
        max_slots: The most slots this caller takes.
        key: Take only what was signed with it. None takes signed and unsigned messages alike.
        codebooks: The bridge's; without them nobody reads what travels as rq2, rq4 or rq8.

    Raises:
        Forbidden: There is a key, and the message is not signed with it or was altered since.
        InvalidMessage: Truncated, altered, of an unknown version, not finite or out of bounds.
        IncompatibleBridge: Intact, but of another bridge or width, or its codes are of other codebooks.
    """
    if key is not None:
        _check_signature(message, key)
    if len(message) < HEADER.size:
        raise InvalidMessage(f"the message has {len(message)} bytes; a header alone has {HEADER.size}")
    magic, version, code, flags, sender_id, K, C, crc = HEADER.unpack_from(message)
    if magic != MAGIC:
        raise InvalidMessage(f"the message starts with {magic!r}; a latent starts with {MAGIC!r}")
    if version != VERSION or flags & ~SIGNED:
        met = f"the message has flags {flags:#x} and version {version}"
        raise InvalidMessage(f"{met}; this program reads flags 0 and {SIGNED} of version {VERSION}")
    end = len(message) - (SIGNATURE_BYTES if flags & SIGNED else 0)
    dtype = _check_shape(K, C, code, end)
    data = memoryview(message)[HEADER.size : end]
    actual = zlib.crc32(data, zlib.crc32(message[: HEADER.size - 4] + bytes(4)))
    if actual != crc:
        raise InvalidMessage(f"the message's checksum is {crc:08x} but its bytes give {actual:08x}: it was altered")
    if bridge_id is not None and sender_id.hex() != bridge_id:
        raise IncompatibleBridge(f"the latent is of bridge {sender_id.hex()}; this bridge is {bridge_id}")
    if latent_dim is not None and latent_dim != C:
        raise IncompatibleBridge(f"the latent is {C} wide; this bridge reads {latent_dim}")
    if max_slots is not None and max_slots < K:
        raise InvalidMessage(f"the latent has {K} slots; this bridge sends at most {max_slots}")
    if dtype in CODED:
        _check_coded(dtype, data, sender_id.hex(), C, codebooks)
    latent = _read_numbers(dtype, data, K, C, codebooks)
    _check_numbers(latent)
    return Message(latent, sender_id.hex(), dtype)


@dataclass(frozen=True, slots=True)
class Header:
    """What a message says about itself: the bridge it came from, the dtype it travels in, (K, C)."""

    bridge_id: str
    dtype: DType
    shape: tuple[int, int]


def header_of(message: bytes) -> Header:
    """The header of a message that was made or checked here."""
    _, _, code, _, sender_id, K, C, _ = HEADER.unpack_from(message)
    return Header(sender_id.hex(), next(name for name in CODES if CODES[name] == code), (int(K), int(C)))


def shape_of(message: bytes) -> tuple[int, int]:
    """(K, C) by the header of a message that was made or checked here."""
    return header_of(message).shape


def as_dtype(name: str) -> DType:
    """A dtype by name (InvalidRequest when there is none)."""
    for known in CODES:
        if known == name:
            return known
    raise InvalidRequest(f"dtype {name!r} is unknown; expected one of {', '.join(CODES)}", param="dtype")


def sendable(name: str, codebooks: Codebooks | None) -> DType:
    """A dtype by name that a bridge with these codebooks can send (InvalidRequest)."""
    dtype = as_dtype(name)
    check_codebooks(dtype, codebooks)
    return dtype


def codebooks_id(dtype: DType, codebooks: Codebooks | None) -> str:
    """By which codebooks messages of a dtype are read: their digest in hex; empty where none are needed."""
    return "" if codebooks is None or dtype not in CODED else f"{codebooks.digest:08x}"


def check_codebooks(dtype: DType, codebooks: Codebooks | None) -> None:
    """Refuse a dtype for which a bridge has no codebooks, or too few (InvalidRequest)."""
    have = 0 if codebooks is None else len(codebooks.vectors)
    if (need := CODED.get(dtype, 0)) > have:
        which = "the bridge has none" if have == 0 else f"the bridge has {have}"
        raise InvalidRequest(
            f"dtype {dtype!r} needs {need} codebooks and {which}; latentwire quantise makes them", param="dtype"
        )


def as_key(text: str) -> bytes:
    """A signing key from its text (InvalidRequest, which does not repeat it, when it is too short to keep a secret)."""
    key = text.encode()
    if len(key) < MIN_KEY_BYTES:
        raise InvalidRequest(f"the signing key has {len(key)} bytes; at least {MIN_KEY_BYTES} are needed")
    return key


def message_bytes(slots: int, latent_dim: int, dtype: DType) -> int:
    """Length of a message in bytes, without its signature."""
    if dtype in CODED:
        return HEADER.size + CODEBOOKS_ID.size + slots * CODED[dtype]
    if dtype == "int8":
        row = 4 + latent_dim
    elif dtype == "int4":
        row = 2 * -(-latent_dim // GROUP) + -(-latent_dim // 2)
    else:
        row = latent_dim * int(np.dtype(NUMPY[dtype]).itemsize)
    return HEADER.size + slots * row


def _signature(signed: bytes | memoryview, key: bytes) -> bytes:
    return hmac.digest(key, signed, "sha256")


def _check_signature(message: bytes, key: bytes) -> None:
    if len(message) > MAX_MESSAGE_BYTES + SIGNATURE_BYTES:  # hashing takes time, and no message is that long
        raise Forbidden(f"the message has {len(message)} bytes; at most {MAX_MESSAGE_BYTES} are signed")
    if len(message) < HEADER.size + SIGNATURE_BYTES or not message[6] & SIGNED:
        raise Forbidden("the message is not signed; this service takes only what it has signed itself")
    signed, signature = memoryview(message)[:-SIGNATURE_BYTES], message[-SIGNATURE_BYTES:]
    if not hmac.compare_digest(_signature(signed, key), signature):
        raise Forbidden("the message's signature is not this service's: another key signed it, or it was altered since")


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


def _check_coded(dtype: DType, data: memoryview, bridge_id: str, C: int, codebooks: Codebooks | None) -> None:
    """Refuse codes that these codebooks do not read (IncompatibleBridge)."""
    if codebooks is None:
        raise IncompatibleBridge(
            f"the message holds codes ({dtype}): only with the codebooks of bridge {bridge_id} are they numbers"
        )
    (made_by,) = CODEBOOKS_ID.unpack_from(data)
    count, _, width = codebooks.vectors.shape
    if made_by != codebooks.digest:
        raise IncompatibleBridge(
            f"the message's codes are of codebooks {made_by:08x}; this bridge's are {codebooks.digest:08x}"
        )
    if width != C or count < CODED[dtype]:
        raise IncompatibleBridge(
            f"the message is {dtype} of width {C}; this bridge has {count} codebooks of width {width}"
        )


def _check_numbers(latent: NDArray[np.float32]) -> None:
    squares = np.einsum("kc,kc->k", latent, latent, dtype=np.float64)  # no copy of the latent in float64
    rms = math.sqrt(squares.max(initial=0.0) / latent.shape[1])  # of float32 numbers: finite where all of them are
    if not math.isfinite(rms):
        raise InvalidMessage("the latent holds NaN or infinite numbers; every number must be finite")
    if rms > MAX_RMS:
        raise InvalidMessage(f"a slot of the latent has RMS {rms:.3g}; encoders send 1 and at most {MAX_RMS} is taken")


def _numbers(latent: Latent, dtype: DType, codebooks: Codebooks | None) -> bytes:
    """Scales, where there are any, and numbers, as they stand in a message; or codes."""
    if dtype in CODED and codebooks is not None:
        return CODEBOOKS_ID.pack(codebooks.digest) + codebooks.codes(latent, CODED[dtype]).tobytes()
    if dtype in NUMPY:
        return bytes(np.ascontiguousarray(latent, dtype=NUMPY[dtype]).tobytes())
    if dtype == "int8":
        scale = (np.abs(latent).max(axis=1, initial=0.0) / 127).astype("<f4")
        whole = np.rint(latent / np.where(scale > 0, scale, 1)[:, None]).astype("i1")
        return bytes(scale.tobytes() + whole.tobytes())
    K, C = latent.shape
    padded = np.pad(latent, ((0, 0), (0, -C % GROUP))).reshape(K, -1, GROUP)
    scale = (np.abs(padded).max(axis=2) / 7).astype("<f2")
    step = scale.astype(np.float32)[..., None]
    whole = np.rint(padded / np.where(step > 0, step, 1)).clip(-7, 7).astype("i1").reshape(K, -1)[:, : C + C % 2]
    halves = whole.view("u1") & 15
    return bytes(scale.tobytes() + (halves[:, ::2] | halves[:, 1::2] << 4).tobytes())


def _read_numbers(dtype: DType, data: memoryview, K: int, C: int, codebooks: Codebooks | None) -> Latent:
    if dtype in CODED and codebooks is not None:
        return codebooks.latent(np.frombuffer(data, np.uint8, offset=CODEBOOKS_ID.size).reshape(K, -1))
    if dtype in NUMPY:
        return np.frombuffer(data, NUMPY[dtype]).reshape(K, C).astype(np.float32)
    latent: Latent
    with np.errstate(over="ignore", invalid="ignore"):  # a hostile scale is refused with the numbers it makes
        if dtype == "int8":
            latent = np.frombuffer(data, "i1", offset=4 * K).reshape(K, C).astype(np.float32)
            latent *= np.frombuffer(data, "<f4", count=K)[:, None]
            return latent
        groups = -(-C // GROUP)
        packed = np.frombuffer(data, "i1", offset=2 * K * groups).reshape(K, -1)
        latent = np.empty((K, C), np.float32)
        latent[:, ::2] = packed << 4 >> 4  # shifts of signed bytes keep the sign
        latent[:, 1::2] = packed[:, : C // 2] >> 4
        scale = np.frombuffer(data, "<f2", count=K * groups).astype(np.float32).reshape(K, groups)
        for group in range(groups):
            latent[:, group * GROUP : (group + 1) * GROUP] *= scale[:, group, None]
    return latent
