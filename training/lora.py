"""A receiver fine-tuned for the task that reads the source: what as many trained weights buy without a bridge.

The receiver of everything else stays as it is: what is trained here is a copy.
"""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.optim import AdamW
from transformers.pytorch_utils import Conv1D

from latentwire.bridge.engine import answer_logits
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.prompt import collate
from latentwire.training.data import chunks
from latentwire.training.objectives import answer_loss
from latentwire.training.prepare import sampler_of
from latentwire.training.run import Run
from latentwire.training.step import schedule

LEARNING_RATE = 1e-3
ALPHA = 32


def tuned_receiver(run: Run, receiver: FrozenLM, weights: int, progress: Callable[[int, int], None]) -> FrozenLM:
    """A copy of the receiver with LoRA of about ``weights`` trained weights, after all steps of the run.

    Each step reads the examples that the bridge's step reads, source and answer as text, with the run's warm-up, cosine
    and largest gradient norm.

    Source: Hu et al. 2021, arXiv:2106.09685 §4; on every linear layer and with this rate and alpha, which suit any
    rank: Schulman et al. 2025, "LoRA without regret".
    """
    lm = replace(receiver, model=copy.deepcopy(receiver.model))
    torch.manual_seed(run.config.seed)
    config = LoraConfig(
        r=rank_for(lm.model, weights), lora_alpha=ALPHA, target_modules="all-linear",
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in lm.model.modules()),
    )  # fmt: skip
    inject_adapter_in_model(config, lm.model)
    trained = [weight for name, weight in lm.model.named_parameters() if "lora_" in name]
    for weight in lm.model.parameters():
        weight.requires_grad_(False)
    for weight in trained:
        weight.requires_grad_(True)
    optimizer = AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    sampler = sampler_of(run)
    for step in range(run.config.max_steps):
        rows = [run.sample(receiver.name, i).teacher for i in sampler.batch(step)]
        for part in chunks([row for row in rows if row is not None], run.micro_batch):
            batch = collate(part, side="left").to(lm.device)
            loss = answer_loss(*answer_logits(lm, batch, None)).sum() / len(rows)
            torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(trained, run.config.clip_norm)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * schedule(run.config, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress(step + 1, run.config.max_steps)
    for weight in trained:
        weight.requires_grad_(False)
    return lm


def rank_for(model: nn.Module, weights: int) -> int:
    """The rank at which LoRA on every linear layer but the output has about so many weights; at least 1."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | Conv1D) and layer is not head]
    return max(1, round(weights / sum(sum(layer.weight.shape) for layer in layers)))
