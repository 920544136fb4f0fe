"""The default learning rates suit models of any width: a run learns from its first steps, and nothing alarms."""

from pathlib import Path
from statistics import fmean

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from latentwire.training import loop
from tests.conftest import byte_tokenizer
from tests.integration.conftest import MakeConfig
from tests.integration.runs import events_of, log_of, quiet

STEPS = 21  # one more than the steps of two windows of the gradient alarm


def write_wide(folder: Path, width: int, seed: int) -> str:
    """A random model as wide as a real one, and otherwise small."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **heads)).save_pretrained(folder)
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
