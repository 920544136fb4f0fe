"""What a bridge is trained for. Small pure functions; each row's loss is its own, whatever its batch.

The exceptions say so: ``diversity_loss`` and ``margin_loss`` compare rows on purpose.

Dimensions used in this file:
    B batch    K slots    D receiver width    A answer columns    V vocabulary
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from latentwire.bridge.engine import following, token_losses
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.prompt import IGNORE
from latentwire.training.config import TrainConfig
from latentwire.training.run import Forward, Phase
from latentwire.training.said import Said

Logits = Float[Tensor, "B A V"]
Labels = Int[Tensor, "B A"]
Losses = Float[Tensor, " B"]


def answer_loss(logits: Logits, labels: Labels, *, first_token_weight: float = 1.0) -> Losses:
    """Cross-entropy of each row's answer in nats per token, its first token weighted.

    The first token is where a bridge is needed most: later ones lean on the answer so far, and a bridge that
    fails there leaves the receiver guessing. 8 to 11 worked in one published system, 12 and above collapsed.
    A row without labels has loss 0.

    Args:
        logits: From ``engine.answer_logits``.
        labels: Unshifted; ``token_losses`` shifts them.
        first_token_weight: The other tokens have 1.
    """
    return _weighted(token_losses(logits, labels), labels, first_token_weight)


def _weighted(losses: Float[Tensor, "B N"], labels: Labels, first_token_weight: float) -> Losses:
    weights = answer_mask(labels).to(torch.float32)
    return _mean(losses, torch.where(_ordinal(labels) == 1, first_token_weight, weights))


def said_loss(said: Said, *, first_token_weight: float = 1.0) -> Losses:
    """``answer_loss`` of what was said, without all of its logits."""
    return _weighted(said.losses, said.labels, first_token_weight)


def first_k_loss(logits: Logits, labels: Labels, *, k: int) -> Losses:
    """Cross-entropy of the first ``k`` tokens of each row's answer, nats per token; a row without labels has 0.

    What the answer's start cannot say the rest of it mostly repeats: all weight goes where the latent decides.
    Source: ours, swept over k in ``benchmarks/results/first-k-*.json``.
    """
    return _first_k(token_losses(logits, labels), labels, k)


def _first_k(losses: Float[Tensor, "B N"], labels: Labels, k: int) -> Losses:
    return _mean(losses, (answer_mask(labels) & (_ordinal(labels) <= k)).to(torch.float32))


def distillation_loss(logits: Logits, teacher: Logits, labels: Labels) -> Losses:
    """KL(teacher ‖ student) in nats per answer token; the teacher is the same receiver reading the source.

    Both logits stand at the answer's columns only.
    Source: Hinton et al. 2015, arXiv:1503.02531 §2, at temperature 1; for soft tokens PISCO, arXiv:2501.16075 §3.
    """
    mask = answer_mask(labels)
    return _mean(divergence(logits[:, :-1], teacher[:, :-1], mask), mask.to(torch.float32))


def divergence(logits: Logits, teacher: Logits, mask: Bool[Tensor, "B A"]) -> Float[Tensor, "B A"]:
    """KL(teacher ‖ student) of each column in nats; 0 outside the mask, where a row of padding may hold anything."""
    student, wanted = logits.float().log_softmax(dim=-1), teacher.float().log_softmax(dim=-1)
    return F.kl_div(student, wanted, log_target=True, reduction="none").sum(dim=-1).masked_fill(~mask, 0.0)


def margin_loss(matched: Losses, mismatched: Losses, *, margin: float) -> Losses:
    """max(0, margin + matched - mismatched): another example's latent must be worse by ``margin`` nats.

    Keeps the channel open: a receiver that ignores the latent pays the whole margin.
    Source: the mismatch margin of Interlat, arXiv:2511.09149 §3.2.
    """
    return F.relu(margin + matched - mismatched)


def diversity_loss(first: Float[Tensor, "B V"]) -> Losses:
    """-KL(row's first-token distribution ‖ the batch's mean): 0 when all rows say the same, at least -log B.

    ``first`` holds logits. The loss's mean is minus the mutual information between example and first token, so it
    rewards answers that differ from example to example and not answers that are merely unsure.
    Source: Krause et al. 2010, "Discriminative clustering by regularized information maximization" §2.
    """
    log_p = first.float().log_softmax(dim=-1)
    mean = log_p.logsumexp(dim=0, keepdim=True) - torch.log(torch.tensor(float(len(first)), device=first.device))
    return -(log_p.exp() * (log_p - mean)).sum(dim=-1)


def alignment_loss(
    soft_tokens: Float[Tensor, "B K D"], words: Float[Tensor, "B K D"], covered: Bool[Tensor, "B K"]
) -> Losses:
    """1 - cosine between each soft token and the words its window covers, averaged over a row's windows.

    A warm start. A frozen receiver answers to random soft tokens with noise, and the gradient that comes back
    through it is nearly useless: on the world task 200 steps of answering alone stay at the base rate, while 150
    steps of this first and 150 of answering reach 0.8. It needs no pass of the receiver. Source: ours.
    """
    far = 1 - F.cosine_similarity(soft_tokens, words, dim=-1)
    return (far * covered).sum(dim=1) / covered.sum(dim=1).clamp(min=1)


def word_targets(
    receiver: FrozenLM, words: Sequence[Sequence[tuple[int, int]]]
) -> tuple[Float[Tensor, "B K D"], Bool[Tensor, "B K"]]:
    """What the windows of each source hold, in the receiver's own embedding: the sum of the tokens that end there.

    ``words`` holds, for each row, pairs (window, receiver token). A window in which none ends is False in the mask.
    """
    K = 1 + max((slot for row in words for slot, _ in row), default=0)
    total = torch.zeros(len(words), K, receiver.width, device=receiver.device)
    count = torch.zeros(len(words), K, device=receiver.device)
    for i, row in enumerate(words):
        slots = torch.tensor([slot for slot, _ in row], dtype=torch.long, device=receiver.device)
        tokens = torch.tensor([token for _, token in row], dtype=torch.long, device=receiver.device)
        total[i].index_add_(0, slots, receiver.embed(tokens).detach().float())
        count[i].index_add_(0, slots, torch.ones(len(row), device=receiver.device))
    return total, count > 0


def answers_right(likeliest: Int[Tensor, "B N"], labels: Labels) -> Losses:
    """1 for each row whose every labelled token is the likeliest one, else 0; a measure, not an objective."""
    wrong = (likeliest != labels[:, 1:]) & answer_mask(labels)
    return (~wrong.any(dim=1)).float()


def first_logits(logits: Logits, labels: Labels) -> tuple[Float[Tensor, "B V"], Int[Tensor, " B"]]:
    """Logits of each row's first answer token and the token wanted there; a row without labels wants ``IGNORE``.

    Of states, in place of logits, the states there.
    """
    at = answer_mask(labels).int().argmax(dim=1)
    rows = torch.arange(len(labels), device=labels.device)
    return logits[rows, at], labels[rows, at + 1]


def first_said(said: Said) -> tuple[Float[Tensor, "B V"], Int[Tensor, " B"]]:
    """``first_logits`` of what was said, of which no others are made."""
    states, wanted = first_logits(said.states, said.labels)
    return said.output(states[:, None])[:, 0], wanted


def answer_mask(labels: Labels) -> Bool[Tensor, "B A-1"]:
    """Columns of ``token_losses`` that stand for a labelled token."""
    return labels[:, 1:] != IGNORE


def _ordinal(labels: Labels) -> Int[Tensor, "B A-1"]:
    """1 at each row's first labelled token, 2 at its second, …; 0 where nothing is labelled."""
    mask = answer_mask(labels)
    return mask.long().cumsum(dim=1) * mask


