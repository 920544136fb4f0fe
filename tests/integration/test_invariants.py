"""What must always hold, over random texts, shapes, company and padding: one composer, padding that never matters,
soft tokens at the receiver's scale, frozen models, a sender that reads no further than asked, saves that are whole.

Each property is compared with a reference written out by hand: one row, no padding, the library's plain forward.
"""

import os
import re
import shutil
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.cache_utils import Cache

from latentwire.bridge.checkpoint import BridgeModel, load_bridge, make_bridge, read_manifest, save_bridge
from latentwire.bridge.config import EncoderConfig
from latentwire.bridge.encoder import KINDS, make_encoder
from latentwire.bridge.engine import answer_logits, encode, generate, token_losses
from latentwire.bridge.errors import UnknownBridge
from latentwire.bridge.generation.output import Generation
from latentwire.bridge.models import FrozenLM, hidden_states, load_model
from latentwire.bridge.prompt import IGNORE, TEXT, Batch, Row, collate, compose, layout_for, place
from latentwire.bridge.reader import SourceTokens, tokenize_source
from latentwire.bridge.sampling import SamplingParams
from latentwire.training.objectives import answer_loss, distillation_loss
from tests.conftest import FAMILIES, bridge_config, byte_tokenizer

Side = Literal["left", "right"]
EMPTY = Row([], [], [])
TOKENIZERS = {
    f"{'bos' if bos else 'no bos'}, pad {pad}": byte_tokenizer(bos=bos, pad=pad)
    for bos in (True, False)
    for pad in ("<pad>", "</s>")
}
VOCABULARY = 259

few = partial(settings, deadline=None, derandomize=True, database=None)
same = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5, check_dtype=False)

texts = st.one_of(
    st.text(st.characters(max_codepoint=127), max_size=10),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    st.sampled_from(["</s>", "<pad><s>", "{", " {x} ", "e\u0301🙂", " \n"]),
)
sources = st.lists(st.one_of(st.none(), texts.filter(str.strip)), min_size=1, max_size=4)
sides = st.sampled_from(["left", "right"])
extras = st.integers(0, 20)
fillers = st.integers(0, VOCABULARY - 1)
seeds = st.integers(0, 1 << 16)
layers_read = st.lists(st.integers(0, 3), min_size=1, max_size=3)
shapes = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(list(KINDS)), "latent_dim": st.integers(1, 20), "depth": st.integers(0, 2),
        "hidden_dim": st.sampled_from([8, 31, 32, 64]), "ratio": st.integers(1, 9), "num_latents": st.integers(1, 7),
    }
)  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """A row to be composed; ``before`` None leaves the place of the latent to the composer."""

    before: str | None
    after: str
    slots: int
    answer: str | None

    @property
    def template(self) -> str:
        return self.after if self.before is None else f"{self.before}{{latent}}{self.after}"

    def row(self, lm: FrozenLM, *, latent: int | str | None = None) -> Row:
        """The composed row, with ``slots`` soft tokens unless told."""
        latent = self.slots if latent is None else latent
        return compose(lm, layout_for(lm, self.template), self.template, latent=latent, answer=self.answer)


def rows_wanted(answers: st.SearchStrategy[str | None]) -> st.SearchStrategy[Wanted]:
    wanted = st.builds(Wanted, st.one_of(st.none(), texts), texts, st.integers(0, 6), answers)
    return wanted.filter(lambda w: bool(w.slots or w.after))


companies = st.lists(st.one_of(rows_wanted(st.one_of(st.none(), texts)), st.none()), min_size=1, max_size=4)


@pytest.fixture(scope="module", params=list(FAMILIES))
def lm(request: pytest.FixtureRequest, model_folders: dict[str, Path]) -> FrozenLM:
    """Each family in double precision, where what padding changes stands out from rounding."""
    return load_model(str(model_folders[request.param]), device=torch.device("cpu"), dtype=torch.float64)


