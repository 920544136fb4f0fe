"""Tiny training runs between two random models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentwire.training import prepare
from latentwire.training.config import TrainConfig

MakeConfig = Callable[..., TrainConfig]


@pytest.fixture
def make(model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeConfig:
    """A tiny run; keyword arguments change it."""
    monkeypatch.setattr(prepare, "CHECKED", 20)  # two thousand scenes take longer than most of these runs

    def config(**changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "sender": str(model_folders["neox"]), "receiver": str(model_folders["llama"]), "task": "world",
            "out": tmp_path / "run", "cache": tmp_path / "cache", "ratio": 8, "latent_dim": 16, "hidden_dim": 32,
            "depth": 1, "max_steps": 6, "batch_size": 4, "warmup_steps": 2, "save_every": 2, "max_source_tokens": 48,
            "alignment_steps": 2, "reconstruction_weight": 0.0, "validate_every": 0, "probe_every": 0,
        }  # fmt: skip
        return TrainConfig(**{**values, **changes})

    return config
