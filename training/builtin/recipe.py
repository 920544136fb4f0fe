"""The committed recipe of each model: architecture, tokenizer, curriculum. The defaults make the shipped files."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from latentwire.training.builtin.documents import Mixture, piece_tokenizer, word_tokenizer
from latentwire.training.muon import Muon


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the weights, but for the seed. Learning rates are peaks."""

    tokenizer: Callable[[], PreTrainedTokenizerFast]
    model: Callable[[PreTrainedTokenizerFast], PreTrainedModel]
    stages: tuple[Mixture, ...]
    batch: int = 32
    max_questions: int = 6
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    decay_ratio: float = 0.3
    """The last share of the steps, over which the learning rate falls to zero in a straight line."""

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage(self, step: int) -> Mixture:
        """The mixture read at ``step`` (from 0)."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]

    def rate(self, step: int) -> float:
        """The learning rate at ``step`` as a share of its peak: a short warm-up, a plateau, a straight fall."""
        return min(1.0, (step + 1) / 50, (self.steps - step) / (self.decay_ratio * self.steps))


def _sizes(tokenizer: PreTrainedTokenizerFast, width: int, intermediate: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": intermediate,
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        **{f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")},
    }


def _llama(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_sizes(tokenizer, 128, 352)))


def _neox(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}
    # One after the other, so that a layer's MLP sees what its own attention found.
    config = GPTNeoXConfig(use_parallel_residual=False, rope_parameters=rope, **_sizes(tokenizer, 160, 640))
    return GPTNeoXForCausalLM(config)


# Direct facts ("Mara sings.") and copying first: from them the model learns to look back for a subject. With all
# relations from the start it stays at "right kind of value, anybody's".
RECIPES = {
    "llama": Recipe(
        word_tokenizer,
        _llama,
        (
            Mixture(400, copy=0.4, relations=1, wordings=1),
            Mixture(800, copy=0.1, repeat=0.1, terse=0.3, wordings=1),
            Mixture(1300, copy=0.05, repeat=0.2, terse=0.25, blank=0.03),
        ),
    ),
    "neox": Recipe(
        piece_tokenizer,
        _neox,
        (
            Mixture(400, copy=0.4, relations=1, wordings=1),
            Mixture(800, copy=0.1, repeat=0.05, terse=0.2, wordings=1),
            Mixture(1300, copy=0.05, repeat=0.05, terse=0.1, blank=0.03),
        ),
        max_questions=4,
    ),
}


def optimisers(model: PreTrainedModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, the head, norms and biases."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, p in model.named_parameters():
        (matrices if p.ndim == 2 and ".layers." in name else others).append(p)
    return [
        Muon(matrices, lr=recipe.matrix_rate),
        torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