def soft_of(lm: FrozenLM, rows: Sequence[Row], seed: int) -> Tensor:
    """Soft tokens for each row at the receiver's scale; rows with fewer slots leave some unread."""
    K = max(1, 1 + max(max(row.slots, default=TEXT) for row in rows))
    drawn = torch.randn(len(rows), K, lm.width, generator=torch.Generator().manual_seed(seed), dtype=lm.model.dtype)
    return F.rms_norm(drawn, (lm.width,)) * lm.embedding_rms()


def widened(batch: Batch, side: Side, extra: int, filler: int) -> Batch:
    """More padding than the longest row needs, with any token under it."""
    pad = (extra, 0) if side == "left" else (0, extra)
    ids, slots, mask, positions, labels = (
        F.pad(tensor, pad, value=value)
        for tensor, value in (
            (batch.ids, 0), (batch.slots, TEXT), (batch.mask, False), (batch.positions, 0), (batch.labels, IGNORE),
        )
    )  # fmt: skip
    return Batch(ids.masked_fill(~mask, filler), slots, mask, positions, labels)


def embeds_by_hand(lm: FrozenLM, row: Row, soft: Tensor) -> Tensor:
    """(T, D): each position on its own; a row without slots still hangs on ``soft``, with gradient 0."""
    at = zip(row.ids, row.slots, strict=True)
    return torch.stack([soft[slot] if slot != TEXT else lm.embed(torch.tensor(i)) for i, slot in at]) + 0 * soft.sum()


