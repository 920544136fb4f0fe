"""Many requests at once, each answered as if it were alone, in every family."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from latentwire.bridge import engine
from latentwire.bridge.checkpoint import load_bridge
from latentwire.bridge.engine import answer_logits, encode, generate, soften, token_losses
from latentwire.bridge.generation.output import Generation, OutputText, OutputTokens
from latentwire.bridge.models import FrozenLM, load_model
from latentwire.bridge.prompt import IGNORE, Row, collate, compose, embed, layout_for
from latentwire.bridge.reader import tokenize_source
from latentwire.bridge.sampling import SamplingParams, choose
from tests.conftest import byte_tokenizer

TEMPLATE = "Text: {latent}\nQuestion: {question}\nAnswer:"
PROMPTS = ["Text: {latent}\nWho?", "{latent} a much longer question, with a comma?", "{latent}Q", "no place: {latent}"]
SLOTS = [3, 1, 5, 2]


def rows_of(lm: FrozenLM, answers: Sequence[str | None] = (None,) * 4) -> list[Row]:
    layout = layout_for(lm, TEMPLATE)
    return [compose(lm, layout, p, latent=k, answer=a) for p, k, a in zip(PROMPTS, SLOTS, answers, strict=True)]


def soft_of(lm: FrozenLM) -> Tensor:
    drawn = torch.randn(4, 5, lm.width, generator=torch.Generator().manual_seed(0))
    return drawn / drawn.pow(2).mean(dim=-1, keepdim=True).sqrt() * lm.embedding_rms()


def said(lm: FrozenLM, params: Sequence[SamplingParams], order: Sequence[int] = range(4)) -> list[Generation]:
    """Answers of the chosen rows in one batch."""
    rows, soft = rows_of(lm), soft_of(lm)
    return generate(lm, [rows[i] for i in order], soft[list(order)], [params[i] for i in order])[0]


def text_of(lm: FrozenLM, ids: list[int]) -> str:
    return str(lm.tokenizer.decode(ids, skip_special_tokens=True))


def test_greedy_in_a_batch_is_greedy_alone_is_the_librarys_own(lm: FrozenLM) -> None:
    params = [SamplingParams(max_tokens=12)] * 4
    together = said(lm, params)
    rows, soft = rows_of(lm), soft_of(lm)
    for i in range(4):
        assert said(lm, params, [i]) == [together[i]]
        embeds = embed(lm, collate([rows[i]], side="right"), soft[i : i + 1])
        ids = cast(Any, lm.model).generate(
            inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            max_new_tokens=12, do_sample=False, eos_token_id=1, pad_token_id=2,
        )[0].tolist()  # fmt: skip
        assert together[i].text == text_of(lm, ids[: ids.index(1)] if 1 in ids else ids)
    assert len({g.text for g in together}) == 4  # the rows do say different things


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_how_unsure_the_receiver_was_is_the_entropy_of_its_own_logits_whatever_the_temperature(
    lms: dict[str, FrozenLM], temperature: float
) -> None:
    lm = lms["llama"]
    rows, soft = rows_of(lm), soft_of(lm)
    outputs = [OutputTokens(lm, SamplingParams(5, temperature, seed=i)) for i in range(4)]
    engine.run(lm, rows, soft, outputs)
    for i, (row, output) in enumerate(zip(rows, outputs, strict=True)):
        embeds = embed(lm, collate([row.after(output.ids)], side="right"), soft[i : i + 1])
        with torch.inference_mode():
            logits = cast(Any, lm.model)(inputs_embeds=embeds).logits[0, len(row) - 1 :][: output.token_count]
        wanted = torch.distributions.Categorical(logits=logits).entropy().mean()
        assert output.entropy_nats == pytest.approx(float(wanted), abs=1e-5)
        assert OutputText(output).finish().entropy_nats == output.entropy_nats


def test_an_answer_is_conditioned_on_the_soft_tokens(lm: FrozenLM) -> None:
    rows, params = rows_of(lm), [SamplingParams(max_tokens=12)] * 4
    assert generate(lm, rows, soft_of(lm), params)[0] != generate(lm, rows, soft_of(lm).flip(1), params)[0]


@pytest.mark.parametrize("order", [[3, 2, 1, 0], [2, 0], [1, 3, 0, 2]])
def test_a_seeded_sample_is_the_same_alone_and_in_any_company(lm: FrozenLM, order: list[int]) -> None:
    params = [SamplingParams(10, 0.5 + i / 2, 1 - i / 10, 40 * i, 7 + i) for i in range(4)]
    alone = {i: said(lm, params, [i])[0] for i in order}
    assert said(lm, params, order) == [alone[i] for i in order]


def test_another_seed_says_something_else(lms: dict[str, FrozenLM]) -> None:
    texts = {said(lms["llama"], [SamplingParams(10, 5.0, seed=s)] * 4, [0])[0].text for s in range(6)}
    assert len(texts) > 1


def test_top_k_of_one_is_greedy(lms: dict[str, FrozenLM]) -> None:
    lm = lms["qwen"]
    hot = [SamplingParams(8, 5.0, top_k=1, seed=s) for s in range(4)]
    assert said(lm, hot) == said(lm, [SamplingParams(8)] * 4)


def test_every_row_has_its_own_limit(lm: FrozenLM) -> None:
    limits = [1, 9, 4, 2]
    long = said(lm, [SamplingParams(9)] * 4)
    short = said(lm, [SamplingParams(n) for n in limits])
    for limit, row, whole in zip(limits, short, long, strict=True):
        assert row.token_count <= limit
        if row.finish_reason == "length":
            assert row.token_count == limit and whole.text.startswith(row.text.rstrip("\ufffd"))
        else:
            assert row == whole


def stop_within(text: str) -> str:
    """A readable piece of a text that first stands after its beginning."""
    return next(c for at, c in enumerate(text) if at >= 2 and c not in text[:at] and c != "\ufffd")


def test_a_stop_string_ends_its_own_row_before_the_string(lms: dict[str, FrozenLM]) -> None:
    lm = lms["llama"]
    free = said(lm, [SamplingParams(16)] * 4)
    mark = stop_within(free[0].text)
    stopping = [SamplingParams(16, stop=("never this", mark)), *[SamplingParams(16)] * 3]
    together = said(lm, stopping)
    assert (together[0].text, together[0].finish_reason) == (free[0].text[: free[0].text.index(mark)], "stop")
    assert mark not in together[0].text and together[1:] == free[1:]


def test_what_was_counted_does_not_depend_on_the_company(lms: dict[str, FrozenLM]) -> None:
    lm = lms["llama"]
    mark = stop_within(said(lm, [SamplingParams(16)] * 4)[0].text)
    params = [SamplingParams(16, stop=(mark,)), *[SamplingParams(16)] * 3]
    alone, together = said(lm, params, [0])[0], said(lm, params)[0]
    assert alone.token_count < 16 and together == alone


def forced(lm: FrozenLM, token: int) -> FrozenLM:
    """The model, always saying one token."""

    class Forced(torch.nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            out = torch.zeros(*hidden.shape[:-1], len(lm.tokenizer))
            out[..., token] = 1
            return out

    import copy

    model = copy.deepcopy(lm.model)
    model.lm_head = Forced()
    return replace(lm, model=model)


@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
def test_a_row_ends_at_eos(lms: dict[str, FrozenLM], pad: str) -> None:
    lm = replace(forced(lms["llama"], 1), tokenizer=byte_tokenizer(pad=pad))
    assert said(lm, [SamplingParams(5)] * 4, [0, 1]) == [Generation("", "stop", 1)] * 2


def test_a_row_without_end_is_cut_at_its_limit(lms: dict[str, FrozenLM]) -> None:
    lm = forced(lms["llama"], byte_tokenizer().convert_tokens_to_ids("x"))
    assert said(lm, [SamplingParams(n) for n in (1, 2, 3, 4)]) == [
        Generation("x" * n, "length", n) for n in (1, 2, 3, 4)
    ]


def test_the_first_token_is_timed_within_the_whole(lms: dict[str, FrozenLM]) -> None:
    lm = lms["llama"]
    _, seconds = generate(lm, rows_of(lm), soft_of(lm), [SamplingParams(2)] * 4)
    assert seconds > 0


def test_positions_count_real_tokens_alone(lm: FrozenLM) -> None:
    rows, soft, seen = rows_of(lm), soft_of(lm), []

    def note(_module: torch.nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"].clone())

    handle = lm.model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        generate(lm, rows, soft, [SamplingParams(3)] * 4)
    finally:
        handle.remove()
    longest = max(len(row) for row in rows)
    for i, row in enumerate(rows):
        n = len(row)
        assert seen[0][i].tolist() == [0] * (longest - n) + list(range(n))
        assert [int(step[i, -1]) for step in seen[1:]] == list(range(n, n + len(seen) - 1))


ANSWERS = [" yes", " no, never", "", " a rather long answer"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_losses_are_the_librarys_own_and_do_not_depend_on_padding(lm: FrozenLM, side: Literal["left", "right"]) -> None:
    rows, soft = rows_of(lm, ANSWERS), soft_of(lm)
    logits, labels = answer_logits(lm, collate(rows, side=side), soft)
    losses = token_losses(logits, labels)
    counts = (labels[:, 1:] != IGNORE).sum(dim=1)
    for i, row in enumerate(rows):
        alone = collate([row], side="right")
        with torch.no_grad():
            wanted = lm.model(inputs_embeds=embed(lm, alone, soft[i : i + 1]), labels=alone.labels).loss
        torch.testing.assert_close(losses[i].sum() / counts[i], wanted, rtol=1e-3, atol=1e-4)
    assert counts.tolist() == [len(a) + 1 for a in ANSWERS]


def test_logits_reach_back_to_one_before_the_first_label_and_no_further(lms: dict[str, FrozenLM]) -> None:
    lm = lms["llama"]
    rows = rows_of(lm, ANSWERS)
    logits, labels = answer_logits(lm, collate(rows, side="left"), soft_of(lm))
    assert logits.shape[1] == labels.shape[1] == max(len(a) for a in ANSWERS) + 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_of_a_row_do_not_depend_on_its_company(lm: FrozenLM, side: Literal["left", "right"]) -> None:
    rows = rows_of(lm, ANSWERS)

    def gradient(chosen: list[int]) -> Tensor:
        soft = soft_of(lm)[chosen].requires_grad_()
        logits, labels = answer_logits(lm, collate([rows[i] for i in chosen], side=side), soft)
        token_losses(logits, labels)[0].sum().backward()  # type: ignore[no-untyped-call]
        assert soft.grad is not None
        return soft.grad

    together, alone = gradient([1, 0, 2, 3]), gradient([1])
    torch.testing.assert_close(together[0], alone[0], rtol=1e-2, atol=1e-4)
    assert not together[1:].any() and together[0, 0].any()


def test_a_row_without_labels_has_no_loss_and_a_row_of_padding_is_no_nan(lm: FrozenLM) -> None:
    rows, soft = rows_of(lm, ANSWERS), soft_of(lm).requires_grad_()
    empty = Row([], [], [])
    batch = collate([rows[0], empty, replace(rows[1], labels=[IGNORE] * len(rows[1]))], side="left")
    logits, labels = answer_logits(lm, batch, soft[:3])
    losses = token_losses(logits, labels)
    assert logits.isfinite().all() and losses[1:].sum() == 0 and losses[0].sum() > 0
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert soft.grad is not None and soft.grad.isfinite().all()


def test_a_batch_without_any_label_has_loss_zero(lms: dict[str, FrozenLM]) -> None:
    lm = lms["llama"]
    logits, labels = answer_logits(lm, collate(rows_of(lm), side="left"), soft_of(lm))
    assert token_losses(logits, labels).sum() == 0


def test_rows_without_soft_tokens_read_text_alone(lms: dict[str, FrozenLM]) -> None:
    lm = lms["gpt2"]
    rows = [compose(lm, layout_for(lm, TEMPLATE), "{latent} x", latent="Mara sings.")]
    ids = cast(Any, lm.model).generate(
        torch.tensor([rows[0].ids]), attention_mask=torch.ones(1, len(rows[0]), dtype=torch.long),
        max_new_tokens=6, do_sample=False, eos_token_id=1, pad_token_id=2,
    )[0, len(rows[0]) :].tolist()  # fmt: skip
    assert generate(lm, rows, None, [SamplingParams(6)])[0][0].text == text_of(lm, ids)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_rows_that_fit_alone_fit_together(lms: dict[str, FrozenLM], order: list[int]) -> None:
    """GPT-2 has 256 positions, no more: a short answer to a long row must not be carried past them by its neighbour."""
    lm = lms["gpt2"]
    layout = layout_for(lm, TEMPLATE)
    rows = [compose(lm, layout, text, latent=None) for text in ("a" * 240, "b" * 20)]
    params = [SamplingParams(10), SamplingParams(200)]
    alone = [generate(lm, [row], None, [p])[0][0] for row, p in zip(rows, params, strict=True)]
    together = generate(lm, [rows[i] for i in order], None, [params[i] for i in order])[0]
    assert together == [alone[i] for i in order]


def test_the_earliest_stop_string_counts_not_the_first_listed(lms: dict[str, FrozenLM]) -> None:
    lm = lms["llama"]
    text = said(lm, [SamplingParams(16)] * 4)[0].text
    early = stop_within(text)
    late = text[text.index(early) + 1]
    for stop in ((early, late), (late, early)):
        ended = said(lm, [SamplingParams(16, stop=stop), *[SamplingParams(16)] * 3])[0]
        assert ended.text == text[: min(text.index(early), text.index(late))]


def test_a_batch_ends_with_its_last_row(lms: dict[str, FrozenLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row that stopped early still takes a place in each step: none may be taken after the last has stopped."""
    lm = lms["llama"]
    mark = stop_within(said(lm, [SamplingParams(16)] * 4, [0])[0].text)
    steps: list[int] = []

    def counting(scores: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> Tensor:
        steps.append(positions[0])
        return choose(scores, params, positions)

    monkeypatch.setattr(engine, "choose", counting)
    ended = said(lm, [SamplingParams(16, stop=(mark,))] * 4, [0])[0]
    assert ended.finish_reason == "stop" and len(steps) == ended.token_count < 16


def test_half_precision_receivers_take_soft_tokens(model_folders: dict[str, Path]) -> None:
    lm = load_model(str(model_folders["llama"]), dtype=torch.bfloat16)
    rows, soft = rows_of(lm), soft_of(lm)
    assert soft.dtype == torch.float32
    batch = collate(rows, side="left")
    assert embed(lm, batch, soft).dtype == torch.bfloat16
    assert len(generate(lm, rows, soft, [SamplingParams(2)] * 4)[0]) == 4


def test_serving_keeps_no_graph(lms: dict[str, FrozenLM], checkpoint: Path) -> None:
    """Soft tokens come from trained weights: outside inference mode every step would keep a graph to them."""
    _, bridge = load_bridge(checkpoint)
    for parameter in bridge.parameters():
        parameter.requires_grad_(True)
    name = bridge.default_receiver
    latent = np.ones((2, bridge.config.encoder.latent_dim), dtype=np.float32)
    soft = soften(bridge, name, lms["llama"], [latent])
    assert soft is not None and soft.is_inference()
    modes: list[bool] = []
    handle = lms["llama"].model.register_forward_pre_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    reading = lms["neox"].model.base_model.register_forward_pre_hook(
        lambda *_: modes.append(torch.is_inference_mode_enabled())
    )
    try:
        generate(lms["llama"], rows_of(lms["llama"]), None, [SamplingParams(1)] * 4)
        encode(
            bridge, lms["neox"], [tokenize_source(lms["neox"], "Mara sings.", lms["neox"].source_layout, max_tokens=64)]
        )
    finally:
        handle.remove()
        reading.remove()
    assert modes and all(modes)
