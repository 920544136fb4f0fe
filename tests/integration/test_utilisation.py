"""What a step needs in arithmetic, against what torch counts while it runs."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from latentwire.bridge.evaluation.tasks import Example
from latentwire.bridge.models import FrozenLM, hidden_states
from latentwire.bridge.prompt import IGNORE, TEXT, Row, collate
from latentwire.training import step as stepping
from latentwire.training.said import say
from latentwire.training.utilisation import bridge_flops, peak_flops, peak_of, receiver_flops, sender_flops
from tests.integration.conftest import MakeConfig
from tests.integration.runs import measured, prepared, receiver_of, tokens_of

SLOTS = 4
ROWS = [Row([7] * 40, [*range(SLOTS), *[TEXT] * 36], [IGNORE] * 28 + [5] * 12)] * 3
MATRICES = {torch.ops.aten.mm, torch.ops.aten.addmm}


def counted(mode: FlopCounterMode) -> int:
    """Operations of products with weights; those of attention are left out."""
    return sum(count for operator, count in mode.get_flop_counts()["Global"].items() if operator in MATRICES)


@pytest.mark.parametrize("family", ["llama", "neox", "gpt2"])
@pytest.mark.parametrize("gradient", [True, False])
def test_a_receivers_share_is_what_its_products_take(lms: dict[str, FrozenLM], family: str, gradient: bool) -> None:
    lm = lms[family]
    soft = torch.randn(3, SLOTS, lm.width, requires_grad=gradient)
    with FlopCounterMode(display=False) as mode, torch.set_grad_enabled(gradient):
        losses = say(lm, collate(ROWS, side="left"), soft).losses
        if gradient:
            losses.sum().backward()  # type: ignore[no-untyped-call]
    # Norms and biases are counted as weights, and the first answer token's own column is one more.
    assert receiver_flops(lm, ROWS, gradient=gradient) == pytest.approx(counted(mode), rel=0.08)


def test_a_senders_share_ends_at_the_layer_read(lms: dict[str, FrozenLM]) -> None:
    lm, ids = lms["neox"], torch.ones(2, 20, dtype=torch.long)
    for layers in ((1,), (1, 3)):
        with FlopCounterMode(display=False) as mode:
            hidden_states(lm, ids, ids.bool(), layers)
        assert sender_flops(lm, 40, layers, trained=False) == pytest.approx(counted(mode), rel=0.08)
    assert sender_flops(lm, 40, (1,), trained=True) == 2 * sender_flops(lm, 40, (1,), trained=False)


def test_a_step_logs_what_its_passes_need_over_its_seconds_and_on_a_cpu_no_share_of_a_peak(make: MakeConfig) -> None:
    run = prepared(make(alignment_steps=0, kd_weight=1.0))
    lm, rows = receiver_of(run), tokens_of(run, [Example("Mara sings.", "{latent} Who?", " Mara")] * 2)
    record, _ = measured(run, rows, probe_every=0)
    head = run.bridge.head(lm.name)
    slots = sum(max(row.answer.slots) + 1 for row in rows)
    with run.residency.use(run.config.sender) as sender:
        tokens = sum(len(row.source.ids) for row in rows)
        read = sender_flops(sender, tokens, run.bridge.config.layers, trained=False)
    needed = (
        read
        + bridge_flops([run.bridge.encoder, head], slots)
        + receiver_flops(lm, [row.answer for row in rows], gradient=True)
        + receiver_flops(lm, [row.teacher for row in rows if row.teacher], gradient=False)
    )
    assert record.flops_per_second * record.seconds == pytest.approx(needed) and record.mfu is None


def test_on_a_device_whose_peak_is_known_a_step_logs_its_share(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(make(alignment_steps=0))
    rows = tokens_of(run, [Example("Mara sings.", "{latent} Who?", " Mara")])
    monkeypatch.setattr(stepping, "peak_flops", lambda _: 1e12)
    record, _ = measured(run, rows)
    assert record.mfu == pytest.approx(record.flops_per_second / 1e12)


@pytest.mark.parametrize(
    "name, wanted",
    [("NVIDIA H200", 989.4), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA L40S", 362.0),
     ("NVIDIA L4", 121.0), ("NVIDIA A10G", 70.0), ("Some GPU", None)],
)  # fmt: skip
def test_a_peak_is_known_by_the_devices_name(name: str, wanted: Any) -> None:
    assert peak_of(name) == (None if wanted is None else pytest.approx(wanted * 1e12))


def test_a_cpu_has_no_peak_to_be_held_against() -> None:
    assert peak_flops(torch.device("cpu")) is None