def _mean(losses: Float[Tensor, "B N"], weights: Float[Tensor, "B N"]) -> Losses:
    return (losses * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-8)


Need = Literal["soft", "answers", "others", "text"]
NEEDS: tuple[Need, ...] = get_args(Need)  # in the order in which they are read, which is that of sums of gradients


@dataclass(frozen=True)
class Objective:
    """Something a bridge is trained for.

    Attributes:
        name: Of its loss in the logs. Its weight is the setting ``NAME_weight``: it is on where that is above 0.
        needs: What is read for it: the soft tokens alone, the answers, the answers from ``others``' latents (of which
            there must be some), or a text of its own, which mode tokens tell from answering.
        loss: One loss per row.
        taught: Whether ``Forward.teacher`` is read for it.
    """

    name: str
    needs: Need
    loss: Callable[[Forward], Losses]
    taught: bool = False


def weights_of(config: TrainConfig, phase: Phase) -> dict[str, float]:
    """Weight of each objective that is on; the warm start has one."""
    if phase == "align":
        return {"alignment": 1.0}
    return {name: weight for name in OBJECTIVES if (weight := getattr(config, f"{name}_weight")) > 0}


def _distillation(forward: Forward) -> Losses:
    assert forward.teacher is not None
    A = min(forward.teacher.labels.shape[1], forward.said.labels.shape[1])
    teacher, said = forward.teacher.last(A), forward.said.last(A)
    mask = following(said.labels) != IGNORE
    apart = said.each(lambda logits, at: divergence(logits, teacher.output(teacher.states[:, at]), mask[:, at]))
    return _mean(apart, mask.to(torch.float32))


def _continuation(forward: Forward) -> Losses:
    """A causal sender's states of the first half are those of the whole source's first half."""
    mask = forward.states[1]
    half = torch.tensor([row.half for row in forward.rows], device=mask.device)
    first = mask & (torch.arange(mask.shape[1], device=mask.device) < half[:, None])
    return said_loss(forward.read_mode("continuation", *forward.encode(first)))


def _margin(forward: Forward) -> Losses:
    """The margin to the latent of the row before; Δ = loss(mismatched) - loss(matched) is noted on the way."""
    config, rows, (soft, slots), alone = forward.run.config, forward.rows, forward.soft, forward.alone
    answers = [row.answer.with_slots(slots[i - 1]) for i, row in enumerate(rows)]
    with torch.set_grad_enabled(config.margin_weight > 0):
        mismatched = said_loss(forward.read(answers, soft.roll(1, dims=0)))
        matched = said_loss(alone)
    other = [row.source.ids != rows[i - 1].source.ids for i, row in enumerate(rows)]
    different = torch.tensor(other, device=soft.device)
    if any(other):
        forward.delta = float(((mismatched - matched).detach() * different).sum()) / sum(other)
    return margin_loss(matched, mismatched, margin=config.margin) * different


def _alignment(forward: Forward) -> Losses:
    words, covered = word_targets(forward.receiver, [row.words for row in forward.rows])
    return alignment_loss(forward.soft[0][:, : words.shape[1]], words, covered)


OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective("answer", "answers", lambda f: said_loss(f.said, first_token_weight=f.run.config.first_token_weight)),
        Objective("first_k", "answers", lambda f: _first_k(f.said.losses, f.said.labels, f.run.config.first_k)),
        Objective("kd", "answers", _distillation, taught=True),
        Objective("reconstruction", "text", lambda f: said_loss(f.read_mode("reconstruction", *f.soft))),
        Objective("continuation", "text", _continuation),
        Objective("margin", "others", _margin),
        Objective("diversity", "answers", lambda f: diversity_loss(first_said(f.said)[0])),
        Objective("alignment", "soft", _alignment),
    )
}
