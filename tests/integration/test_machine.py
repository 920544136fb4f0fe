"""Precision, recomputing, compiling, devices, memory and signals: what changes how a run computes, and not what."""

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.utils import counters
from torch.amp.grad_scaler import GradScaler
from torch.autograd.graph import saved_tensors_hooks

from latentwire.bridge.devices import DTYPES, default_device, is_out_of_memory
from latentwire.bridge.engine import answer_logits, token_losses
from latentwire.bridge.models import FrozenLM, blocks_of, load_model
from latentwire.bridge.prompt import Batch, collate, compose, layout_for
from latentwire.training import machine
from latentwire.training import prepare as preparing
from latentwire.training.machine import (
    STOPPING,
    compile_model,
    gradient_checkpointing,
    graphs,
    memory_of,
    stop_requests,
)
from latentwire.training.run import BUCKET, Run
from latentwire.training.state import Trained, load_state, save_state
from tests.conftest import FAMILIES
from tests.integration.conftest import MakeConfig
from tests.integration.runs import prepared, same, states_of, step_of, weights_of_run


def batch_of(lm: FrozenLM, *sources: int, multiple: int = 1) -> Batch:
    """Rows with so many soft tokens each, a prompt and an answer."""
    layout = layout_for(lm, "{latent}")
    rows = [compose(lm, layout, "{latent}\nWho?", latent=slots, answer=" Mara, twice") for slots in sources]
    return collate(rows, side="left", multiple=multiple)


def loss_of(lm: FrozenLM, soft: Tensor, batch: Batch, *, multiple: int = 1) -> Tensor:
    return token_losses(*answer_logits(lm, batch, soft, multiple=multiple)).sum()


def soft_tokens(lm: FrozenLM, rows: int, slots: int) -> Tensor:
    torch.manual_seed(0)
    return (torch.randn(rows, slots, lm.width) * lm.embedding_rms()).requires_grad_()