def answer_by_hand(lm: FrozenLM, row: Row, soft: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (A, V) where the row's supervised tokens are predicted, and those tokens (A)."""
    at = [t for t, label in enumerate(row.labels) if label != IGNORE]
    if not at:
        return torch.zeros(0, VOCABULARY) + 0 * soft.sum(), torch.zeros(0, dtype=torch.long)
    logits = lm.model(inputs_embeds=embeds_by_hand(lm, row, soft)[None], use_cache=False).logits[0]
    return logits[[t - 1 for t in at]].log_softmax(dim=-1), torch.tensor([row.labels[t] for t in at])


def losses_by_hand(lm: FrozenLM, row: Row, soft: Tensor) -> Tensor:
    """Nats of each supervised token."""
    log_p, said = answer_by_hand(lm, row, soft)
    return -log_p[range(len(said)), said]


def greedy_by_hand(lm: FrozenLM, row: Row, soft: Tensor, limit: int) -> list[int]:
    """The likeliest token, ``limit`` times, each read with everything before it; no cache, no end."""
    embeds, said = embeds_by_hand(lm, row, soft), list[int]()
    for _ in range(limit):
        said.append(int(lm.model(inputs_embeds=embeds[None], use_cache=False).logits[0, -1].float().argmax()))
        embeds = torch.cat([embeds, lm.embed(torch.tensor(said[-1:]))])
    return said


def padded_ids(sources: Sequence[SourceTokens | None], side: Side, extra: int, filler: int) -> tuple[Tensor, Tensor]:
    """Sender ids and mask, padded on either side; None is a row of padding only."""
    rows = [EMPTY if s is None else Row(s.ids, [TEXT] * len(s.ids), [IGNORE] * len(s.ids)) for s in sources]
    batch = widened(collate(rows, side=side), side, extra, filler)
    return batch.ids, batch.mask


def states_by_hand(lm: FrozenLM, source: SourceTokens, layers: Sequence[int]) -> Tensor:
    """(S, ND) from a full pass that reports every state, run block by block to its end."""
    ids = torch.tensor([source.ids])
    inner = lm.model.base_model
    out = inner(input_ids=ids, output_hidden_states=True)
    # The library shows its last state behind the final norm, and GPT-2's first one with positions added.
    last: list[Tensor] = []
    norm = next(module for module in inner.children() if "Norm" in type(module).__name__)
    handle = norm.register_forward_pre_hook(lambda _module, args: last.append(args[0]))
    inner(input_ids=ids)
    handle.remove()
    states = [lm.embed(ids), *out.hidden_states[1:-1], last[0]]
    return torch.cat([states[layer][0] for layer in layers], dim=-1)


def bridge_between(
    sender: FrozenLM, receiver: FrozenLM, shape: dict[str, Any], *, layers: Sequence[int] = (2,), seed: int = 0
) -> BridgeModel:
    """A random bridge of any shape that reads any layers."""
    torch.manual_seed(seed)
    config = bridge_config(sender, receiver, **shape, sender_width=sum(sender.state_width(layer) for layer in layers))
    return make_bridge(replace(config, layers=tuple(layers)))


# 4.1: one composer


@few(max_examples=150)
@given(wanted=rows_wanted(texts), special=st.sampled_from(list(TOKENIZERS)))
def test_a_row_is_bos_text_soft_tokens_text_and_a_supervised_answer(
    lms: dict[str, FrozenLM], wanted: Wanted, special: str
) -> None:
    lm = replace(lms["llama"], tokenizer=(tokenizer := TOKENIZERS[special]))
    row, read = wanted.row(lm), tokenizer.decode
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    text = [i for i, slot in zip(row.ids, row.slots, strict=True) if slot == TEXT]
    assert text.count(0) == (bos is not None) and (bos is None or (row.slots[0], row.ids[0]) == (TEXT, bos))
    body = len(text) - text.count(0)
    first = row.slots.index(0) if wanted.slots else len(row.ids) - body
    if wanted.slots:
        assert row.slots[first : first + wanted.slots] == list(range(wanted.slots)) and row.slots.count(TEXT) == len(
            text
        )
        assert read(row.ids[text.count(0) : first]) == (wanted.before or "").rstrip(" ")
        assert read(row.ids[first + wanted.slots :]) == f"{wanted.after}{wanted.answer}</s>"
    said = [label for label in row.labels if label != IGNORE]
    assert read(said[:-1]) == wanted.answer and said[-1] == eos and said.count(eos) == 1
    assert bos not in said and (pad == eos or pad not in said)
    assert row.ids[len(row) - len(said) :] == said and row.labels[: len(row) - len(said)] == [IGNORE] * (
        len(row) - len(said)
    )


@few(max_examples=100)
@given(wanted=rows_wanted(st.none()), special=st.sampled_from(list(TOKENIZERS)))
def test_a_served_prompt_makes_the_row_that_was_trained(lms: dict[str, FrozenLM], wanted: Wanted, special: str) -> None:
    lm = replace(lms["llama"], tokenizer=TOKENIZERS[special])
    layout, prompt = layout_for(lm, wanted.template), wanted.after.lstrip()
    if wanted.before is None or not re.search(r"\{\w+\}", wanted.before):  # a field no request could fill is left out
        assert compose(lm, layout, place(layout, prompt), latent=max(1, wanted.slots)) == replace(
            wanted, slots=max(1, wanted.slots)
        ).row(lm)


@few(max_examples=100)
@given(shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 12)), seed=seeds, share=st.floats(0, 1))
def test_labels_are_shifted_exactly_once(shape: tuple[int, int, int], seed: int, share: float) -> None:
    torch.manual_seed(seed)
    B, A, V = shape
    logits, labels = 5 * torch.randn(B, A, V), torch.randint(V, (B, A))
    labels[torch.rand(B, A) < share] = IGNORE
    log_p = logits.log_softmax(dim=-1)
    by_hand = torch.zeros(B, A - 1)
    for b in range(B):
        for t in range(1, A):
            if labels[b, t] != IGNORE:
                by_hand[b, t - 1] = -log_p[b, t - 1, labels[b, t]]
    same(token_losses(logits, labels), by_hand)


# 4.2: padding never matters


