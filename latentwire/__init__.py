"""LatentWire: train, measure and serve bridges that carry a text from one frozen language model to another.

    import latentwire

    bridge = latentwire.Bridge.load("builtin")
    latents = bridge.encode(["Mara wants a cup of tea."])
    print(bridge.generate(latents, "Question: What does Mara want?\\nAnswer:").texts[0])

A name is imported when it is used first: ``Client`` needs no torch, and ``import latentwire`` needs nothing.
"""

import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentwire.bridge.bridge import Bridge
    from latentwire.bridge.bulk import encode_corpus
    from latentwire.bridge.corpus import Corpus
    from latentwire.bridge.errors import LatentWireError
    from latentwire.bridge.evaluation.evaluate import ConditionResult, Report, evaluate
    from latentwire.bridge.results import (
        Encoded,
        Generated,
        Latent,
        Likelihood,
        Output,
        ReadBack,
        Reading,
        Score,
        Scored,
        ScoredChoice,
        Timing,
        TokenLogprob,
        Usage,
    )
    from latentwire.service.client.client import AsyncClient, Client
    from latentwire.service.client.types import BridgeInfo, Evaluation, KeptLatent, ServiceError, Token
    from latentwire.training.hub import push_to_hub
    from latentwire.training.train import TrainingRun, train

__version__: str
__all__ = [
    "AsyncClient", "Bridge", "BridgeInfo", "Client", "ConditionResult", "Corpus", "Encoded", "Evaluation", "Generated",
    "KeptLatent", "Latent", "LatentWireError", "Likelihood", "Output", "ReadBack", "Reading", "Report", "Score",
    "Scored", "ScoredChoice", "ServiceError", "Timing", "Token", "TokenLogprob", "TrainingRun", "Usage", "__version__",
    "encode_corpus", "evaluate", "push_to_hub", "train",
]  # fmt: skip

_MODULES = {
    "bridge.bridge": ("Bridge",),
    "bridge.bulk": ("encode_corpus",),
    "bridge.corpus": ("Corpus",),
    "bridge.errors": ("LatentWireError",),
    "bridge.evaluation.evaluate": ("ConditionResult", "Report", "evaluate"),
    "bridge.results": (
        "Encoded",
        "Generated",
        "Latent",
        "Likelihood",
        "Output",
        "ReadBack",
        "Reading",
        "Score",
        "Scored",
        "ScoredChoice",
        "Timing",
        "TokenLogprob",
        "Usage",
    ),
    "service.client.client": ("AsyncClient", "Client"),
    "service.client.types": ("BridgeInfo", "Evaluation", "KeptLatent", "ServiceError", "Token"),
    "training.hub": ("push_to_hub",),
    "training.train": ("TrainingRun", "train"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

_here = Path(__file__).resolve().parent
if not (_here / "bridge").is_dir():  # a checkout, whose folders lie beside this one; a wheel has them inside
    __path__.append(str(_here.parent))


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("latentwire")
    if name not in _HOMES:
        raise AttributeError(f"module 'latentwire' has no attribute {name!r}")
    try:
        return getattr(import_module(f"latentwire.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if message := missing_extra(error, "train" if "training" in _HOMES[name] else "eval"):
            raise ImportError(f"latentwire.{name}: {message}", name=error.name) from error
        raise


def missing_extra(error: ModuleNotFoundError, extra: str) -> str | None:
    """What to install where a package of ours is not there, in one line; None where the package is none of ours."""
    from importlib.metadata import requires

    package = (error.name or "").partition(".")[0].replace("_", "-")
    if package not in {re.split(r"[^\w-]", line)[0] for line in requires("latentwire") or ()}:
        return None
    return f"{package} is not installed; pip install 'latentwire[{extra}]'"


def __dir__() -> list[str]:
    return __all__
