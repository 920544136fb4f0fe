"""Which examples a step sees, what is held out, and batches that are ready before they are asked for."""

import threading
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

from latentwire.bridge.config import BridgeConfig
from latentwire.bridge.evaluation.tasks import Example, load_task
from latentwire.bridge.models import FrozenLM
from latentwire.training.config import read_config
from latentwire.training.data import AHEAD, GROUPED, Prefetch, Sampler, Subset, chunks, split_off, stratified
from latentwire.training.objectives import word_targets
from latentwire.training.tokens import Tokeniser
from tests.conftest import bridge_config


def length_of(index: int) -> int:
    """Lengths without order, some of them equal."""
    return index * 37 % 11


def test_the_order_of_examples_is_a_function_of_the_step() -> None:
    sampler = Sampler(10, batch_size=4, seed=3)
    seen = [i for number in range(5) for i in sampler.batch(number)]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10)) and seen[:10] != seen[10:20]
    assert Sampler(10, batch_size=4, seed=3).batch(4) == sampler.batch(4)
    assert Sampler(10, batch_size=4, seed=4).batch(0) != sampler.batch(0)
    half = Sampler(10, batch_size=2, seed=3)
    assert [*half.batch(0), *half.batch(1)] == sampler.batch(0)


def test_grouped_by_length_every_example_still_comes_once_per_epoch() -> None:
    sampler = Sampler(16, batch_size=2, seed=3, length=length_of)  # a group of steps is an epoch
    epochs = [[i for step in range(GROUPED) for i in sampler.batch(epoch * GROUPED + step)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs) and epochs[0] != epochs[1]


def test_grouped_by_length_no_example_is_lost_where_groups_and_epochs_do_not_meet() -> None:
    sampler = Sampler(12, batch_size=2, seed=3, length=length_of)
    groups = [
        Counter(i for step in range(GROUPED) for i in sampler.batch(group * GROUPED + step)) for group in range(3)
    ]
    plain = Sampler(12, batch_size=2, seed=3)
    assert groups == [
        Counter(i for step in range(GROUPED) for i in plain.batch(group * GROUPED + step)) for group in range(3)
    ]
    assert sum(groups, Counter()) == Counter({i: 4 for i in range(12)})  # 48 rows: four epochs


def test_grouped_by_length_rows_of_a_step_are_of_like_length_and_steps_come_in_no_order_of_it() -> None:
    sampler = Sampler(1000, batch_size=4, seed=1, length=length_of)
    rising = 0
    for group in range(5):
        spans = [[length_of(i) for i in sampler.batch(group * GROUPED + step)] for step in range(GROUPED)]
        by_length = sorted(spans)
        assert all(max(a) <= min(b) for a, b in pairwise(by_length))
        rising += spans == by_length
    assert rising == 0


def test_grouped_by_length_the_order_is_a_function_of_seed_and_step() -> None:
    sampler = Sampler(100, batch_size=4, seed=3, length=length_of)
    forward = [sampler.batch(step) for step in range(40)]
    again = Sampler(100, batch_size=4, seed=3, length=length_of)
    assert [again.batch(step) for step in reversed(range(40))] == forward[::-1]
    assert Sampler(100, batch_size=4, seed=4, length=length_of).batch(0) != forward[0]


@pytest.mark.parametrize("count", [1, 7, 30, 59, 60])
def test_a_stratified_subset_keeps_every_labels_share_to_within_one(count: int) -> None:
    labels = [0] * 30 + [1] * 20 + [2] * 9 + [3]
    chosen = stratified(labels, count, seed=5)
    assert len(set(chosen)) == len(chosen) == count and chosen == sorted(chosen)
    for label, held in Counter(labels).items():
        assert abs(sum(labels[i] == label for i in chosen) - count * held / 60) < 1


def test_a_subset_is_drawn_by_its_seed() -> None:
    for labels in ([0, 1] * 20, [None] * 40):
        chosen = stratified(labels, 10, seed=0)
        assert chosen == stratified(labels, 10, seed=0) != stratified(labels, 10, seed=1)
        assert chosen != list(range(10))


def examples(count: int, labels: Sequence[int | None] = (None,)) -> list[Example]:
    return [Example(f"text {i}", "{latent}?", " x", labels[i % len(labels)]) for i in range(count)]


@pytest.mark.parametrize("labels", [(None,), (0, 1, 1)])
@pytest.mark.parametrize("count, wanted, held", [(30, 6, 6), (30, 15, 15), (30, 64, 15), (9, 64, 4), (30, 0, 0)])
def test_validation_is_apart_from_training_and_at_most_half(
    labels: Sequence[int | None], count: int, wanted: int, held: int
) -> None:
    everything = examples(count, labels)
    train, validation = split_off(everything, validation=wanted, limit=None, seed=0)
    texts, others = {e.source for e in train}, {e.source for e in validation}
    assert (len(train), len(validation)) == (count - held, held)
    assert not texts & others and texts | others == {e.source for e in everything}


def test_a_labelled_validation_split_is_stratified_and_seeded() -> None:
    everything = examples(60, (0, 1, 1))
    drawn = [[e.source for e in split_off(everything, validation=12, limit=None, seed=seed)[1]] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    _, validation = split_off(everything, validation=12, limit=None, seed=0)
    assert Counter(e.label for e in validation) == {0: 4, 1: 8}


@pytest.mark.parametrize("labels", [(None,), (0, 1, 1)])
def test_a_limit_takes_a_seeded_subset_of_what_is_left_for_training(labels: Sequence[int | None]) -> None:
    everything = examples(60, labels)
    few, validation = split_off(everything, validation=12, limit=9, seed=0)
    other, held = split_off(everything, validation=12, limit=9, seed=1)
    assert len(few) == 9 and len(validation) == 12 and not {e.source for e in few} & {e.source for e in validation}
    assert Counter(e.label for e in few) == ({0: 3, 1: 6} if labels[0] == 0 else {None: 9})
    assert [e.source for e in few] != [e.source for e in other] and len(held) == 12
    assert len(split_off(everything, validation=12, limit=1000, seed=0)[0]) == 48


def test_of_a_generated_split_the_last_examples_are_held_out_and_it_stays_lazy() -> None:
    world = load_task("world").train
    train, validation = split_off(world, validation=3, limit=None, seed=0)
    assert (len(train), len(validation)) == (999_997, 3)
    assert list(validation[:]) == [world[i] for i in range(999_997, 1_000_000)] and train[0] == world[0]


def test_a_subset_is_read_in_its_own_order() -> None:
    subset = Subset(examples(5), [3, 0, 4])
    assert [e.source for e in subset] == ["text 3", "text 0", "text 4"]
    assert [e.source for e in subset[1:]] == ["text 0", "text 4"]


def prefetching() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_steps_come_in_their_order_and_a_few_are_made_ahead() -> None:
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        return step * 10

    with Prefetch(make, 3, 9) as ahead:
        taken, waited = ahead.take()
        assert taken == 30 and waited >= 0
        assert [ahead.take()[0] for _ in range(2)] == [40, 50]
        assert len(made) <= 3 + AHEAD
        assert [ahead.take()[0] for _ in range(3)] == [60, 70, 80]
    assert made == [3, 4, 5, 6, 7, 8] and not prefetching()


def test_the_first_steps_are_made_on_a_thread_of_their_own() -> None:
    with Prefetch(lambda step: threading.current_thread().name, 0, 2) as ahead:
        assert ahead.take()[0].startswith("prefetch")


def test_what_failed_on_the_thread_is_raised_where_its_step_is_taken_and_no_thread_is_left() -> None:
    def make(step: int) -> int:
        if step == 1:
            raise ValueError("row 1 is bad")
        return step

    with pytest.raises(ValueError, match="row 1 is bad"), Prefetch(make, 0, 5) as ahead:
        assert ahead.take()[0] == 0
        ahead.take()
    assert not prefetching()


def test_no_thread_is_left_when_the_run_fails_elsewhere() -> None:
    with pytest.raises(RuntimeError, match="elsewhere"), Prefetch(lambda step: step, 0, 100) as ahead:
        ahead.take()
        raise RuntimeError("elsewhere")
    assert not prefetching()


def tokeniser(lms: dict[str, FrozenLM], *, ratio: int, max_source_tokens: int, **encoder: object) -> Tokeniser:
    """From the tiny NeoX to the tiny Llama, with windows of ``ratio`` tokens."""
    sender, receiver = lms["neox"], lms["llama"]
    config = read_config(None, {"sender": "a", "receiver": "b", "task": "world", "out": "c", "ratio": ratio})
    described = bridge_config(sender, receiver, ratio=ratio, **encoder)
    bridge = BridgeConfig(**{**vars(described), "max_source_tokens": max_source_tokens})
    reads, answers = (lm.reader for lm in (sender, receiver))
    return Tokeniser(config, bridge, "{latent}\nRepeat:", reads, answers, aligned=True)


def test_windows_cover_the_words_whose_tokens_end_in_them(lms: dict[str, FrozenLM]) -> None:
    receiver, made = lms["llama"], tokeniser(lms, ratio=4, max_source_tokens=48)
    rows = [made(Example(text, "{latent} Q:", " a")).words for text in ("abcdefgh", "xy")]
    words, covered = word_targets(receiver, rows)
    byte = {c: receiver.embed(torch.tensor([receiver.tokenizer.convert_tokens_to_ids(c)]))[0] for c in "abcdefghxy"}
    # BOS takes the first place of the first window.
    for row, slot, held in [(0, 0, "abc"), (0, 1, "defg"), (0, 2, "h"), (1, 0, "xy")]:
        torch.testing.assert_close(words[row, slot], torch.stack([byte[c] for c in held]).sum(dim=0))
    assert covered.tolist() == [[True, True, True], [True, False, False]]


def test_global_slots_cover_no_words_and_windows_behind_them_cover_the_same(lms: dict[str, FrozenLM]) -> None:
    example = Example("abcdefgh", "{latent} Q:", " a")
    plain = tokeniser(lms, ratio=4, max_source_tokens=48)(example)
    made = tokeniser(lms, ratio=4, max_source_tokens=48, kind="hybrid", num_latents=2)(example)
    assert made.words == [(2 + window, token) for window, token in plain.words]
    assert max(made.answer.slots) == max(plain.answer.slots) + 2


def test_words_beyond_the_cut_are_no_target(lms: dict[str, FrozenLM]) -> None:
    made = tokeniser(lms, ratio=4, max_source_tokens=4)
    _, covered = word_targets(lms["llama"], [made(Example("abcdefgh", "{latent} Q:", " a")).words])
    assert covered.tolist() == [[True]]


def test_items_are_cut_into_pieces_of_at_most_a_size() -> None:
    assert list(chunks([1, 2, 3, 4, 5], 2)) == [[1, 2], [3, 4], [5]] and list(chunks([], 2)) == []
