"""Models take turns in a budget too small for both, and the one that left is really gone."""

import gc
import weakref
from pathlib import Path

import pytest
import torch

from bridge.errors import InsufficientMemory, ModelUnavailable
from bridge.models import predicted_bytes
from bridge.residency import Residency
from tests.conftest import write_model


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
    from bridge.models import FrozenLM, load_model

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
    from bridge.models import FrozenLM, load_model

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


def test_history_is_bounded(pair: tuple[str, str]) -> None:
    residency = Residency(None, device=torch.device("cpu"))
    for i in range(300):
        residency._note("load", str(i))
    assert len(residency.history) == 256 and residency.history[-1][1] == "299"
