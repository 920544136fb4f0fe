"""What a family of models cannot do here, and what has to be known of it: tables, read from configurations alone.

``docs/families.md`` says what was tried. A refusal names the role: a model may send and not receive.
"""

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from transformers import AutoModelForCausalLM, PreTrainedConfig

from latentwire.bridge.errors import ModelUnavailable
from latentwire.bridge.quantised import check_quantisation

log = logging.getLogger(__name__)

Role = Literal["sender", "receiver"]
ROLES: tuple[Role, ...] = ("sender", "receiver")
LENGTHS = ("max_position_embeddings", "max_seq_len")
WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size")
BY_LONGEST = ("longrope",)
"""Rotary embeddings whose frequencies change for a whole batch once its longest row passes the original length;
``dynamic`` ones do so too, but beyond ``max_position_embeddings``, where nothing is read."""


@dataclass(frozen=True)
class Refusal:
    """Models that cannot play some roles: by their configuration, and why."""

    roles: tuple[Role, ...]
    applies: Callable[[PreTrainedConfig], bool]
    why: str


def _above(attribute: str, least: int) -> Callable[[PreTrainedConfig], bool]:
    """Whether a number of the configuration is above ``least``."""
    return lambda config: (getattr(config.get_text_config(), attribute, None) or 0) > least


def _is(*kinds: str) -> Callable[[PreTrainedConfig], bool]:
    return lambda config: config.get_text_config().model_type in kinds


def _takes_no_embeddings(config: PreTrainedConfig) -> bool:
    """Whether the library's ``generate`` refuses embeddings for this family, looked up as it does itself."""
    made: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if made is None:  # no causal language model: loading it raises that
        return False
    return "inputs_embeds" not in inspect.signature(made.prepare_inputs_for_generation).parameters


REFUSALS = (
    Refusal(
        ("receiver",),
        _above("hidden_size_per_layer_input", 0),
        "every layer reads an embedding of the token's id, and soft tokens have none",
    ),
    Refusal(
        ("sender",),
        _above("altup_num_inputs", 1),
        "its layers pass several states for each token on, and a bridge reads one",
    ),
    Refusal(("receiver",), _takes_no_embeddings, "the library's generate takes token ids alone for this family"),
    Refusal(("receiver",), _is("rwkv"), "it reads padding, so that its answers would depend on the batch"),
)


def check_usable(name: str, config: PreTrainedConfig, role: Role | None = None) -> None:
    """Refuse a model that cannot be read rightly or play its part (ModelUnavailable, naming what is in the way)."""
    check_quantisation(name, config)
    for refusal in REFUSALS:
        if role in refusal.roles and refusal.applies(config):
            family = config.get_text_config().model_type
            raise ModelUnavailable(f"model {name!r} ({family}) cannot be a {role}: {refusal.why}")


def context_tokens(config: PreTrainedConfig) -> int:
    """Longest input in tokens: what the positions allow, and no more than what keeps rows of a batch apart.

    Where frequencies depend on the longest row of a batch, that is the length up to which they do not.
    """
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in LENGTHS]
    by_longest = [rope for rope in _ropes(text) if rope.get("rope_type") in BY_LONGEST]
    limits += [rope.get("original_max_position_embeddings") for rope in by_longest]
    return min((int(limit) for limit in limits if limit), default=1 << 20)


def window_tokens(config: PreTrainedConfig) -> int:
    """How far back the attention of some layers reaches, in tokens; 0 where nothing ends it."""
    text = config.get_text_config()
    return max((int(size) for name in WINDOWS if (size := getattr(text, name, None))), default=0)


def _ropes(text: PreTrainedConfig) -> list[dict[str, Any]]:
    """The rotary embeddings of a model: one, or one for each kind of layer."""
    found = getattr(text, "rope_parameters", None) or {}
    return [found] if "rope_type" in found else [rope for rope in found.values() if isinstance(rope, dict)]
