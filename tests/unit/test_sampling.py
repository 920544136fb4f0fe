"""A draw depends on the request's own seed and position, and is a draw from what was asked for."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest
from torch import Tensor

from latentwire.bridge.generation import output
from latentwire.bridge.generation.output import entropies_of
from latentwire.bridge.sampling import MASK, SamplingParams, _gumbel, _hash, choose

LOGITS = torch.tensor([0.2, 2.0, 1.0, -1.0, 1.9])


def drawn(logits: Tensor, params: SamplingParams, position: int = 0) -> int:
    return int(choose(logits[None], [params], [position]).argmax())


def with_params(seed: int, **changes: float) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "seed": seed, **changes})  # type: ignore[arg-type]


def shares(draws: int = 2000, **changes: float) -> Tensor:
    """How often each token is drawn over many seeds."""
    rows = [with_params(seed, **changes) for seed in range(draws)]
    picks = choose(LOGITS.expand(draws, -1), rows, [0] * draws).argmax(dim=1)
    return torch.bincount(picks, minlength=len(LOGITS)) / draws


def test_temperature_zero_takes_the_likeliest_token_and_changes_no_score() -> None:
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(choose(logits, [SamplingParams(seed=s) for s in range(3)], [0] * 3), logits)


def test_the_logits_given_are_left_alone() -> None:
    logits = LOGITS[None].clone()
    choose(logits, [with_params(0, top_k=1, top_p=0.5)], [0])
    assert torch.equal(logits[0], LOGITS)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_their_probability_says(temperature: float) -> None:
    wanted = (LOGITS / temperature).softmax(dim=-1)
    assert torch.allclose(shares(temperature=temperature), wanted, atol=4 * 0.5 / math.sqrt(2000))


def test_top_k_draws_from_the_likeliest_k_only() -> None:
    found = shares(top_k=2)
    assert (found > 0).tolist() == [False, True, False, False, True]


def test_top_k_of_one_is_greedy_at_any_temperature() -> None:
    assert {drawn(LOGITS, with_params(seed, top_k=1, temperature=9.0)) for seed in range(50)} == {1}


def test_top_k_over_the_vocabulary_keeps_all() -> None:
    assert (shares(top_k=99, temperature=3.0) > 0).all()


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    ordered = LOGITS.softmax(dim=-1).sort(descending=True).values
    assert float(ordered[0]) < 0.45 < float(ordered[:2].sum())
    assert (shares(top_p=0.45) > 0).tolist() == [False, True, False, False, True]


def test_top_p_below_every_probability_still_leaves_the_likeliest() -> None:
    assert {drawn(LOGITS, with_params(seed, top_p=1e-6)) for seed in range(50)} == {1}


def test_top_k_applies_before_top_p() -> None:
    two = LOGITS[[1, 4]].softmax(dim=-1)
    assert float(LOGITS.softmax(dim=-1)[1]) < float(two[0]) - 0.1
    # Of the two tokens kept by top-k the first alone holds more than a half; of all five it does not.
    assert (shares(top_k=2, top_p=0.5) > 0).tolist() == [False, True, False, False, False]
    assert (shares(top_p=0.5) > 0).sum() == 2


def test_another_seed_or_position_draws_anew() -> None:
    flat = torch.zeros(1000)
    assert len({drawn(flat, with_params(seed)) for seed in range(20)}) > 15
    assert len({drawn(flat, with_params(0), position) for position in range(20)}) > 15


def test_one_seed_and_position_do_not_stand_for_another_pair() -> None:
    flat = torch.zeros(10_000)
    assert drawn(flat, with_params(1), 11) != drawn(flat, with_params(11), 1)


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(5)), st.integers(0, 2**63), st.integers(0, 400))
def test_batch_mates_and_their_order_change_no_draw(order: list[int], seed: int, position: int) -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(3))
    params = [with_params(seed + i, temperature=i / 2, top_k=10 * i, top_p=1 - i / 9) for i in range(5)]
    alone = [drawn(logits[i], params[i], position) for i in order]
    together = choose(logits[list(order)], [params[i] for i in order], [position] * len(order)).argmax(dim=1).tolist()
    assert together == alone


def test_the_hash_is_the_one_of_unsigned_numbers_whatever_a_device_does_with_signs() -> None:
    def by_hand(number: int) -> int:
        number = (number ^ number >> 16) * 0x85EBCA6B & MASK
        number = (number ^ number >> 13) * 0xC2B2AE35 & MASK
        return number ^ number >> 16

    numbers = [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xDEADBEEF, MASK]
    hashed = _hash(torch.tensor(numbers).to(torch.int32)).tolist()
    assert [number & MASK for number in hashed] == [by_hand(number) for number in numbers]


@pytest.mark.parametrize("varied", ["seed", "position"])
def test_the_noise_is_gumbels_and_no_row_knows_of_another(varied: str) -> None:
    count, tokens = 4000, 50
    numbers = torch.arange(count)
    seeds = torch.stack([numbers if varied == "seed" else numbers * 0 + 7, numbers * 0], dim=1)
    noise = _gumbel(seeds, numbers * 0 + 3 if varied == "seed" else numbers, tokens)
    assert kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 0.001
    picks = (torch.linspace(2, -2, tokens) + noise).argmax(dim=1).bincount(minlength=tokens)
    wanted = torch.linspace(2, -2, tokens).double().softmax(dim=0) * count
    assert chisquare(picks.double().numpy(), wanted.numpy()).pvalue > 0.001
    for a, b in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1])):
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.01


def test_a_model_that_is_loaded_meanwhile_changes_no_draw() -> None:
    """Loading one sets the default type of the whole process."""
    logits = torch.randn(64, 200, generator=torch.Generator().manual_seed(0))
    params = [with_params(seed, temperature=0.7, top_p=0.9) for seed in range(64)]
    before = choose(logits, params, [0] * 64)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(choose(logits, params, [0] * 64), before)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = drawn(torch.zeros(1000), with_params(5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert drawn(torch.zeros(1000), with_params(5)) == first


def test_half_precision_logits_are_drawn_from_in_full_precision() -> None:
    assert choose(LOGITS[None].bfloat16(), [with_params(0)], [0]).dtype == torch.float32


@pytest.mark.parametrize(
    "params", [{"temperature": 1e-40}, {"temperature": 5e-324}, {"temperature": 2.0, "top_p": 5e-324}]
)
def test_the_coldest_settings_take_the_likeliest_token(params: dict[str, float]) -> None:
    logits = torch.tensor([[1.0, 9.0, -3.0, 4.0]])
    assert choose(logits, [SamplingParams(**params, seed=3)], [0]).argmax(dim=-1).tolist() == [1]  # type: ignore[arg-type]


@pytest.mark.parametrize("at_once", [1, 12, output.CACHED])
def test_entropies_are_those_of_the_distributions_whatever_is_read_at_once(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(output, "CACHED", at_once)
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) * 4
    logits[2, 1:3] = -math.inf  # tokens that a model never says
    logits[3, 1:] = -math.inf
    wanted = torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)
    torch.testing.assert_close(entropies_of(logits), wanted)
    assert entropies_of(logits)[3] == 0 and len(entropies_of(logits[:0])) == 0
