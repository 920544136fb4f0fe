"""Models take turns in a budget too small for both, and the one that left is really gone."""

import gc
import math
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from latentwire.bridge.errors import InsufficientMemory, InvalidRequest, ModelInUse, ModelUnavailable
from latentwire.bridge.memory import budget_bytes, device_bytes, free_bytes
from latentwire.bridge.models import FrozenLM, load_model, predicted_bytes
from latentwire.bridge.parking import HostCopies
from latentwire.bridge.residency import FREE_SHARE, Residency
from tests.conftest import byte_tokenizer, write_model

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
LONG = 20.0


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("pair")
    return str(write_model(root / "sender", "neox")), str(write_model(root / "receiver", "llama"))


def size(name: str) -> int:
    return predicted_bytes(name, torch.float32)


def test_in_a_budget_for_the_larger_model_both_are_never_held(pair: tuple[str, str]) -> None:
    sender, receiver = pair
    budget = max(size(sender), size(receiver))
    residency = Residency(budget, device=torch.device("cpu"))
    with residency.use(sender) as lm:
        gone = weakref.ref(lm.model)
        assert residency.resident() == {sender: size(sender)}
    del lm
    assert gone() is not None  # kept while there is room
    with residency.use(receiver):
        assert gone() is None
        assert residency.resident() == {receiver: size(receiver)}
    assert residency.history == [
        ("load", sender, size(sender)),
        ("drop", sender, 0),
        ("load", receiver, size(receiver)),
    ]
    assert all(held <= budget for _, _, held in residency.history)


def test_the_first_is_gone_before_the_second_is_loaded(pair: tuple[str, str]) -> None:
    sender, receiver = pair
    loaded: list[weakref.ref[torch.nn.Module]] = []

    def load(name: str, *, device: torch.device | None, dtype: torch.dtype | None) -> FrozenLM:
        gc.collect()
        assert not any(ref() is not None for ref in loaded), f"{name} is loaded beside another model"
        lm = load_model(name, device=device, dtype=dtype)
        loaded.append(weakref.ref(lm.model))
        return lm

    residency = Residency(max(size(sender), size(receiver)), device=torch.device("cpu"), load=load)
    for name in (sender, receiver, sender):
        with residency.use(name):
            pass
    assert [event for event, _, _ in residency.history] == ["load", "drop", "load", "drop", "load"]


def test_where_both_fit_both_stay(pair: tuple[str, str]) -> None:
    total = size(pair[0]) + size(pair[1])
    for budget in (None, total):
        residency = Residency(budget, device=torch.device("cpu"))
        for name in (*pair, *pair):
            with residency.use(name):
                pass
        assert [event for event, _, _ in residency.history] == ["load", "load"]
        assert residency.resident_bytes == total


def test_the_model_used_longest_ago_leaves_first(pair: tuple[str, str], tmp_path: Path) -> None:
    third = str(write_model(tmp_path / "third", "llama", seed=2))
    sender, receiver = pair
    budget = size(sender) + size(receiver) + size(third) - 1
    residency = Residency(budget, device=torch.device("cpu"))
    for name in (sender, receiver, sender, third):
        with residency.use(name):
            pass
    assert ("drop", receiver) in [event[:2] for event in residency.history] and sender in residency.resident()


def test_a_lent_model_is_never_dropped(pair: tuple[str, str]) -> None:
    sender, receiver = pair
    budget = max(size(sender), size(receiver))
    residency = Residency(budget, device=torch.device("cpu"))
    with residency.use(sender), residency.use(sender):
        with pytest.raises(InsufficientMemory, match=rf"{size(receiver)} bytes; {size(sender)} of the {budget}"):
            with residency.use(receiver):
                pass
        assert residency.resident() == {sender: size(sender)}
    with residency.use(receiver):
        assert list(residency.resident()) == [receiver]


def test_a_model_lent_in_vain_is_given_back(pair: tuple[str, str]) -> None:
    sender, receiver = pair
    residency = Residency(max(size(sender), size(receiver)), device=torch.device("cpu"))
    with pytest.raises(RuntimeError):
        with residency.use(sender):
            raise RuntimeError
    with residency.use(receiver):
        pass
    assert list(residency.resident()) == [receiver]


def test_a_model_over_the_whole_budget_is_refused_with_both_numbers(pair: tuple[str, str]) -> None:
    need = size(pair[0])
    residency = Residency(need - 1, device=torch.device("cpu"))
    with pytest.raises(InsufficientMemory, match=rf"needs {need} bytes; the memory budget is {need - 1}"):
        with residency.use(pair[0]):
            pass
    assert residency.history == [] and residency.resident_bytes == 0