@few(max_examples=14)
@given(
    company=companies, special=st.sampled_from(list(TOKENIZERS)), side=sides, extra=st.integers(1, 20), filler=fillers,
    weight=st.floats(0.1, 12), seed=seeds,
)  # fmt: skip
def test_a_row_has_its_own_loss_and_gradients_in_any_company_behind_any_padding(
    lm: FrozenLM, company: list[Wanted | None], special: str, side: Side, extra: int,
    filler: int, weight: float, seed: int,
) -> None:  # fmt: skip
    lm = replace(lm, tokenizer=TOKENIZERS[special])
    rows = [EMPTY if wanted is None else wanted.row(lm) for wanted in company]
    soft, alone = (soft_of(lm, rows, seed).requires_grad_() for _ in range(2))
    batch = widened(collate(rows, side=side), side, extra, filler)
    logits, labels = answer_logits(lm, batch, soft)
    losses = answer_loss(logits, labels, first_token_weight=weight)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert logits.isfinite().all() and soft.grad is not None and soft.grad.isfinite().all()
    for i, (row, wanted) in enumerate(zip(rows, company, strict=True)):
        token = losses_by_hand(lm, row, alone[i])
        share = torch.tensor([weight, *[1.0] * len(token)])[: len(token)]
        wanted_loss = (share * token).sum() / max(float(share.sum()), 1e-8)
        wanted_loss.backward()  # type: ignore[no-untyped-call]
        same(token_losses(logits, labels)[i].sum(), token.sum())
        same(losses[i], wanted_loss)
        if wanted is None or wanted.answer is None:
            assert losses[i] == 0 and not soft.grad[i].any()
        else:  # EOS is among them, pad or not
            assert len(token) == len(wanted.answer.encode()) + 1
    assert alone.grad is not None
    same(soft.grad, alone.grad)


@few(max_examples=7)
@given(
    company=st.lists(st.tuples(rows_wanted(texts), texts), min_size=1, max_size=4), empty=st.booleans(),
    special=st.sampled_from(list(TOKENIZERS)), extra=st.tuples(extras, extras), filler=fillers, seed=seeds,
)  # fmt: skip
def test_a_row_has_its_own_divergence_from_its_teacher_in_any_company(
    lm: FrozenLM, company: list[tuple[Wanted, str]], empty: bool, special: str,
    extra: tuple[int, int], filler: int, seed: int,
) -> None:  # fmt: skip
    lm = replace(lm, tokenizer=TOKENIZERS[special])
    students = [wanted.row(lm) for wanted, _ in company] + [EMPTY] * empty
    teachers = [wanted.row(lm, latent=f"{source}.") for wanted, source in company] + [EMPTY] * empty
    soft, alone = (soft_of(lm, students, seed).requires_grad_() for _ in range(2))
    (logits, labels), (wanted_logits, wanted_labels) = (
        answer_logits(lm, widened(collate(rows, side="left"), "left", columns, filler), tokens)
        for rows, columns, tokens in ((students, extra[0], soft), (teachers, extra[1], None))
    )
    assert torch.equal(labels, wanted_labels)
    apart = distillation_loss(logits, wanted_logits, labels)
    apart.sum().backward()  # type: ignore[no-untyped-call]
    for i, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        q, said = answer_by_hand(lm, student, alone[i])
        p, again = answer_by_hand(lm, teacher, alone[i].detach())
        assert torch.equal(said, again)
        by_hand = (p.exp() * (p - q)).sum() / max(len(said), 1)
        by_hand.backward()  # type: ignore[no-untyped-call]
        same(apart[i], by_hand)
    assert soft.grad is not None and alone.grad is not None
    same(soft.grad, alone.grad)


