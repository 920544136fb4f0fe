"""What stands at ``{latent}``: a latent, a text, nothing, or several sources in their order.

Dimensions used in this file:
    K slots    C latent width
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from latentwire.bridge.asked import Input, each_of
from latentwire.bridge.config import Layout, Prompt
from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.prompt import Content, expand, place

Part = NDArray[np.float32] | str
"""A latent (K, C), or a text that the receiver reads itself."""
Given = Part | tuple[Part, ...] | None
"""What stands at ``{latent}``; a tuple holds the sources of one prompt."""


def inputs_of(given: Any) -> list[Input | tuple[Input, ...]]:
    """One input or several, as a list; one that is itself a list or a tuple holds several sources.

    Raises:
        InvalidRequest: One is of another type, or holds no source.
    """
    kinds, expected = get_args(Input), "a text, a message in bytes or a Latent"
    several = isinstance(given, Iterable) and not isinstance(given, (Mapping, *kinds))
    return [
        tuple(each_of(list(item) or None, kinds, "source", expected))
        if isinstance(item, list | tuple)
        else each_of([item], kinds, "input", expected)[0]
        for item in (given if several else [given])
    ]


def texts_of(inputs: Sequence[Input | tuple[Input, ...]]) -> list[Given]:
    """Inputs as the receiver itself reads them (InvalidRequest where one is no text)."""
    for item in inputs:
        for one in item if isinstance(item, tuple) else (item,):
            if not isinstance(one, str):
                raise InvalidRequest(
                    f"fallback 'text' needs every input as text; one is of type {type(one).__name__}", param="inputs"
                )
    return [*inputs]  # type: ignore[list-item]  # looked at above


def parts_of(given: Given) -> tuple[Part, ...]:
    """The sources, in order."""
    return given if isinstance(given, tuple) else () if given is None else (given,)


def latent_of(given: Given) -> NDArray[np.float32] | None:
    """The latents of all sources as one (K, C), in the order of their soft tokens; None where there is none."""
    latents = [part for part in parts_of(given) if isinstance(part, np.ndarray)]
    return np.concatenate(latents) if len(latents) > 1 else latents[0] if latents else None


def slots_in(given: Given) -> int:
    """How many soft tokens there are."""
    latent = latent_of(given)
    return 0 if latent is None else len(latent)


def characters_in(given: Given) -> int:
    """Length of all texts."""
    return sum(len(part) for part in parts_of(given) if isinstance(part, str))


def arrange(layout: Layout, prompt: Prompt, given: Given) -> tuple[Prompt, Sequence[Content]]:
    """A prompt with one place, and all that stands there (InvalidRequest: other places than sources)."""
    contents = [len(part) if isinstance(part, np.ndarray) else part for part in parts_of(given)]
    return expand(place(layout, prompt, several=isinstance(given, tuple)), contents)
