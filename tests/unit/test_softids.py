"""Soft tokens under ids of their own."""

import threading

import pytest
import torch
from torch import Tensor, nn

from latentwire.bridge.errors import Overloaded
from latentwire.bridge.generation import softids
from latentwire.bridge.generation.softids import SoftIds

WIDTH, ROWS = 4, 10


def drawn(seed: int, count: int = 4) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def embedding() -> nn.Embedding:
    return nn.Embedding(7, WIDTH).requires_grad_(False)


def test_ids_below_zero_are_soft_tokens_and_all_others_what_they_were(embedding: nn.Embedding) -> None:
    text = torch.arange(7).view(1, 7)
    plain = embedding(text)
    soft_ids = SoftIds(embedding, rows=ROWS)
    assert torch.equal(embedding(text), plain)
    for key in (0, 1):
        assert soft_ids.hold(key, lambda key=key: drawn(key))  # type: ignore[misc]
    ids = torch.tensor([[3, *soft_ids.ids(1)], [*soft_ids.ids(0), 6]])
    assert torch.equal(embedding(ids)[0], torch.cat([plain[0, 3:4], drawn(1)]))
    assert torch.equal(embedding(ids)[1], torch.cat([drawn(0), plain[0, 6:]]))
    soft_ids.close()
    assert torch.equal(embedding(text), plain) and "forward" not in vars(embedding)


def test_no_id_is_given_to_a_second_soft_token_and_a_latent_that_is_held_keeps_its_own(embedding: nn.Embedding) -> None:
    soft_ids = SoftIds(embedding, rows=ROWS)
    assert soft_ids.hold("stays", lambda: drawn(99))
    kept, given = soft_ids.ids("stays"), set[int]()
    for key in range(30):
        assert soft_ids.hold(key, lambda key=key: drawn(key))  # type: ignore[misc]
        ids = soft_ids.ids(key)
        assert max(ids) < 0 and given.isdisjoint(ids)
        given |= set(ids)
        assert torch.equal(embedding(torch.tensor(ids)), drawn(key))
        soft_ids.release(key)
        assert soft_ids.tokens <= ROWS
    assert soft_ids.ids("stays") == kept and given.isdisjoint(kept)
    assert torch.equal(embedding(torch.tensor(kept)), drawn(99))


def test_what_nobody_uses_stays_and_the_least_recently_used_goes_first(embedding: nn.Embedding) -> None:
    soft_ids, made = SoftIds(embedding, rows=ROWS), []

    def use(key: int) -> None:
        assert soft_ids.hold(key, lambda: made.append(key) or drawn(key))  # type: ignore[func-returns-value]
        soft_ids.release(key)

    for key in (0, 1, 0, 2, 0, 1):
        use(key)
    assert made == [0, 1, 2, 1] and soft_ids.users == 0


def test_soft_tokens_that_do_not_fit_wait_for_room_while_they_should_and_are_then_refused(
    embedding: nn.Embedding,
) -> None:
    soft_ids = SoftIds(embedding, rows=ROWS)
    for key in (0, 1):
        assert soft_ids.hold(key, lambda key=key: drawn(key))  # type: ignore[misc]
    threading.Timer(0.1, soft_ids.release, [0]).start()
    assert soft_ids.hold(2, lambda: drawn(2), lambda: True)
    with pytest.raises(Overloaded, match="room for 10 soft tokens, and others' took it"):
        soft_ids.hold(3, lambda: drawn(3))
    assert soft_ids.tokens == 8 and soft_ids.users == 2


def test_two_who_waited_for_room_for_one_latent_share_it(embedding: nn.Embedding) -> None:
    soft_ids = SoftIds(embedding, rows=ROWS)
    for key in (0, 1):
        assert soft_ids.hold(key, lambda key=key: drawn(key))  # type: ignore[misc]
    both = [threading.Thread(target=soft_ids.hold, args=(2, lambda: drawn(2), lambda: True)) for _ in range(2)]
    for one in both:
        one.start()
    soft_ids.release(0)
    for one in both:
        one.join()
    assert (soft_ids.tokens, soft_ids.users) == (8, 3)
    assert torch.equal(embedding(torch.tensor(soft_ids.ids(2))), drawn(2))


def test_soft_tokens_that_cannot_be_kept_take_no_rows(embedding: nn.Embedding) -> None:
    soft_ids = SoftIds(embedding, rows=ROWS)
    with pytest.raises(RuntimeError):
        soft_ids.hold(0, lambda: torch.ones(4, WIDTH + 1))
    assert soft_ids.tokens == 0 and soft_ids.hold(1, lambda: torch.ones(0, WIDTH)) and soft_ids.tokens == 0


def test_ids_begin_again_where_they_are_used_up(embedding: nn.Embedding, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softids, "IDS", 2 * ROWS)
    soft_ids = SoftIds(embedding, rows=ROWS)
    for key in range(4):
        assert soft_ids.hold(key, lambda key=key: drawn(key))  # type: ignore[misc]
        if key != 3:
            soft_ids.release(key)
    assert not any(soft_ids.hold(key, lambda: drawn(9)) for key in (9, 9))
    soft_ids.renumber()
    assert max(-1 - i for i in soft_ids.ids(3)) < ROWS
    assert soft_ids.hold(9, lambda: drawn(9))
    for key in (3, 9):
        assert torch.equal(embedding(torch.tensor(soft_ids.ids(key))), drawn(key))


def test_which_row_an_id_is_of_is_decided_on_the_device_alone(embedding: nn.Embedding) -> None:
    """A graph on a device could not hold anything else: of a tensor on ``meta`` nothing can be read."""
    SoftIds(embedding.to("meta"), rows=ROWS)
    assert embedding(torch.empty(3, 5, dtype=torch.int32, device="meta")).shape == (3, 5, WIDTH)