@few(max_examples=8)
@given(
    company=st.lists(st.tuples(rows_wanted(st.none()), st.integers(1, 6)), min_size=1, max_size=4),
    bos=st.booleans(), end=st.integers(0, 5), pad_is_eos=st.booleans(), seed=seeds,
)  # fmt: skip
def test_a_row_says_in_any_company_what_it_says_alone_without_padding(
    lm: FrozenLM, company: list[tuple[Wanted, int]], bos: bool, end: int, pad_is_eos: bool, seed: int
) -> None:
    tokenizer = byte_tokenizer(bos=bos)
    lm = replace(lm, tokenizer=tokenizer)
    rows, limits = [wanted.row(lm) for wanted, _ in company], [limit for _, limit in company]
    soft = soft_of(lm, rows, seed)
    free = [greedy_by_hand(lm, row, soft[i], limits[i]) for i, row in enumerate(rows)]
    if end < limits[0]:  # end on something that a row does say, so that it stops before its neighbours
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(free[0][end])
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    eos = tokenizer.eos_token_id
    lm = replace(lm, end_ids=(eos,))
    expected = []
    for ids in free:
        said = ids[: ids.index(eos)] if eos in ids else ids
        text = str(tokenizer.decode(said, skip_special_tokens=True))
        expected.append(Generation(text, "stop" if eos in ids else "length", len(said) + (eos in ids)))
    assert generate(lm, rows, soft, [SamplingParams(limit) for limit in limits])[0] == expected


@few(max_examples=12)
@given(
    texts=sources, special=st.sampled_from(list(TOKENIZERS)), side=sides, extra=st.integers(1, 20), filler=fillers,
    layers=layers_read,
)  # fmt: skip
def test_a_source_has_the_states_of_a_full_pass_alone_in_any_company_behind_any_padding(
    lm: FrozenLM, texts: list[str | None], special: str, side: Side, extra: int, filler: int,
    layers: list[int],
) -> None:  # fmt: skip
    lm = replace(lm, tokenizer=TOKENIZERS[special])
    read = [None if text is None else tokenize_source(lm, text, lm.source_layout, max_tokens=99) for text in texts]
    ids, mask = padded_ids(read, side, extra, filler)
    states = hidden_states(lm, ids, mask, layers)
    assert states.isfinite().all()
    for i, source in enumerate(read):
        if source is not None:
            same(states[i][mask[i]], states_by_hand(lm, source, layers))