def test_a_model_that_cannot_be_loaded_takes_no_room(tmp_path: Path) -> None:
    residency = Residency(10**9, device=torch.device("cpu"))
    with pytest.raises(ModelUnavailable):
        with residency.use(str(tmp_path)):
            pass
    assert residency.resident() == {}


def test_bytes_are_counted_in_the_dtype_asked_for(pair: tuple[str, str]) -> None:
    residency = Residency(size(pair[0]) // 2, device=torch.device("cpu"), dtype=torch.bfloat16)
    with residency.use(pair[0]) as lm:
        assert lm.model.dtype == torch.bfloat16 and residency.resident_bytes == size(pair[0]) // 2


def test_a_model_being_read_is_named_until_it_is_there_or_failed(pair: tuple[str, str]) -> None:
    seen: list[str | None] = []

    def load(name: str, *, device: torch.device | None, dtype: torch.dtype | None) -> FrozenLM:
        seen.append(residency.loading)
        if name == pair[1]:
            raise ModelUnavailable(name)
        return load_model(name, device=device, dtype=dtype)

    residency = Residency(None, device=torch.device("cpu"), load=load)
    with residency.use(pair[0]):
        seen.append(residency.loading)
    with pytest.raises(ModelUnavailable), residency.use(pair[1]):
        pass
    assert [*seen, residency.loading] == [pair[0], None, pair[1], None]


def test_history_is_bounded(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentwire.bridge.residency.free_caches", lambda: None)  # time saved, no more
    lm = load_model(pair[0])
    residency = Residency(None, device=torch.device("cpu"), load=lambda name, **where: replace(lm, name=name))
    for _ in range(150):
        with residency.use(pair[0]):
            pass
        residency.unload(pair[0])
    with residency.use(pair[1]):
        assert len(residency.history) == 256 and residency.history[-1][:2] == ("load", pair[1])


@pytest.fixture(scope="module")
def three(pair: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    return *pair, str(write_model(tmp_path_factory.mktemp("third") / "third", "llama", seed=2))


def in_thread(function: Callable[..., Any], *given: Any) -> Future[Any]:
    """The outcome of a call that may have to wait, made in a thread of its own."""
    outcome: Future[Any] = Future()

    def call() -> None:
        try:
            outcome.set_result(function(*given))
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return outcome


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def somebody_waits(residency: Residency, name: str) -> bool:
    """Whether a loan waits for models in use: then not even one that is there is lent before it."""
    if residency.try_acquire(name) is None:
        return True
    residency.release(name)
    return False


def touch(residency: Residency, *names: str) -> None:
    for name in names:
        with residency.use(name):
            pass


def events(residency: Residency) -> list[tuple[str, str]]:
    return [event[:2] for event in residency.history]


def test_files_under_two_names_are_loaded_once_and_lent_under_the_name_asked_for(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    copy = str(shutil.copytree(pair[0], tmp_path / "copy"))
    residency = Residency(None, device=CPU)
    with residency.use(pair[0]) as one, residency.use(copy) as other:
        assert one.model is other.model and (one.name, other.name) == (pair[0], copy)
        resident = residency.find(pair[0])
        assert resident is residency.find(copy) and resident is not None and resident.users == 2
    assert residency.resident_bytes == size(copy) and events(residency) == [("load", pair[0])]
    residency.pin(copy)
    assert residency.sweep(math.inf) == [] and residency.unload(pair[0]) != 0
    assert residency.find(copy) is None


def test_models_that_differ_only_in_weights_are_not_shared(three: tuple[str, str, str]) -> None:
    residency = Residency(None, device=CPU)
    with residency.use(three[1]) as one, residency.use(three[2]) as other:
        assert one.model is not other.model


def test_a_loan_that_must_wait_begins_when_the_models_in_the_way_become_idle(pair: tuple[str, str]) -> None:
    sender, receiver = pair
    residency = Residency(max(map(size, pair)), device=CPU)
    residency.acquire(sender)
    waiting = in_thread(residency.acquire, receiver, LONG)
    until(lambda: somebody_waits(residency, sender))
    assert not waiting.done() and residency.find(receiver) is None
    residency.release(sender)
    assert waiting.result(LONG).name == receiver
    assert list(residency.resident()) == [receiver]


def test_a_loan_that_waits_in_vain_is_refused_and_leaves_the_line(pair: tuple[str, str]) -> None:
    sender, receiver = pair
    residency = Residency(max(map(size, pair)), device=CPU)
    with residency.use(sender):
        with pytest.raises(InsufficientMemory, match=f"{size(receiver)} bytes; {size(sender)} of the"):
            residency.acquire(receiver, 0.05)
        assert residency.try_acquire(sender) is not None  # nobody waits any more
        residency.release(sender)


def test_a_steady_stream_on_one_model_does_not_starve_the_other(pair: tuple[str, str]) -> None:
    sender, receiver = pair
    residency = Residency(max(map(size, pair)), device=CPU)
    residency.acquire(sender)
    first = in_thread(residency.acquire, receiver, LONG)
    until(lambda: somebody_waits(residency, sender))
    assert residency.try_acquire(sender) is None  # resident, but somebody waits
    with pytest.raises(InsufficientMemory):
        residency.acquire(sender)
    behind = in_thread(residency.acquire, sender, LONG)
    until(lambda: len(residency._line) == 2)
    residency.release(sender)
    assert first.result(LONG).name == receiver
    assert not behind.done()
    residency.release(receiver)
    assert behind.result(LONG).name == sender
    assert events(residency) == [
        ("load", sender), ("drop", sender), ("load", receiver), ("drop", receiver), ("load", sender),
    ]  # fmt: skip


def test_a_loan_behind_a_waiting_one_goes_on_when_that_gives_up(pair: tuple[str, str]) -> None:
    sender, receiver = pair
    residency = Residency(max(map(size, pair)), device=CPU)
    residency.acquire(sender)
    first = in_thread(residency.acquire, receiver, 0.3)
    until(lambda: somebody_waits(residency, sender))
    behind = in_thread(residency.acquire, sender, LONG)
    assert isinstance(first.exception(LONG), InsufficientMemory)
    assert behind.result(LONG).name == sender


# Weights kept on the host: between two places of the CPU here, as between it and a GPU


def weights_of(lm: FrozenLM) -> dict[str, torch.Tensor]:
    """All tensors of a model, those too that no file has."""
    named = dict(lm.model.named_parameters()) | dict(lm.model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def taking_turns(budget: int, copies: HostCopies) -> tuple[Residency, list[str]]:
    """A residency, and what it has read from files."""
    read: list[str] = []

    def load(name: str, **where: Any) -> FrozenLM:
        read.append(name)
        return load_model(name, **where)

    return Residency(budget, device=CPU, load=load, copies=copies), read


def test_models_that_take_turns_are_read_once_and_come_back_as_they_were(pair: tuple[str, str]) -> None:
    sender, receiver = pair
    copies = HostCopies()
    residency, read = taking_turns(max(size(sender), size(receiver)), copies)
    ids = torch.tensor([[1, 2, 3]])
    with residency.use(sender) as lm:
        before, said = weights_of(lm), lm.model(ids).logits
    del lm
    for _ in range(2):
        with residency.use(receiver):
            assert residency.resident() == {receiver: size(receiver)} and copies.bytes >= size(sender)
        with residency.use(sender) as lm:
            after = weights_of(lm)
            assert lm.name == sender and torch.equal(lm.model(ids).logits, said)
        del lm
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert read == [sender, receiver]
    assert events(residency)[:4] == [("load", sender), ("drop", sender), ("load", receiver), ("drop", receiver)]


def places(lm: FrozenLM) -> list[int]:
    return [tensor.data_ptr() for tensor in lm.model.parameters()]


def test_a_copy_stays_while_its_model_is_there_so_that_to_leave_again_copies_nothing(pair: tuple[str, str]) -> None:
    copies = HostCopies()
    lm = load_model(pair[0], device=CPU)
    loaded = places(lm)
    assert copies.park(lm)
    parked = places(lm)
    back = copies.bring("another name", lm.fingerprint, CPU)
    assert back is not None and back.name == "another name" and back.model is lm.model
    assert not {*loaded, *places(lm)} & {*parked}  # copied, and not the copy itself
    assert copies.park(back) and places(lm) == parked
    assert copies.bring("x", load_model(pair[1]).fingerprint, CPU) is None


def test_copies_stay_within_their_bytes_and_the_oldest_go_first(three: tuple[str, str, str]) -> None:
    lms = [load_model(name, device=CPU) for name in three]
    copies, sizes = HostCopies(), list[int]()
    for lm in lms:
        assert copies.park(lm)
        sizes.append(copies.bytes - sum(sizes))
    tight = HostCopies(sizes[1] + sizes[2])
    assert [tight.park(lm) for lm in lms[1:]] == [True, True] and tight.bytes == tight.most_bytes
    assert tight.park(lms[0]) and tight.bytes <= sizes[1] + sizes[2]
    assert tight.bring("x", lms[1].fingerprint, CPU) is None and tight.bring("x", lms[0].fingerprint, CPU) is not None
    assert not HostCopies(0).park(lms[0]) and not HostCopies(sizes[0] - 1).park(lms[0])


def test_a_model_that_was_dropped_on_demand_or_whose_time_is_over_leaves_no_copy(pair: tuple[str, str]) -> None:
    sender, receiver = pair
    copies = HostCopies()
    residency, read = taking_turns(max(size(sender), size(receiver)), copies)
    touch(residency, sender, receiver, sender)
    residency.unload(sender)
    touch(residency, sender)
    assert read == [sender, receiver, sender]
    touch(residency, receiver)
    residency.keep(receiver, 0.0)
    assert residency.sweep() == [receiver]
    touch(residency, receiver)
    assert read == [sender, receiver, sender, receiver]


def test_a_model_without_room_on_the_device_stays_on_the_host_whole(
    pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, receiver = pair
    copies = HostCopies()
    residency, read = taking_turns(max(size(sender), size(receiver)), copies)
    touch(residency, sender, receiver)
    real, calls = torch.Tensor.to, [0]

    def full(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls[0] += "copy" in kwargs
        if calls[0] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(tensor, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", full)
        with pytest.raises(InsufficientMemory, match="needs"):
            residency.acquire(sender)
    (parked, _) = copies._parked.values()
    assert places(parked.lm) == [tensor.data_ptr() for tensor in parked.tensors[: len(places(parked.lm))]]
    touch(residency, sender)
    assert read == [sender, receiver]


@pytest.mark.parametrize("device, kept", [("cpu", False), ("mps", False), ("cuda", True)])
def test_only_a_device_with_a_memory_of_its_own_has_copies_beside_it(device: str, kept: bool) -> None:
    copies = HostCopies.beside(torch.device(device), 7)
    assert (copies is not None and copies.most_bytes == 7) == kept


def test_those_who_wait_are_served_in_the_order_of_their_arrival(three: tuple[str, str, str]) -> None:
    sender, receiver, third = three
    residency = Residency(max(map(size, three)), device=CPU)
    residency.acquire(sender)
    served: list[str] = []

    def take_a_turn(name: str) -> None:
        with residency.use(name, LONG):
            served.append(name)

    turns = []
    for place, name in enumerate((receiver, third, sender), start=1):
        turns.append(in_thread(take_a_turn, name))
        until(lambda place=place: len(residency._line) == place)  # type: ignore[misc]
        until(lambda: somebody_waits(residency, sender))
    residency.release(sender)
    for turn in turns:
        turn.result(LONG)
    assert served == [receiver, third, sender]


def test_while_a_model_is_read_others_are_lent_at_once_and_one_more_load_waits(three: tuple[str, str, str]) -> None:
    sender, receiver, third = three
    begun, go_on, reading = threading.Event(), threading.Event(), []

    def load(name: str, **where: Any) -> FrozenLM:
        reading.append(name)
        assert residency.loading == name
        if name == receiver:
            begun.set()
            assert go_on.wait(LONG)
        lm = load_model(name, **where)
        assert reading.pop() == name and not reading, "two models are read at once"
        return lm

    residency = Residency(None, device=CPU, load=load)
    touch(residency, sender)
    slow = in_thread(residency.acquire, receiver)
    assert begun.wait(LONG)
    same, other = in_thread(residency.acquire, receiver), in_thread(residency.acquire, third)
    until(lambda: len(residency._line) == 3)
    assert residency.try_acquire(sender) is not None
    assert residency.acquire(sender) is not None
    assert residency.try_acquire(receiver) is None and residency.sweep() == []
    assert residency.find(sender) is not None and not (slow.done() or same.done() or other.done())
    go_on.set()
    assert slow.result(LONG).model is same.result(LONG).model and other.result(LONG).name == third
    assert events(residency) == [("load", sender), ("load", receiver), ("load", third)]


def test_a_failed_load_lets_the_next_in_line_go_on(pair: tuple[str, str]) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def load(name: str, **where: Any) -> FrozenLM:
        if name == pair[0]:
            begun.set()
            assert go_on.wait(LONG)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return load_model(name, **where)

    residency = Residency(None, device=CPU, load=load)
    fails = in_thread(residency.acquire, pair[0])
    assert begun.wait(LONG)
    works = in_thread(residency.acquire, pair[1])
    go_on.set()
    assert isinstance(fails.exception(LONG), InsufficientMemory)
    assert works.result(LONG).name == pair[1] and residency.loading is None


def test_a_pinned_model_stays_until_it_is_unpinned(pair: tuple[str, str]) -> None:
    sender, receiver = pair
    residency = Residency(max(map(size, pair)), device=CPU)
    residency.pin(sender)
    touch(residency, sender)
    assert residency.find(sender) is not None and residency.is_pinned(sender)
    with pytest.raises(InsufficientMemory, match=f"{size(sender)} of the"):
        residency.acquire(receiver)
    waiting = in_thread(residency.acquire, receiver, LONG)
    until(lambda: somebody_waits(residency, sender))
    residency.unpin(sender)
    assert waiting.result(LONG).name == receiver


def test_a_model_can_be_brought_in_and_dropped_on_demand_but_not_while_lent(pair: tuple[str, str]) -> None:
    sender, _ = pair
    residency = Residency(None, device=CPU)
    assert residency.unload(sender) == 0
    with residency.use(sender):
        assert residency.resident() == {sender: size(sender)}
    residency.pin(sender)
    with residency.use(sender), pytest.raises(ModelInUse, match="1 users; expected none"):
        residency.unload(sender)
    residency.unload(sender)
    with residency.use(sender):
        pass
    resident = residency.find(sender)
    assert resident is not None and not residency.is_pinned(sender) and resident.idle_since > 0
    assert events(residency) == [("load", sender), ("drop", sender), ("load", sender)]


def test_what_is_attached_counts_makes_room_and_is_closed_before_the_model_goes(three: tuple[str, str, str]) -> None:
    sender, receiver, third = three
    budget = sum(map(size, three))
    residency = Residency(budget, device=CPU)
    touch(residency, third, receiver)
    closed: list[bool] = []
    with residency.use(sender) as lm:
        there = weakref.ref(lm.model)
        del lm
        assert residency.room(sender) == budget - size(sender)
        residency.attach(sender, lambda: closed.append(there() is not None), size(third) - 1)
        assert list(residency.resident()) == [receiver, sender]  # the one used longest ago made room
        with residency.use(receiver):
            with pytest.raises(InsufficientMemory, match=r"attached to .* needs 2 bytes"):
                residency.attach(sender, closed.clear, 2)
            assert residency.room(sender) == 1
        with pytest.raises(InsufficientMemory):
            residency.attach(sender, closed.clear, budget)
    state = residency.find(sender)
    assert state is not None and (state.bytes, state.attached_bytes) == (size(sender), size(third) - 1)
    touch(residency, receiver, third)
    assert closed == [True] and there() is None and set(residency.resident()) == {receiver, third}


@pytest.mark.parametrize("budget", [None, 1 << 50])
def test_no_more_can_be_attached_than_the_device_has_free_and_idle_models_would_free(
    pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch, budget: int | None
) -> None:
    sender, receiver = pair
    residency = Residency(budget, device=CPU)
    assert 0 < free_bytes(CPU) <= device_bytes(CPU)
    monkeypatch.setattr("latentwire.bridge.residency.free_bytes", lambda device: 1000)
    with residency.use(sender):
        assert residency.room(sender) == int(FREE_SHARE * 1000)
        touch(residency, receiver)
        assert residency.room(sender) == int(FREE_SHARE * (1000 + size(receiver)))


def test_something_attached_that_cannot_be_closed_does_not_keep_the_model(
    pair: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    residency = Residency(None, device=CPU)
    with residency.use(pair[0]):
        residency.attach(pair[0], lambda: 1 / 0, 1)
    residency.unload(pair[0])
    assert residency.find(pair[0]) is None and "could not be closed" in caplog.text


def test_noted_activations_count_beside_other_models_and_give_way_to_a_model_alone(pair: tuple[str, str]) -> None:
    sender, receiver = pair
    residency = Residency(size(sender) + size(receiver) + 10, device=CPU)
    residency.note_activation(sender, 10)
    residency.note_activation(sender, 4)
    with residency.use(sender), residency.use(receiver):
        assert residency.room(sender) == 0
    residency.note_activation(sender, 11)
    assert residency.sweep() == [sender]  # too much for both from now on
    with residency.use(receiver), pytest.raises(InsufficientMemory):
        residency.acquire(sender)
    residency.note_activation(sender, 10**9)
    touch(residency, sender)
    assert list(residency.resident()) == [sender] and residency.sweep() == []


def test_an_idle_model_leaves_when_its_time_is_over_and_the_longest_wish_holds(
    three: tuple[str, str, str], tmp_path: Path
) -> None:
    sender, receiver, third = three
    copy = str(shutil.copytree(sender, tmp_path / "copy"))
    residency = Residency(None, device=CPU)
    for name, seconds in ((sender, 60.0), (sender, 30.0), (copy, 120.0), (receiver, 60.0), (receiver, None)):
        residency.keep(name, seconds)
    touch(residency, sender, copy, receiver, third)
    now = time.monotonic()
    assert residency.sweep(now + 100) == []
    with residency.use(sender):
        assert residency.sweep(now + 1000) == []
    assert residency.sweep(time.monotonic() + 121) == [sender]
    assert list(residency.resident()) == [receiver, third]  # for ever: asked for, and never asked otherwise
    residency.keep(third, 0.0)
    assert residency.sweep() == [third]


def idle_seconds(residency: Residency, name: str) -> float:
    resident = residency.find(name)
    assert resident is not None
    return time.monotonic() - resident.idle_since


def test_a_loan_ends_the_idle_time(pair: tuple[str, str]) -> None:
    residency = Residency(None, device=CPU)
    touch(residency, pair[0])
    until(lambda: idle_seconds(residency, pair[0]) > 0.05)
    with residency.use(pair[0]):
        resident = residency.find(pair[0])
        assert resident is not None and resident.users == 1
        begun = time.monotonic()
    assert idle_seconds(residency, pair[0]) <= time.monotonic() - begun


def test_giving_back_what_was_not_lent_is_noticed(pair: tuple[str, str]) -> None:
    residency = Residency(None, device=CPU)
    touch(residency, pair[0])
    with pytest.raises(AssertionError, match="was not lent"):
        residency.release(pair[0])


@pytest.mark.parametrize("written, expected", [("24GB", 24 * 10**9), ("1.5 GiB", 3 << 29), ("1000", 1000), (7, 7)])
def test_a_budget_is_written_in_bytes(written: str | int, expected: int) -> None:
    assert budget_bytes(written, CPU) == expected


def test_a_budget_is_written_as_a_share_of_the_device() -> None:
    assert budget_bytes("0.5", CPU) == device_bytes(CPU) // 2
    assert budget_bytes("1.0", CPU) == device_bytes(CPU) <= psutil.virtual_memory().total
    assert budget_bytes(None, CPU) is None


@pytest.mark.parametrize("written", ["0.0", "1.2", "-0.5", "0", "much", "-3GB", "nan.", ""])
def test_a_budget_that_is_neither_is_refused_with_its_value(written: str) -> None:
    with pytest.raises(InvalidRequest, match=f"memory budget of '?{written}'?: expected"):
        budget_bytes(written, CPU)


def test_a_container_with_less_memory_than_the_machine_decides_what_a_share_is_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("latentwire.bridge.memory.CGROUP_LIMITS", [str(limit)])
    for said, expected in (("1000\n", 1000), ("max\n", psutil.virtual_memory().total)):
        limit.write_text(said)
        assert device_bytes(CPU) == expected


UNLOADED = """
import sys, torch
from latentwire.bridge.residency import Residency
residency = Residency(None, device=torch.device("cpu"), dtype=torch.bfloat16)  # converted while read: no mapped file
for turn in range(4):
    with residency.use(sys.argv[1]):
        weights = residency.resident_bytes
    freed = residency.unload(sys.argv[1])
    if turn:  # the first has more to give back than its own
        print(freed / weights)
"""


def test_the_bytes_that_come_back_are_measured_and_are_those_of_the_weights(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1536, vocab_size=259
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    # A process of its own: one that has done much else before has holes in its heaps that weights fall into.
    done = subprocess.run(
        [sys.executable, "-c", UNLOADED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    shares = [float(line) for line in done.stdout.splitlines()]
    assert len(shares) == 3 and all(0.9 < share < 1.1 for share in shares), shares
