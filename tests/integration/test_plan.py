"""The plan against the step it predicts: real tensors, full depth, and every family."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig

from latentwire.bridge.errors import ModelUnavailable
from latentwire.training import prepare as preparing
from latentwire.training import simulate
from latentwire.training.config import TrainConfig
from latentwire.training.plan import USABLE, Plan, largest_batch, plan, table
from latentwire.training.prepare import prepare
from latentwire.training.simulate import Ledger, Lengths, tokens_of
from latentwire.training.step import take_step

LENGTHS = {"source_tokens": 40, "prompt_tokens": 6, "answer_tokens": 5}
DEVICE = 10**9
LEAN = {"depth": 0, "reconstruction_weight": 0.0, "probe_every": 0}  # few operations, where they do not matter


def config_of(sender: Path | str, receiver: Path | str, out: Path, **settings: Any) -> TrainConfig:
    wanted = {"sender": str(sender), "receiver": str(receiver), "task": "world", "out": out, "precision": "fp32",
              "batch_size": 4, "alignment_steps": 0, "probe_every": 1, "max_source_tokens": 64,
              "validate_every": 0, **settings}  # fmt: skip
    return TrainConfig.model_validate(wanted)


def write_llama(folder: Path, **shape: Any) -> Path:
    """Only a configuration: there is no weight to read."""
    small = {"hidden_size": 64, "num_hidden_layers": 9, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 96, "vocab_size": 500, "max_position_embeddings": 4096}  # fmt: skip
    LlamaConfig(architectures=["LlamaForCausalLM"], **{**small, **shape}).save_pretrained(folder)
    return folder


class Watched(Ledger):
    """The same ledger on tensors that exist, with the most it ever held."""

    peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"gradient_checkpointing": True}),
        ("gpt2", {"encoder": "hybrid", "layer": [1, 3], "layer_mix": True, "alignment_weight": 1.0}),
        ("gpt2", {"sender_lora": 3, "layer": [1, 3]}),
        ("mistral", {"kd_weight": 1.0, "margin_weight": 1.0}),
    ],
)
def test_the_plan_is_what_a_real_step_holds(
    model_folders: dict[str, Path],
    tmp_path: Path,
    family: str,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preparing, "CHECKED", 1)
    config = config_of(model_folders["neox"], model_folders[family], tmp_path, **settings)
    run = prepare(config, Console(quiet=True))
    rows = [tokens_of(run, Lengths(40, 6, 5), i) for i in range(config.batch_size)]
    take_step(run, 0, rows)  # the optimisers' state exists from here on
    with Watched() as ledger:
        for name in (config.sender, *config.receivers):
            with run.residency.use(name) as lm:
                for tensor in (*lm.model.parameters(), *lm.model.buffers()):
                    ledger.hold(tensor, "weights")
        for p in run.parameters:
            ledger.hold(p, "trained")
        for state in [s for optimizer in run.optimizers for s in optimizer.state.values()]:
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    ledger.hold(value, "state")
        take_step(run, 0, rows)
    assert plan(config, **LENGTHS).peak_bytes() == pytest.approx(ledger.peak, rel=0.03)


def test_few_blocks_stand_exactly_for_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sender, receiver = write_llama(tmp_path / "a"), write_llama(tmp_path / "b", vocab_size=700)
    config = config_of(sender, receiver, tmp_path, **LEAN | {"gradient_checkpointing": True, "kd_weight": 1.0})
    short = plan(config, **LENGTHS)
    monkeypatch.setattr(simulate, "DEPTHS", (99, 99))  # deeper than the model: every block runs
    whole = plan(config, **LENGTHS)
    assert [short.peak_bytes(rows) for rows in (1, 4, 64)] == [whole.peak_bytes(rows) for rows in (1, 4, 64)]


def test_a_mix_of_layers_is_planned_from_kept_states_and_weighs_less_than_all_of_them(tmp_path: Path) -> None:
    sender, receiver = write_llama(tmp_path / "a"), write_llama(tmp_path / "b", vocab_size=700)
    several = LEAN | {"layer": [1, 3], "cache_features": True}
    beside, mixed = (
        plan(config_of(sender, receiver, tmp_path, **several, layer_mix=mix), **LENGTHS) for mix in (False, True)
    )
    less = beside.fullest(4)[simulate.TRAINED][0] - mixed.fullest(4)[simulate.TRAINED][0]
    assert less == 4 * (64 * (4 * 64 + 2) - 3)  # what reads 4 states and what normalises one, half as wide; the mix


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan with its alternatives."""
    root = tmp_path_factory.mktemp("planned")
    sender, receiver = write_llama(root / "a"), write_llama(root / "b", vocab_size=700)
    return plan(config_of(sender, receiver, root, **LEAN), **LENGTHS, device_bytes=DEVICE, compare=True)


def test_no_weight_costs_anything_per_row(made: Plan) -> None:
    recomputed = made.others["with --gradient-checkpointing"]
    for moment in (*made.moments, *recomputed.moments):
        for part in (simulate.SENDER, simulate.RECEIVER, simulate.TRAINED):
            assert moment[part][0] > 0 and moment[part][1] == 0, part


def test_the_largest_batch_fits_and_one_more_row_does_not(made: Plan) -> None:
    for budget in (made.peak_bytes(1), made.peak_bytes(7), made.peak_bytes(300) + 1):
        most = largest_batch(made, budget)
        assert made.peak_bytes(most) <= budget < made.peak_bytes(most + 1)
    assert largest_batch(made, made.peak_bytes(1) - 1) == 0


def test_settings_that_save_memory_let_more_rows_fit(made: Plan) -> None:
    fits = {name: largest_batch(other, DEVICE) for name, other in made.others.items()}
    assert fits["with --gradient-checkpointing"] > largest_batch(made, DEVICE)
    assert fits["with --cache-features"] >= largest_batch(made, DEVICE) >= fits["with distillation"]


def test_the_table_shows_each_part_and_what_would_fit(made: Plan) -> None:
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(table(made))
    shown = console.export_text()
    assert "receiver weights" in shown and ": fits" in shown
    for name, other in made.others.items():
        assert re.search(rf"{re.escape(name)} .* {largest_batch(other, int(USABLE * DEVICE))} ", shown), name


def test_a_run_with_mode_tokens_and_a_second_objective_is_planned(tmp_path: Path) -> None:
    plain, more = (
        plan(
            config_of("builtin:neox", "builtin:llama", tmp_path, mode_tokens=count, reconstruction_weight=0.5),
            **LENGTHS,
        ).peak_bytes()
        for count in (0, 4)
    )
    assert more > plain


def test_a_folder_that_holds_no_causal_model_is_named(tmp_path: Path) -> None:
    receiver = write_llama(tmp_path / "b")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelUnavailable, match="cannot be planned"):
        plan(config_of(tmp_path / "a", receiver, tmp_path), **LENGTHS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_run_for_a_gpu_is_planned_where_there_is_none(tmp_path: Path) -> None:
    sender, receiver = write_llama(tmp_path / "a"), write_llama(tmp_path / "b", vocab_size=700)
    peak = {
        (device, precision): plan(
            config_of(sender, receiver, tmp_path, **LEAN, device=device, precision=precision), **LENGTHS
        ).peak_bytes()
        for device, precision in (("cuda", None), ("cpu", "bf16"), ("cpu", None))
    }
    assert peak["cuda", None] == peak["cpu", "bf16"] < peak["cpu", None]
