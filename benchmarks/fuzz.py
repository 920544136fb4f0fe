"""The decoder of messages against hostile bytes: what it refuses, with what, and the most memory it takes.

A case is a message and what a caller expects of it: random bytes, or a sound message that was changed and, often,
sealed again so that the change is not found by its checksum or signature. Whatever comes, ``wire.decode`` gives a
finite latent of the declared shape or raises a ``LatentWireError``, and takes no more memory than the declared cap.
"""

import hmac
import itertools
import struct
import time
import tracemalloc
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import typer
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from numpy.typing import NDArray

from benchmarks.record import record
from latentwire.bridge import wire
from latentwire.bridge.codebooks import VECTORS, Codebooks
from latentwire.bridge.errors import LatentWireError

BRIDGE, KEY = "00112233445566778899aabbccddeeff", b"a key of sixteen bytes or more"
DTYPES = [dtype for dtype in get_args(wire.DType) if dtype not in wire.CODED]
WIDE = 8  # width of the codebooks that some callers have
SPARE_BYTES = 1 << 14  # views, numbers of a slot, the error and its words: measured 3 KB
FIELDS = {"<B": (4, 5), "<H": (6,), "<I": (24, 28, 32)}  # where the header has numbers, by their type
EXTREMES = (0, 1, 2, 3, 127, 128, 255, (1 << 14) + 1, 1 << 15, 1 << 16, (1 << 16) + 1, 1 << 24, (1 << 31) - 1, 1 << 31)
PATTERNS = (b"\x00", b"\xff", b"\x00\x7c", b"\x01\x7c", b"\x00\x00\x80\x7f", b"\x01\x00\x80\x7f", b"\xff\xff\x7f\x7f")
BATCH = 2000  # cases of one run of the library, which remembers every case of a run


@dataclass(frozen=True)
class Case:
    """A message and the arguments of ``decode``."""

    message: bytes
    expected: dict[str, Any]


@dataclass
class Seen:
    """What became of the cases; ``peak_bytes`` is the most memory that decoding one took, beyond the message."""

    outcomes: Counter[str] = field(default_factory=Counter)
    peak_bytes: int = 0


def latent_of(K: int, C: int, number: int) -> NDArray[np.float32]:
    """Slots of RMS 1, as encoders send them; shape (K, C)."""
    drawn = np.random.default_rng(number).normal(size=(K, C)).astype(np.float32) + np.float32(1e-3)
    unit: NDArray[np.float32] = drawn / np.sqrt(np.square(drawn).mean(axis=1, keepdims=True))
    return unit


def sealed(message: bytes, key: bytes | None) -> bytes:
    """The message with the checksum and, with a key, the flag and the signature that its other bytes ask for."""
    if key is not None and len(message) >= wire.HEADER.size:
        flags = struct.unpack_from("<H", message, 6)[0] | wire.SIGNED
        message = message[:6] + struct.pack("<H", flags) + message[8:]
    if len(message) >= wire.HEADER.size:
        data = message[wire.HEADER.size :]
        crc = zlib.crc32(data, zlib.crc32(message[: wire.HEADER.size - 4] + bytes(4)))
        message = message[: wire.HEADER.size - 4] + struct.pack("<I", crc) + data
    return message if key is None else message + hmac.digest(key, message, "sha256")


@st.composite
def cases(draw: DrawFn) -> Case:
    """Messages from random bytes to sound ones, changed before or after they are sealed, and what is expected."""
    message = bytearray(draw(RANDOM) if draw(st.integers(0, 9)) == 0 else draw(st.sampled_from(SOUND)))
    _change(draw, message)
    if draw(st.integers(0, 4)):
        message = bytearray(sealed(bytes(message), draw(SEALS)))
    if draw(st.integers(0, 4)) == 0:
        _change(draw, message)
    return Case(bytes(message), draw(EXPECTED))


def _change(draw: DrawFn, message: bytearray) -> None:
    for change in draw(CHANGES):
        change(draw, message)


def _flip(draw: DrawFn, message: bytearray) -> None:
    if message:
        message[draw(st.integers(0, len(message) - 1))] ^= draw(st.integers(1, 255))


def _cut(draw: DrawFn, message: bytearray) -> None:
    del message[draw(st.integers(0, len(message))) :]


def _lengthen(draw: DrawFn, message: bytearray) -> None:
    message += draw(st.binary(min_size=1, max_size=64))


def _set_field(draw: DrawFn, message: bytearray) -> None:
    code = draw(st.sampled_from(list(FIELDS)))
    at, size = draw(st.sampled_from(FIELDS[code])), struct.calcsize(code)
    if len(message) >= wire.HEADER.size:
        struct.pack_into(code, message, at, draw(st.sampled_from(EXTREMES)) % (1 << 8 * size))


def _fill(draw: DrawFn, message: bytearray) -> None:
    """Numbers such as NaN, infinity and the largest there are, from somewhere to the end."""
    start = draw(st.integers(wire.HEADER.size, max(wire.HEADER.size, len(message))))
    message[start:] = (draw(st.sampled_from(PATTERNS)) * len(message))[: max(0, len(message) - start)]