@few(max_examples=60)
@given(
    shape=shapes, lengths=st.lists(st.integers(0, 20), min_size=1, max_size=4), side=sides, extra=st.integers(1, 20),
    mixed=st.integers(1, 3), seed=seeds,
)  # fmt: skip
def test_an_encoder_gives_a_row_the_latent_and_gradients_it_has_alone(
    shape: dict[str, Any], lengths: list[int], side: Side, extra: int, mixed: int, seed: int
) -> None:
    torch.manual_seed(seed)
    encoder = make_encoder(EncoderConfig(**shape, sender_width=6, mixed_layers=mixed)).double()
    rows = [torch.randn(1, n, 6 * mixed, dtype=torch.float64) for n in lengths]
    _, mask = padded_ids([SourceTokens([5] * n, n) for n in lengths], side, extra, filler=0)
    states = torch.full((*mask.shape, 6 * mixed), float("nan"), dtype=torch.float64)
    states[mask] = torch.cat(rows, dim=1)[0]
    latents, slots = encoder(states, mask)
    alone = [encoder(row, torch.ones(row.shape[:2]).bool())[0][0] if row.numel() else latents[:0, 0] for row in rows]
    for latent, real, wanted in zip(latents, slots, alone, strict=True):
        same(latent[real], wanted)
        assert not latent[~real].any()
    apart = [
        torch.autograd.grad(
            out.pow(3).sum(), [*encoder.parameters()], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for out in (latents, torch.cat(alone))
    ]
    assert all(gradient.isfinite().all() for gradient in apart[0])
    same(apart[0], apart[1])


@few(max_examples=8)
@given(texts=sources, shape=shapes, side=sides, extra=st.integers(1, 20), layers=layers_read, seed=seeds)
def test_a_source_has_the_latent_of_a_full_pass_alone_in_any_company_behind_any_padding(
    lm: FrozenLM, texts: list[str | None], shape: dict[str, Any], side: Side, extra: int, layers: list[int], seed: int
) -> None:
    bridge = bridge_between(lm, lm, shape, layers=layers, seed=seed)
    bridge.encoder.double()
    read = [None if text is None else tokenize_source(lm, text, lm.source_layout, max_tokens=99) for text in texts]
    real = [source for source in read if source is not None]
    ids, mask = padded_ids(read, side, extra, filler=0)
    states = hidden_states(lm, ids, mask, layers).masked_fill(~mask[..., None], float("nan"))
    latents, slots = bridge.encoder(states, mask)
    served = iter(encode(bridge, lm, real) if real else [])
    assert latents.isfinite().all()
    for i, source in enumerate(read):
        if source is None:
            assert not latents[i].any() and not slots[i].any()
            continue
        wanted = bridge.encoder(states_by_hand(lm, source, layers)[None], torch.ones(1, len(source.ids)).bool())[0][0]
        same(latents[i][slots[i]], wanted)
        same(torch.from_numpy(next(served).latent), wanted)


# 4.3: the receiver's scale


@few(max_examples=40)
@given(
    receiver=st.sampled_from(list(FAMILIES)), dim=st.integers(1, 40), magnitude=st.floats(-30, 12), seed=seeds,
    learned=st.floats(-1, 1), direction=st.sampled_from(["random", "one", "equal"]),
)  # fmt: skip
def test_every_soft_token_has_the_rms_of_the_receivers_embedding_rows(
    lms: dict[str, FrozenLM], receiver: str, dim: int, magnitude: float, seed: int, learned: float, direction: str
) -> None:
    lm = lms[receiver]
    bridge = bridge_between(lms["neox"], lm, {"latent_dim": dim}, seed=seed)
    head = bridge.head(lm.name)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(10**learned)
    latent = {
        "random": torch.randn(2, 5, dim),
        "one": torch.eye(10, dim).view(2, 5, dim),
        "equal": torch.ones(2, 5, dim),
    }
    soft = head(latent[direction] * 10**magnitude)
    rows = cast(nn.Embedding, lm.model.get_input_embeddings()).weight.detach()
    measured = rows.pow(2).mean(dim=1).sqrt().mean()
    same(soft.pow(2).mean(dim=-1).sqrt(), measured.expand(2, 5), rtol=1e-3, atol=0)


# 4.4: frozen means frozen


@few(max_examples=12)
@given(
    pair=st.tuples(*[st.sampled_from(list(FAMILIES))] * 2), shape=shapes, texts=sources.filter(any),
    wanted=rows_wanted(texts), side=sides, layers=layers_read, steps=st.integers(1, 3), seed=seeds,
)  # fmt: skip
def test_training_a_bridge_leaves_both_models_bit_identical_and_without_gradients(
    lms: dict[str, FrozenLM], pair: tuple[str, str], shape: dict[str, Any], texts: list[str | None], wanted: Wanted,
    side: Side, layers: list[int], steps: int, seed: int,
) -> None:  # fmt: skip
    sender, receiver = (lms[family] for family in pair)
    before = [{name: tensor.clone() for name, tensor in lm.model.state_dict().items()} for lm in (sender, receiver)]
    bridge = bridge_between(sender, receiver, shape, layers=layers, seed=seed)
    initial = [parameter.detach().clone() for parameter in bridge.parameters()]
    optimizer = torch.optim.AdamW(bridge.parameters(), lr=0.01, weight_decay=0.1)
    ids, mask = padded_ids(
        [None if t is None else tokenize_source(sender, t, sender.source_layout, max_tokens=99) for t in texts],
        side,
        2,
        9,
    )
    for _ in range(steps):
        latents, slots = bridge.encoder(hidden_states(sender, ids, mask, layers), mask)
        rows = [replace(wanted, slots=K).row(receiver) if K else EMPTY for K in slots.sum(dim=1).tolist()]
        soft = bridge.head(receiver.name)(latents)
        answer_loss(*answer_logits(receiver, collate(rows, side=side), soft)).sum().backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is None or p.grad.isfinite().all() for p in bridge.parameters())  # a row of padding too
        optimizer.step()
        optimizer.zero_grad()
    assert not all(map(torch.equal, initial, bridge.parameters()))
    for lm, weights in zip((sender, receiver), before, strict=True):
        assert all(torch.equal(tensor, weights[name]) for name, tensor in lm.model.state_dict().items())
        assert all(p.grad is None and not p.requires_grad for p in lm.model.parameters())


