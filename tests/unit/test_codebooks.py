"""Codebooks turn a slot into a few bytes and back, and read no bytes but their own."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from latentwire.bridge import wire
from latentwire.bridge.codebooks import CODEBOOKS, VECTORS, Codebooks, load_codebooks, save_codebooks
from latentwire.bridge.errors import CorruptCheckpoint, IncompatibleBridge, InvalidMessage, InvalidRequest

BRIDGE = "00112233445566778899aabbccddeeff"
WIDTH = 6


def books_of(count: int, seed: int = 0, width: int = WIDTH) -> Codebooks:
    """Random vectors, each codebook's a third of those before, as leftovers are."""
    drawn = np.random.default_rng(seed).normal(size=(count, VECTORS, width))
    scaled = (drawn / 3.0 ** np.arange(count)[:, None, None]).astype(np.float16)
    return Codebooks(scaled.astype(np.float32), {"bridge_id": BRIDGE, "task": "world", "slots": "9"})


def latent_of(K: int, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(K, WIDTH)).astype(np.float32)


def test_each_code_names_the_vector_nearest_to_what_is_left_over() -> None:
    books, latent = books_of(3), latent_of(5)
    codes = books.codes(latent, 3)
    assert (codes.shape, codes.dtype) == ((5, 3), np.uint8)
    for slot, chosen in zip(latent, codes, strict=True):
        left = slot.copy()
        for vectors, code in zip(books.vectors, chosen, strict=True):
            assert code == np.square(vectors - left).sum(axis=1).argmin()
            left = left - vectors[code]
    np.testing.assert_allclose(
        books.latent(codes), sum(books.vectors[at, codes[:, at]] for at in range(3)), rtol=1e-6, atol=1e-6
    )


def test_fewer_codes_are_the_same_slots_coarser() -> None:
    books, latent = books_of(8), latent_of(40)
    every = books.codes(latent, 8)
    errors = []
    for count in (2, 4, 8):
        np.testing.assert_array_equal(books.codes(latent, count), every[:, :count])
        errors.append(float(np.square(books.latent(every[:, :count]) - latent).mean()))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("dtype", wire.CODED)
def test_a_coded_message_has_its_bytes_a_slot_and_comes_back_as_the_sum_of_its_vectors(dtype: wire.DType) -> None:
    books, latent = books_of(8), latent_of(7)
    message = wire.encode(latent, BRIDGE, dtype, codebooks=books)
    assert len(message) == wire.message_bytes(7, WIDTH, dtype) == wire.HEADER.size + 4 + 7 * wire.CODED[dtype]
    back = wire.decode(message, bridge_id=BRIDGE, latent_dim=WIDTH, max_slots=7, codebooks=books)
    assert (back.dtype, back.latent.dtype) == (dtype, np.float32)
    np.testing.assert_array_equal(back.latent, books.latent(books.codes(latent, wire.CODED[dtype])))


def test_a_dtype_for_which_codebooks_are_missing_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(InvalidRequest, match="'rq4' needs 4 codebooks and the bridge has none; latentwire quantise"):
        wire.encode(latent_of(2), BRIDGE, "rq4")
    with pytest.raises(InvalidRequest, match="'rq8' needs 8 codebooks and the bridge has 4"):
        wire.sendable("rq8", books_of(4))
    assert wire.sendable("rq4", books_of(4)) == "rq4"


def test_codes_are_read_by_the_codebooks_that_made_them_alone() -> None:
    message = wire.encode(latent_of(2), BRIDGE, "rq2", codebooks=books_of(4))
    with pytest.raises(IncompatibleBridge, match=f"only with the codebooks of bridge {BRIDGE} are they numbers"):
        wire.decode(message)
    with pytest.raises(IncompatibleBridge, match=r"codes are of codebooks [0-9a-f]{8}; this bridge's are [0-9a-f]{8}"):
        wire.decode(message, codebooks=books_of(4, seed=5))
    assert wire.codebooks_id("rq2", books_of(4)) != wire.codebooks_id("rq2", books_of(4, seed=5))
    assert wire.codebooks_id("int8", books_of(4)) == wire.codebooks_id("rq2", None) == ""


def test_a_message_of_more_codes_or_another_width_than_the_codebooks_have_is_refused() -> None:
    books = books_of(8)
    message = wire.encode(latent_of(2), BRIDGE, "rq8", codebooks=books)
    for other in (Codebooks(books.vectors[:4], {}), Codebooks(books.vectors[:, :, :5], {})):
        other.__dict__["digest"] = books.digest  # what chance could do to a checksum
        with pytest.raises(IncompatibleBridge, match="the message is rq8 of width 6; this bridge has"):
            wire.decode(message, codebooks=other)


def test_codes_that_make_a_slot_out_of_bounds_are_refused() -> None:
    books = books_of(2)
    loud = Codebooks(books.vectors * 100, books.about)
    sent = Codebooks(books.vectors, books.about)
    sent.__dict__["digest"] = loud.digest
    with pytest.raises(InvalidMessage, match="a slot of the latent has RMS"):
        wire.decode(wire.encode(latent_of(2), BRIDGE, "rq2", codebooks=sent), codebooks=loud)


def test_codebooks_come_back_from_their_file_and_a_folder_without_has_none(tmp_path: Path) -> None:
    books = books_of(4)
    assert load_codebooks(tmp_path, BRIDGE, WIDTH) is None
    save_codebooks(tmp_path, books)
    back = load_codebooks(tmp_path, BRIDGE, WIDTH)
    assert back is not None and back.digest == books.digest and back.about["slots"] == "9"
    np.testing.assert_array_equal(back.vectors, books.vectors)


def test_a_damaged_file_or_one_of_another_bridge_is_refused_with_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / CODEBOOKS
    save_codebooks(tmp_path, books_of(2))
    with pytest.raises(IncompatibleBridge, match=f"is of bridge {BRIDGE}; this one is {'f' * 32}"):
        load_codebooks(tmp_path, "f" * 32, WIDTH)
    with pytest.raises(CorruptCheckpoint, match=r"vectors are float16 \(2, 256, 6\); expected float16 \(any, 256, 7\)"):
        load_codebooks(tmp_path, BRIDGE, 7)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptCheckpoint, match="its vectors are damaged: checksum"):
        load_codebooks(tmp_path, BRIDGE, WIDTH)
    path.write_bytes(whole[:100])
    with pytest.raises(
        CorruptCheckpoint, match=r"is no whole safetensors file of codebooks: .* \(delete it, and quantise\)"
    ):
        load_codebooks(tmp_path, BRIDGE, WIDTH)
    broken = books_of(2)
    broken.vectors[0, 0, 0] = np.nan
    save_codebooks(tmp_path, replace(broken))
    with pytest.raises(CorruptCheckpoint, match="are damaged"):
        load_codebooks(tmp_path, BRIDGE, WIDTH)
