"""What is usual of latents, how far others are from it, and the file that keeps it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.checkpoint import load_bridge, read_manifest, save_bridge
from latentwire.bridge.drift import FEWEST, STATISTICS, LatentStatistics, load_statistics, save_statistics
from latentwire.bridge.errors import CorruptCheckpoint

C = 16  # latent width of the tiny bridge
SPREAD = np.linspace(0.5, 2.0, C)


def slots(count: int, seed: int, away: float = 0.0) -> list[NDArray[np.float32]]:
    """Mean slots (C,) whose mean is so many standard deviations from 3 in every channel."""
    drawn = np.random.default_rng(seed).standard_normal((count, C))
    return list((3 + SPREAD * (drawn + away)).astype(np.float32))


def latents(count: int, seed: int) -> list[NDArray[np.float32]]:
    """Latents (K, C) of one slot to three, with these mean slots."""
    return [np.repeat(slot[None], 1 + i % 3, axis=0) for i, slot in enumerate(slots(count, seed))]


def made(count: int = 400) -> LatentStatistics:
    statistics = LatentStatistics.of(latents(count, 0), "facts", "0" * 64)
    assert statistics is not None
    return statistics


def test_statistics_are_of_the_mean_slot_of_each_text_whatever_its_length() -> None:
    statistics = made()
    assert statistics.texts == 400
    assert statistics.mean == pytest.approx(np.mean(slots(400, 0), axis=0), abs=1e-5)
    assert statistics.std == pytest.approx(np.std(slots(400, 0), axis=0), abs=1e-5)


@pytest.mark.parametrize("away", [0.25, 0.5, 1.0, -2.0])
@pytest.mark.parametrize("count", [64, 256])
def test_a_drift_is_told_in_standard_deviations_however_many_texts_there_are(away: float, count: int) -> None:
    assert made().drift(slots(count, 1, away)) == pytest.approx(abs(away), abs=0.12)


def test_what_few_texts_are_away_by_chance_is_no_drift() -> None:
    drifts = [made(64).drift(slots(64, seed)) for seed in range(1, 50)]
    assert np.mean(drifts) < 0.1  # 0.18 with it
    assert LatentStatistics.of(latents(FEWEST - 1, 0), "facts", "0" * 64) is None


def test_a_channel_that_hardly_varied_does_not_drown_the_others() -> None:
    statistics = made()
    steady = replace(statistics, std=[1e-9, *statistics.std[1:]])
    moved = [slot + np.eye(C, dtype=np.float32)[0] * 1e-3 for slot in slots(256, 1)]
    assert steady.drift(moved) < 2.0


def test_a_bridge_that_tells_no_texts_apart_has_nothing_usual() -> None:
    assert LatentStatistics.of([np.ones((2, C), np.float32)] * FEWEST, "facts", "0" * 64) is None


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_a_latent_that_is_not_finite_leaves_nothing_usual(odd: float) -> None:
    drawn = latents(FEWEST, 0)
    assert LatentStatistics.of(drawn, "facts", "0" * 64) is not None
    drawn[3][0, 1] = odd
    assert LatentStatistics.of(drawn, "facts", "0" * 64) is None


def test_statistics_are_kept_beside_the_weights_and_change_no_id(checkpoint: Path, tmp_path: Path) -> None:
    _, bridge = load_bridge(checkpoint)
    manifest = save_bridge(tmp_path, bridge)
    assert load_statistics(tmp_path, manifest) is None and Bridge.load(tmp_path).statistics is None
    save_statistics(tmp_path, manifest.bridge_id, made())
    assert read_manifest(tmp_path) == manifest
    assert Bridge.load(tmp_path).statistics == made()


def test_new_weights_delete_the_statistics_of_the_old(checkpoint: Path, tmp_path: Path) -> None:
    _, bridge = load_bridge(checkpoint)
    save_statistics(tmp_path, save_bridge(tmp_path, bridge).bridge_id, made())
    assert load_statistics(tmp_path, save_bridge(tmp_path, bridge)) is None


@pytest.mark.parametrize(
    "path, value, named",
    [
        (("latents", "mean"), [0.0] * 3, "latents.mean has 3 numbers, expected 16"),
        (("latents", "std"), [1.0] * 17, "latents.std has 17 numbers, expected 16"),
        (("latents", "std"), [-1.0] * C, "latents.std.0: Input should be greater than or equal"),
        (("latents", "texts"), "many", "latents.texts: Input should be a valid integer"),
        (("more",), 1, "more: Unexpected keyword argument"),
    ],
)
def test_statistics_that_are_damaged_are_refused_by_name(
    checkpoint: Path, tmp_path: Path, path: tuple[str, ...], value: object, named: str
) -> None:
    manifest = save_bridge(tmp_path, load_bridge(checkpoint)[1])
    save_statistics(tmp_path, manifest.bridge_id, made())
    document = json.loads((tmp_path / STATISTICS).read_text())
    at = document
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    (tmp_path / STATISTICS).write_text(json.dumps(document))
    with pytest.raises(CorruptCheckpoint) as raised:
        Bridge.load(tmp_path)
    assert named in str(raised.value) and STATISTICS in str(raised.value)


def test_statistics_of_another_bridge_are_left_aside_with_a_warning(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = save_bridge(tmp_path, load_bridge(checkpoint)[1])
    save_statistics(tmp_path, "f" * 32, made())
    assert Bridge.load(tmp_path).statistics is None
    assert f"is of bridge {'f' * 32}, and this one is {manifest.bridge_id}" in caplog.text