# 4.5: the sender reads no further than asked


@few(max_examples=8)
@given(texts=st.lists(texts.filter(str.strip), min_size=1, max_size=3), layers=layers_read)
def test_no_block_above_the_layer_read_runs_and_no_cache_is_made(
    lm: FrozenLM, texts: list[str], layers: list[int]
) -> None:
    bridge = bridge_between(lm, lm, {}, layers=layers)
    bridge.encoder.double()
    ran: list[int] = []
    caches: list[object] = []
    modes: list[bool] = []

    def note(block: int, _module: nn.Module, _args: object) -> None:
        ran.append(block)
        modes.append(torch.is_inference_mode_enabled())

    def made(self: Cache, *args: Any, init: Any = Cache.__init__, **rest: Any) -> None:
        caches.append(self)
        init(self, *args, **rest)

    stack = next(m for m in lm.model.modules() if isinstance(m, nn.ModuleList) and len(m) == lm.layers)
    handles = [block.register_forward_pre_hook(partial(note, i)) for i, block in enumerate(stack, start=1)]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Cache, "__init__", made)
            encode(bridge, lm, [tokenize_source(lm, text, lm.source_layout, max_tokens=99) for text in texts])
    finally:
        for handle in handles:
            handle.remove()
    assert ran == list(range(1, max(layers) + 1)) and not caches and all(modes)


# 4.9: a save is whole or has not happened


class Killed(BaseException):
    """The machine stopped: nothing after this ran."""


class Disk:
    """Writes, syncs, renames and deletions, until the machine stops at operation number ``fatal``.

    What was never synced is lost then, as on a real disk: a file's content without ``fsync`` of the file, a rename
    without one of its folder. Deletions are not, which is the worst order a file system may choose.
    """

    def __init__(self, fatal: int, torn: float) -> None:
        self.fatal, self.torn, self.done = fatal, torn, 0
        self.unsynced: set[int] = set()  # inodes
        self.renames: list[tuple[Path, bytes | None]] = []  # what stood at the target before
        self.replace, self.unlink = Path.replace, Path.unlink

    def step(self) -> None:
        self.done += 1
        if self.done > self.fatal:
            raise Killed

    def fsync(self, file: int) -> None:
        self.step()
        self.unsynced.discard(os.fstat(file).st_ino)
        if stat.S_ISDIR(os.fstat(file).st_mode):
            self.renames.clear()

    def rename(self, path: Path, target: Path) -> Path:
        self.step()
        self.renames.append((target, target.read_bytes() if target.exists() else None))
        return self.replace(path, target)

    def delete(self, path: Path, missing_ok: bool = False) -> None:
        self.step()
        self.unlink(path, missing_ok=missing_ok)

    def save(self, folder: Path, bridge: BridgeModel) -> bool:
        """Save, lose what was not synced, and say whether the save came to its end."""
        disk = self

        class File(FileIO):
            def write(self, data: Any) -> int:
                disk.unsynced.add(os.fstat(self.fileno()).st_ino)
                if disk.done == disk.fatal:
                    super().write(data[: int(disk.torn * len(data))])
                disk.step()
                return super().write(data)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("latentwire.bridge.files.os.fsync", self.fsync)
            patch.setattr(Path, "replace", lambda path, target: self.rename(path, target))
            patch.setattr(Path, "unlink", lambda path, missing_ok=False: self.delete(path, missing_ok))
            patch.setattr(Path, "open", lambda path, mode="r": File(path, mode))
            try:
                save_bridge(folder, bridge)
            except Killed:
                pass
        for path in folder.iterdir():
            if path.stat().st_ino in self.unsynced:
                os.truncate(path, int(self.torn * path.stat().st_size))
        for target, content in reversed(self.renames):
            target.unlink() if content is None else target.write_bytes(content)
        return self.done <= self.fatal


