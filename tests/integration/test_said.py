"""Losses of many columns, whose logits are made a few at a time: the same numbers and gradients, never all logits."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, CohereConfig, Gemma3TextConfig, GraniteConfig, OPTConfig

from latentwire.bridge.engine import answer_logits, token_losses
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.prompt import IGNORE, TEXT, Batch, Row, collate
from latentwire.training import said as saying
from latentwire.training.objectives import divergence
from latentwire.training.plan import plan
from latentwire.training.said import COLUMNS, Said, say
from latentwire.training.simulate import WORKING
from tests.conftest import FAMILIES
from tests.integration.test_plan import LEAN, config_of, write_llama

SLOTS = 3
TINY: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 261, "max_position_embeddings": 256,
}  # fmt: skip
ENDINGS = {
    "a soft cap": lambda: Gemma3TextConfig(**TINY, head_dim=8, final_logit_softcapping=2.0),
    "a scale": lambda: CohereConfig(**TINY, logit_scale=0.3, eos_token_id=2, bos_token_id=1),
    "a divisor": lambda: GraniteConfig(**TINY, logits_scaling=4.0),
    "a projection": lambda: OPTConfig(**TINY, ffn_dim=48, word_embed_proj_dim=16),
}
"""What families do to logits after, or to states before, the output layer."""


def batch_of(*lengths: tuple[int, int]) -> Batch:
    """Rows of (tokens, labelled tokens at the end) behind some soft tokens."""
    rows = []
    for read, said in lengths:
        labels = [IGNORE] * (read - said) + [5 + i for i in range(said)]
        rows.append(Row([7] * read, [*range(SLOTS), *[TEXT] * (read - SLOTS)], labels))
    return collate(rows, side="left")


def assert_same(lm: FrozenLM) -> None:
    """What is said in parts is what whole logits say, and so are the gradients of the soft tokens."""
    torch.manual_seed(0)
    batch = batch_of((2 * COLUMNS + 20, 2 * COLUMNS + 7), (COLUMNS + 9, 11), (6, 0))
    soft = (torch.randn(3, SLOTS, lm.width) * lm.embedding_rms()).requires_grad_()
    weights = torch.rand(3, 2 * COLUMNS + 7)
    logits, labels = answer_logits(lm, batch, soft)
    said = say(lm, batch, soft)
    wanted, found = token_losses(logits, labels), said.losses
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad((loss * weights).sum(), soft)[0] for loss in (wanted, found)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)
    assert gradients[1].any() and torch.equal(said.labels, labels)
    torch.testing.assert_close(said.logits, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(said.likeliest(), said.logits[:, :-1].argmax(dim=-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_whole_logits(lms: dict[str, FrozenLM], family: str) -> None:
    assert_same(lms[family])


@pytest.mark.parametrize("ending", ENDINGS)
def test_whatever_a_family_does_beside_its_output_layer_is_done(lms: dict[str, FrozenLM], ending: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ENDINGS[ending]()).eval().requires_grad_(False)
    given = lms["llama"]
    assert_same(FrozenLM(ending, given.tokenizer, model.config, (1,), model, given.fingerprint))


def test_a_divergence_from_a_teacher_is_that_of_whole_logits(lms: dict[str, FrozenLM]) -> None:
    lm, batch = lms["neox"], batch_of((80, 70), (40, 9))
    soft = (torch.randn(2, SLOTS, lm.width) * lm.embedding_rms()).requires_grad_()
    said, teacher = say(lm, batch, soft), say(lm, batch, soft.detach().roll(1, dims=0))
    mask = torch.ones_like(said.labels, dtype=torch.bool)
    found = said.each(lambda logits, at: divergence(logits, teacher.logits[:, at], mask[:, at]))
    wanted = divergence(said.logits, teacher.logits, mask)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    gradients = [torch.autograd.grad(loss.sum(), soft, retain_graph=True)[0] for loss in (wanted, found)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


class Widest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The largest tensor whose last dimension is a vocabulary, in elements."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary, self.elements = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [t.numel() for t in tree_leaves(result) if isinstance(t, Tensor) and t.shape[-1:] == (self.vocabulary,)]
        self.elements = max([self.elements, *made])
        return result


def test_no_more_logits_are_made_than_those_of_a_few_columns(lms: dict[str, FrozenLM]) -> None:
    lm, batch = lms["llama"], batch_of((220, 210), (200, 190))
    vocabulary = lm.model.config.vocab_size
    with Widest(vocabulary) as widest:
        soft = torch.randn(2, SLOTS, lm.width).requires_grad_()
        said = say(lm, batch, soft)
        said.losses.sum().backward()  # type: ignore[no-untyped-call]
        said.likeliest()
    assert widest.elements == 2 * COLUMNS * vocabulary


def test_a_loss_without_a_gradient_keeps_none(lms: dict[str, FrozenLM]) -> None:
    lm, batch = lms["llama"], batch_of((60, 50))
    with torch.no_grad():
        losses = say(lm, batch, torch.randn(1, SLOTS, lm.width)).losses
    assert not losses.requires_grad and losses.grad_fn is None and losses.sum() > 0


def test_a_gradient_that_is_not_finite_is_not_hidden() -> None:
    states = torch.zeros(1, 4, 5, requires_grad=True)
    said = Said(states, torch.tensor([[IGNORE, 1, 2, 3]]), lambda part: part * math.inf)
    said.losses.sum().backward()  # type: ignore[no-untyped-call]
    assert states.grad is not None and not states.grad.isfinite().all()


def test_the_plan_of_repeating_a_long_source_holds_the_logits_of_a_few_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, receiver = write_llama(tmp_path / "a"), write_llama(tmp_path / "b", vocab_size=32_000)
    config = config_of(sender, receiver, tmp_path, **LEAN | {"reconstruction_weight": 1.0, "max_source_tokens": 256})
    lengths = {"source_tokens": 256, "prompt_tokens": 6, "answer_tokens": 5}
    parts = plan(config, **lengths)
    monkeypatch.setattr(saying, "COLUMNS", 10_000)
    whole = plan(config, **lengths)
    logits = 4 * 256 * 32_000 * 4  # rows × columns × vocabulary × float32
    assert whole.peak_bytes() - parts.peak_bytes() > 2 * logits
    assert sum(map(sum, (parts.fullest(4).get(part, (0, 0)) for part in ("logits", WORKING)))) < logits / 4