BOOK_VECTORS = np.stack([latent_of(VECTORS, WIDE, number) / (1 + number) for number in range(4)])
BOOKS = Codebooks(BOOK_VECTORS.astype(np.float16).astype(np.float32), {})
# Drawn from many times, so made once: making a strategy takes longer than decoding a message.
SOUND = [
    wire.encode(latent_of(K, C, K * C), BRIDGE, dtype)
    for K, C in itertools.product((1, 2, 8, 9), (1, 7, 8, 16))
    for dtype in DTYPES
] + [
    wire.encode(latent_of(K, WIDE, K), BRIDGE, dtype, codebooks=BOOKS)
    for K, dtype in itertools.product((1, 8, 9), wire.CODED)
    if wire.CODED[dtype] <= len(BOOK_VECTORS)
]
RANDOM = st.binary(max_size=160)
SEALS = st.sampled_from([None, None, KEY, KEY, b"another key, as long"])
CHANGES = st.lists(st.sampled_from([_flip, _cut, _lengthen, _set_field, _fill]), max_size=2)
EXPECTED = st.fixed_dictionaries(
    {
        "bridge_id": st.sampled_from([None, BRIDGE, BRIDGE, "f" * 32]),
        "latent_dim": st.sampled_from([None, None, 8, 16]),
        "max_slots": st.sampled_from([None, 1, 8, 9]),
        "key": st.sampled_from([None, KEY]),
        "codebooks": st.sampled_from([None, BOOKS, BOOKS]),
    }
)


def cap_bytes(case: Case) -> int:
    """The most memory that decoding may take: for the numbers there are, never for those a header speaks of."""
    dtype = next((name for name, code in wire.CODES.items() if case.message[5:6] == bytes([code])), "float32")
    to_a_byte = WIDE // wire.CODED[dtype] if dtype in wire.CODED else 2 if dtype == "int4" else 1
    numbers = to_a_byte * min(len(case.message), wire.MAX_MESSAGE_BYTES)
    slots, width = case.expected.get("max_slots"), case.expected.get("latent_dim")
    if slots is not None and width is not None:
        numbers = min(numbers, slots * width)
    return wire.NUMBER_BYTES * numbers + SPARE_BYTES


def decode(case: Case, seen: Seen) -> None:
    """Decode a case, hold it to the promises of this file, and note what became of it."""
    tracemalloc.start()
    try:
        outcome = _outcome(case)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= cap_bytes(case), f"{peak} bytes for a message of {len(case.message)}: at most {cap_bytes(case)}"
    seen.outcomes[outcome] += 1
    seen.peak_bytes = max(seen.peak_bytes, peak)


def _outcome(case: Case) -> str:
    try:
        decoded = wire.decode(case.message, **case.expected)
    except LatentWireError as error:
        return type(error).__name__
    said = struct.unpack_from("<II", case.message, 24)
    assert decoded.latent.dtype == np.float32 and decoded.latent.shape == said, (decoded.latent.shape, said)
    assert np.isfinite(decoded.latent).all()
    return "decoded"


def fuzz(count: int, seen: Seen, first_seed: int = 0) -> None:
    """Decode ``count`` cases, the same ones for the same first seed."""
    for at, begin in enumerate(range(0, count, BATCH)):
        limits = settings(
            max_examples=min(BATCH, count - begin), deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        run = limits(given(cases())(lambda case: decode(case, seen)))
        seed(first_seed + at)(run)()


def largest(dtype: wire.DType) -> Case:
    """The largest message of a dtype that is taken."""
    width = 1 << 12
    slots = (wire.MAX_MESSAGE_BYTES - wire.HEADER.size) // (wire.message_bytes(1, width, dtype) - wire.HEADER.size)
    return Case(wire.encode(np.ones((slots, width), np.float32), BRIDGE, dtype), {})


def main(count: int = 100_000) -> None:
    """Decode COUNT hostile messages and the largest sound ones."""
    seen, started = Seen(), time.perf_counter()
    fuzz(count, seen)
    seconds, sound = time.perf_counter() - started, Seen()
    for dtype in DTYPES:
        decode(largest(dtype), sound)
    record(
        "fuzz",
        f"python -m benchmarks.fuzz --count {count}",
        {
            "cases": sum(seen.outcomes.values()),
            "outcomes": dict(seen.outcomes.most_common()),
            "other_exceptions": 0,  # one would have ended the run
            "seconds": round(seconds, 1),
            "worst_allocation_bytes": seen.peak_bytes,
            "worst_allocation_bytes_of_the_largest_messages": sound.peak_bytes,
            "cap_bytes_of_the_largest_messages": 2 * wire.NUMBER_BYTES * wire.MAX_MESSAGE_BYTES + SPARE_BYTES,
        },
    )


if __name__ == "__main__":
    typer.run(main)