def bits(bridge: BridgeModel) -> list[tuple[str, bytes]]:
    """Every weight, by name, to the last bit (NaN and -0.0 included)."""
    tensors = {**bridge.encoder.state_dict(), **bridge.heads.state_dict()}
    return [(name, tensor.contiguous().view(torch.uint8).numpy().tobytes()) for name, tensor in tensors.items()]


def random_bridge(lms: dict[str, FrozenLM], shape: dict[str, Any], receivers: list[str], seed: int) -> BridgeModel:
    """A bridge with any number of heads, whose weights are any bit patterns whatever."""
    bridge = bridge_between(lms["neox"], lms[receivers[0]], shape, seed=seed)
    heads = {name: head for r in receivers for name, head in bridge_config(lms["neox"], lms[r]).heads.items()}
    bridge = make_bridge(replace(bridge.config, heads=heads))
    with torch.no_grad():
        for parameter in bridge.parameters():
            parameter.copy_(torch.randint(-(1 << 31), 1 << 31, parameter.shape).int().view(torch.float32))
    return bridge


receivers_of = st.lists(st.sampled_from(list(FAMILIES)), min_size=1, max_size=3, unique=True)


@few(max_examples=20)
@given(shape=shapes, receivers=receivers_of, seed=seeds)
def test_a_bridge_of_any_shape_comes_back_to_the_last_bit(
    lms: dict[str, FrozenLM], tmp_path_factory: pytest.TempPathFactory, shape: dict[str, Any], receivers: list[str],
    seed: int,
) -> None:  # fmt: skip
    folder, bridge = tmp_path_factory.mktemp("bridge"), random_bridge(lms, shape, receivers, seed)
    saved = save_bridge(folder, bridge)
    manifest, back = load_bridge(folder, device=torch.device("cpu"))
    assert manifest == saved and back.config == bridge.config and bits(back) == bits(bridge)


@few(max_examples=8)
@given(
    old=st.one_of(st.none(), st.tuples(shapes, receivers_of)), new=st.tuples(shapes, receivers_of),
    seed=seeds, torn=st.floats(0, 1),
)  # fmt: skip
def test_stopped_at_any_write_the_old_or_the_new_checkpoint_is_there_whole(
    lms: dict[str, FrozenLM], tmp_path_factory: pytest.TempPathFactory,
    old: tuple[dict[str, Any], list[str]] | None, new: tuple[dict[str, Any], list[str]], seed: int, torn: float,
) -> None:  # fmt: skip
    pristine = tmp_path_factory.mktemp("pristine")
    after, later = (random_bridge(lms, *new, seed=seed + n) for n in (1, 2))
    whole: list[object] = ["none" if old is None else bits(before := random_bridge(lms, *old, seed=seed)), bits(after)]
    if old is not None:
        save_bridge(pristine, before)
    found: list[int] = []
    finished = False
    while not finished:
        folder = Path(shutil.copytree(pristine, pristine.with_name(f"{pristine.name}-{len(found)}")))
        finished = Disk(len(found), torn).save(folder, after)
        try:
            left: object = bits(load_bridge(folder, device=torch.device("cpu"))[1])
        except UnknownBridge:
            left = "none"
        found.append(whole.index(left))
        assert Disk(1 << 30, torn).save(folder, later)  # the next save clears up
        manifest = read_manifest(folder)
        names = {"config.json", manifest.encoder.file, *(part.file for part in manifest.heads.values())}
        assert {path.name for path in folder.iterdir()} == names
    assert found == sorted(found) and found[0] == 0 and found[-1] == 1
