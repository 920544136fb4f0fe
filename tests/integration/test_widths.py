"""The default learning rates suit models of any width: a run learns from its first steps, and nothing alarms."""

from pathlib import Path
from statistics import fmean

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from latentwire.training import loop
from latentwire.training.alarms import PROBES, WINDOW
from latentwire.training.config import TrainConfig
from tests.conftest import byte_tokenizer
from tests.integration.conftest import MakeConfig
from tests.integration.runs import events_of, log_of, quiet, task_of

WORDS = ["red", "blue", "green", "gold", "pink", "grey", "black", "white"]
SHAPE = ("hidden_dim", "latent_dim", "head_dim", "depth", "ratio", "warmup_steps", "alignment_steps")
STEPS = 21  # one more than the steps of two windows of the gradient alarm


def write_wide(folder: Path, width: int, seed: int, spread: float = 0.02) -> str:
    """A random model as wide as a real one, and otherwise small; ``spread`` is the deviation of its weights."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    drawn = {"vocab_size": len(tokenizer), "initializer_range": spread}
    LlamaForCausalLM(LlamaConfig(**drawn, **shape, **heads)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("width", [64, 512, 4096])
def test_a_run_learns_from_its_first_steps_whatever_the_width(width: int, tmp_path: Path, make: MakeConfig) -> None:
    inside = {"hidden_dim": 32, "latent_dim": 32, "head_dim": 32}  # what is under test is the width of the models
    config = make(
        sender=write_wide(tmp_path / "a", width, 1), receiver=write_wide(tmp_path / "b", width, 2), max_steps=STEPS,
        alignment_steps=0, warmup_steps=20, max_source_tokens=24, batch_size=8, save_every=99,
        **inside,
    )  # fmt: skip
    loop.train(config, quiet())
    losses = [record["loss"] for record in log_of(config.out)]
    assert fmean(losses[:7]) > fmean(losses[7:14]) > fmean(losses[14:])
    assert events_of(config.out, "alarm") == []


def test_a_run_of_the_default_shape_learns_all_along_and_nothing_alarms_once_the_windows_are_full(
    tmp_path: Path, make: MakeConfig
) -> None:
    task = task_of(tmp_path, *((f"The {word} one.", "Which?", f" {word}") for word in WORDS))
    by_default = {name: TrainConfig.model_fields[name].default for name in SHAPE}
    # At a spread of .02 a random receiver is deaf: no latent moves its answer by .001 nat, and two alarms say so.
    config = make(
        sender=write_wide(tmp_path / "a", 64, 1), receiver=write_wide(tmp_path / "b", 64, 2, spread=0.15), task=task,
        max_steps=120, batch_size=8, save_every=999, max_source_tokens=24, probe_every=2, **by_default,
    )  # fmt: skip
    loop.train(config, quiet())
    records = log_of(config.out)
    judged = [one for one in records if one["phase"] == "answer"][config.warmup_steps :]
    assert len(judged) >= WINDOW and len([one for one in judged if one["delta_nats"] is not None]) >= PROBES
    for phase in ("align", "answer"):
        losses = [one["loss"] for one in records if one["phase"] == phase]
        third = len(losses) // 3
        assert fmean(losses[:third]) > fmean(losses[third : 2 * third]) > fmean(losses[2 * third :]), phase
    assert events_of(config.out, "alarm") == []