def stored(lm: FrozenLM, batch: Batch, slots: int) -> tuple[int, Tensor, Tensor]:
    """Bytes kept for the backward pass, weights left out; the loss; the gradient of the soft tokens."""
    weights = {p.untyped_storage().data_ptr() for p in lm.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    soft = soft_tokens(lm, len(batch.ids), slots)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(lm, soft, batch)
    (gradient,) = torch.autograd.grad(loss, soft)
    return sum(kept.values()), loss.detach(), gradient


@pytest.mark.parametrize("family", list(FAMILIES))
def test_recomputed_blocks_give_the_same_bits_and_keep_fewer_bytes(
    model_folders: dict[str, Path], lms: dict[str, FrozenLM], family: str
) -> None:
    plain, again = lms[family], gradient_checkpointing(load_model(str(model_folders[family])))
    batch = batch_of(plain, 12, 7, 3)
    many, loss, gradient = stored(plain, batch, 12)
    few, loss_again, gradient_again = stored(again, batch, 12)
    assert torch.equal(loss, loss_again) and torch.equal(gradient, gradient_again)
    assert bool(gradient.any()) and few < many / 2
    assert not any(module.training for module in again.model.modules()), "dropout stays off"
    assert torch.equal(stored(again, batch, 12)[1], loss)


def test_a_run_that_recomputes_has_the_weights_of_one_that_does_not(make: MakeConfig) -> None:
    runs = [prepared(make(gradient_checkpointing=flag, kd_weight=0.5)) for flag in (False, True)]
    for run in runs:
        for step in range(1, 5):
            step_of(run, step)
    assert same(weights_of_run(runs[0]), weights_of_run(runs[1]))
    forwards = [blocks_of(lm_of(run))[0].forward.__name__ for run in runs]
    assert forwards[0] != forwards[1], "the second run did recompute"


def lm_of(run: Run) -> FrozenLM:
    with run.residency.use(run.config.receiver[0]) as lm:
        return lm


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_frozen_models_compute_in_half_precision_and_the_bridge_in_full(make: MakeConfig, precision: str) -> None:
    run = prepared(make(precision=precision, alignment_steps=1))
    before = weights_of_run(run)
    if precision == "fp16":
        run.scaler = GradScaler("cpu", init_scale=64.0)
    records = [step_of(run, step) for step in range(3)]
    assert all(np.isfinite(record.loss) and not record.refused for record in records)
    assert all(not torch.equal(a, b) for a, b in zip(before, weights_of_run(run), strict=True))
    assert {p.dtype for p in run.parameters} == {torch.float32}
    for name in (run.config.sender, run.config.receiver[0]):
        with run.residency.use(name) as lm:
            assert lm.model.dtype == DTYPES[precision]
            fresh = load_model(name, dtype=DTYPES[precision])
            assert all(
                torch.equal(p, q) and p.dtype == DTYPES[precision] and p.grad is None and not p.requires_grad
                for p, q in zip(lm.model.parameters(), fresh.model.parameters(), strict=True)
            )


def test_half_precision_answers_nearly_as_full_precision_does(make: MakeConfig) -> None:
    half, full = (prepared(make(precision=precision, alignment_steps=0)) for precision in ("bf16", "fp32"))
    one, other = step_of(half, 0), step_of(full, 0)
    assert one.loss == pytest.approx(other.loss, rel=0.05) and one.loss != other.loss


def trained_of(run: Run) -> Trained:
    return Trained(run.parameters, run.optimizers, run.scaler)


def test_an_overflow_is_refused_and_halves_the_scale_which_a_state_keeps(make: MakeConfig) -> None:
    config = make(precision="fp16", alignment_steps=0)
    run = prepared(config)
    assert run.scaler.is_enabled()
    run.scaler = GradScaler("cpu", init_scale=2.0**100)
    before = weights_of_run(run)
    record = step_of(run, 0)
    assert record.refused and not np.isfinite(record.gradient_norm)
    assert same(before, weights_of_run(run)) and run.scaler.get_scale() == 2.0**99

    run.scaler.update(64.0)
    assert not step_of(run, 1).refused and run.scaler.state_dict()["_growth_tracker"] == 1
    config.out.mkdir()
    save_state(config.out, run.identity, 2, trained_of(run))
    (name,) = states_of(config.out)
    assert json.loads((config.out / name).read_bytes())["scaler"]["scale"] == 64.0
    other = prepared(config)
    assert other.scaler.get_scale() != 64.0
    load_state(config.out, other.identity, trained_of(other))
    assert other.scaler.state_dict() == run.scaler.state_dict()
    assert step_of(other, 2).loss == step_of(run, 2).loss
    assert same(weights_of_run(other), weights_of_run(run))


def test_a_scale_changes_no_gradient(make: MakeConfig) -> None:
    norms = []
    for scale in (1.0, 4096.0):
        run = prepared(make(alignment_steps=0))
        run.scaler = GradScaler("cpu", init_scale=scale)
        norms.append(step_of(run, 0).gradient_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_full_precision_needs_no_scale(make: MakeConfig) -> None:
    run = prepared(make(precision="bf16"))
    assert not run.scaler.is_enabled() and run.scaler.state_dict() == {}


# The compiler looks at every tensor's .grad and hides the warning in a way that does not hold where one is an error.
GRAD_OF_A_NON_LEAF = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A compiler that needs no C++ one, and no graphs from before."""
    monkeypatch.setattr(machine, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=1):  # and what it was before comes back after
        yield
    torch._dynamo.reset()
    counters.clear()


@GRAD_OF_A_NON_LEAF
@pytest.mark.usefixtures("compiler")
def test_a_compiled_receiver_says_the_same_with_one_graph_per_padded_length(
    model_folders: dict[str, Path], lms: dict[str, FrozenLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "GRAPHS", 2)
    plain, compiled = lms["llama"], compile_model(load_model(str(model_folders["llama"])))
    assert graphs() == 0
    made = []
    for slots in (5, 20, 70, 80, 140):  # padded to 64, 64, 128, 128, 192
        batch, soft = batch_of(plain, slots, 3, multiple=BUCKET), soft_tokens(plain, 2, slots)
        assert batch.ids.shape[1] % BUCKET == 0
        wanted, found = loss_of(plain, soft, batch), loss_of(compiled, soft, batch, multiple=BUCKET)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        gradients = [torch.autograd.grad(loss, soft)[0] for loss in (wanted, found)]
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)
        made.append(graphs())
    assert made[3] == made[2] > made[1] == made[0] > 0
    assert made[4] == made[3], "beyond the limit it runs as it is"


@GRAD_OF_A_NON_LEAF
@pytest.mark.usefixtures("compiler")
def test_a_compiled_run_has_the_losses_of_one_that_is_not(make: MakeConfig) -> None:
    compiled, plain = (prepared(make(compile=flag, alignment_steps=1)) for flag in (True, False))
    for step in range(3):
        one, other = step_of(compiled, step), step_of(plain, step)
        assert one.loss == pytest.approx(other.loss, rel=1e-3)
    assert 0 < graphs() <= machine.GRAPHS


@pytest.fixture
def fresh_device() -> Iterator[None]:
    """Nothing remembered about the device, before and after."""
    default_device.cache_clear()
    yield
    default_device.cache_clear()


@pytest.mark.usefixtures("fresh_device")
def test_an_accelerator_that_cannot_compute_attention_is_left_alone_with_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("mps"))
    with caplog.at_level(logging.WARNING):
        assert [default_device().type for _ in range(3)] == ["cpu"] * 3
    (record,) = caplog.records
    assert "MPS cannot be used" in record.getMessage() and "\n" not in record.getMessage()


@pytest.mark.usefixtures("fresh_device")
def test_an_accelerator_that_computes_what_is_needed_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("mps"))
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, device, **named: randn(*shape, **named))  # on one that works
    assert default_device() == torch.device("mps") and not caplog.records


def test_memory_is_what_this_process_holds() -> None:
    before = memory_of(torch.device("cpu"))
    block = torch.ones(32 << 20)
    after = memory_of(torch.device("cpu"))
    assert after.allocated_bytes - before.allocated_bytes > block.nbytes * 0.8
    assert after.device_bytes == before.device_bytes == psutil.virtual_memory().total
    assert after.peak_bytes >= before.peak_bytes and after.peak_bytes >= block.nbytes
    assert after.reserved_bytes == after.allocated_bytes < after.device_bytes and after.inactive_bytes == 0


def error_of(call: Any) -> BaseException:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        call()
    return caught.value


def test_a_real_lack_of_memory_is_known_for_what_it_is() -> None:
    assert is_out_of_memory(error_of(lambda: torch.empty(1 << 55)))
    assert is_out_of_memory(error_of(lambda: np.empty(1 << 60, dtype=np.uint8)))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))


def test_other_errors_are_no_lack_of_memory() -> None:
    assert not is_out_of_memory(error_of(lambda: torch.zeros(2) @ torch.zeros(3)))
    assert not is_out_of_memory(ValueError("memory"))


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: signal.Signals(number).name)
def test_a_request_to_stop_is_noted_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in STOPPING}
    with stop_requests() as asked:
        assert asked.name is None
        os.kill(os.getpid(), number)
        assert asked.name == number.name
    assert {each: signal.getsignal(each) for each in STOPPING} == before


def test_handlers_come_back_after_a_failure_as_well() -> None:
    before = {each: signal.getsignal(each) for each in STOPPING}
    with pytest.raises(ValueError, match="failed"), stop_requests():
        raise ValueError("failed")
    assert {each: signal.getsignal(each) for each in STOPPING} == before


def test_beside_the_main_thread_signals_are_left_alone() -> None:
    before = {each: signal.getsignal(each) for each in STOPPING}
    seen: list[object] = []

    def inside() -> None:
        with stop_requests() as asked:
            seen.extend([asked.name, {each: signal.getsignal(each) for each in STOPPING} == before])

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [None, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_loss_is_scaled_where_models_compute_in_half_precision_without_being_told(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(preparing, "dtype_named", lambda _precision, _device: dtype)
    assert prepared(make()).scaler.is_enabled() == (dtype == torch.float16)
