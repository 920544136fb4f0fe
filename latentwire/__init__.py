"""LatentWire: train, measure and serve bridges that carry a text from one frozen language model to another.

    import latentwire

    bridge = latentwire.Bridge.load("builtin")
    latents = bridge.encode(["Mara wants a cup of tea."])
    print(bridge.generate(latents, "Question: What does Mara want?\\nAnswer:").texts[0])

A name is imported when it is used first: ``Client`` needs no torch, and ``import latentwire`` needs nothing.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentwire.bridge.bridge import Bridge
    from latentwire.bridge.errors import LatentWireError
    from latentwire.bridge.evaluation.api import ConditionResult, Report, evaluate
    from latentwire.bridge.results import Encoded, Generated, Latent, Output, Timing, TokenLogprob, Usage
    from latentwire.service.client.client import AsyncClient, Client
    from latentwire.service.client.types import BridgeInfo, Evaluation, ServiceError, Token
    from latentwire.training.api import TrainingRun, train

__version__ = "0.1.0"
__all__ = [
    "AsyncClient", "Bridge", "BridgeInfo", "Client", "ConditionResult", "Encoded", "Evaluation", "Generated",
    "Latent", "LatentWireError", "Output", "Report", "ServiceError", "Timing", "Token", "TokenLogprob",
    "TrainingRun", "Usage", "__version__", "evaluate", "train",
]  # fmt: skip

_MODULES = {
    "bridge.bridge": ("Bridge",),
    "bridge.errors": ("LatentWireError",),
    "bridge.evaluation.api": ("ConditionResult", "Report", "evaluate"),
    "bridge.results": ("Encoded", "Generated", "Latent", "Output", "Timing", "TokenLogprob", "Usage"),
    "service.client.client": ("AsyncClient", "Client"),
    "service.client.types": ("BridgeInfo", "Evaluation", "ServiceError", "Token"),
    "training.api": ("TrainingRun", "train"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

_here = Path(__file__).resolve().parent
if not (_here / "bridge").is_dir():  # a checkout, whose folders lie beside this one; a wheel has them inside
    __path__.append(str(_here.parent))


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'latentwire' has no attribute {name!r}")
    return getattr(import_module(f"latentwire.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
