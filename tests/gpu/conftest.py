"""What tests on a GPU share: the device, or the reason why they are skipped."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from latentwire.bridge.devices import why_no_cuda
from latentwire.bridge.models import FrozenLM, load_model


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU."""
    if not torch.cuda.is_available():
        pytest.skip(f"a GPU is needed, but {why_no_cuda()}")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def on_device(device: torch.device, model_folders: dict[str, Path]) -> Callable[[str], FrozenLM]:
    """Loads a tiny model in float32, in which rounding changes no answer."""
    return lambda family: load_model(str(model_folders[family]), device=device, dtype=torch.float32)


@pytest.fixture(scope="session")
def llama(on_device: Callable[[str], FrozenLM]) -> FrozenLM:
    return on_device("llama")
