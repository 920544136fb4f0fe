"""LatentWire: train, measure and serve bridges that carry a text from one frozen language model to another."""

from pathlib import Path

__version__ = "0.1.0"

_here = Path(__file__).resolve().parent
if not (_here / "bridge").is_dir():  # a checkout, whose folders lie beside this one; a wheel has them inside
    __path__.append(str(_here.parent))
