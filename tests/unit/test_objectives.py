"""Every objective by values worked out by hand, and rows that have nothing to say."""

import math

import pytest
import torch
from torch import Tensor

from latentwire.bridge.prompt import IGNORE
from latentwire.training.objectives import (
    alignment_loss,
    answer_loss,
    answers_right,
    distillation_loss,
    diversity_loss,
    first_k_loss,
    first_logits,
    margin_loss,
)


def labelled(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def likely(*probabilities: list[float]) -> Tensor:
    """Logits of these distributions, one row each."""
    return torch.tensor(probabilities).log()


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_the_first_tokens_weight_acts_on_the_first_token_of_the_answer_alone() -> None:
    labels = labelled([IGNORE, IGNORE, 3, 4, 5], [IGNORE, 3, 4, 1, IGNORE])
    logits = drawn(2, 5, 8)
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    for row, (first, others) in enumerate([(1, [2, 3]), (0, [1, 2])]):
        rest = sum(float(losses[row, i]) for i in others)
        weighted = answer_loss(logits, labels, first_token_weight=8.0)[row]
        assert float(weighted) == pytest.approx((8 * float(losses[row, first]) + rest) / 10, rel=1e-5)
        plain = answer_loss(logits, labels)[row]
        assert float(plain) == pytest.approx((float(losses[row, first]) + rest) / 3, rel=1e-5)


def test_a_row_without_labels_has_loss_zero_and_gives_no_gradient() -> None:
    logits = torch.randn(2, 4, 8, requires_grad=True)
    losses = answer_loss(logits, labelled([IGNORE] * 4, [IGNORE, IGNORE, 2, 3]))
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert losses.tolist()[0] == 0 < losses.tolist()[1]
    assert logits.grad is not None and not logits.grad[0].any() and logits.grad.isfinite().all()


@pytest.mark.parametrize("k", [1, 2, 3, 9])
def test_first_k_is_the_mean_of_the_first_k_tokens_of_the_answer(k: int) -> None:
    # Tokens with probabilities 1/2, 1/4 and 1/8 in the first row, 1/8 and 1/2 in the second, whose answer is shorter.
    rest = [1 / 8, 1 / 4, 1 / 2, 1 / 8]
    row, other = likely(rest, rest, rest, rest), likely(rest, rest, rest, rest)
    logits = torch.stack([row, other])
    labels = labelled([IGNORE, 2, 1, 0], [IGNORE, IGNORE, 3, 2])
    nats = [[math.log(2), math.log(4), math.log(8)], [math.log(8), math.log(2)]]
    wanted = [sum(row[:k]) / len(row[:k]) for row in nats]
    assert first_k_loss(logits, labels, k=k).tolist() == pytest.approx(wanted)


def test_first_k_of_a_row_without_labels_is_zero_and_gives_no_gradient() -> None:
    logits = drawn(2, 4, 8).requires_grad_()
    losses = first_k_loss(logits, labelled([IGNORE] * 4, [IGNORE, 2, 3, 4]), k=1)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert losses.tolist()[0] == 0 < losses.tolist()[1]
    assert logits.grad is not None and not logits.grad[0].any()
    assert logits.grad[1, 0].any() and not logits.grad[1, 1:].any()  # the second and third token are not looked at


def test_equal_logits_are_no_distance_from_the_teacher_whatever_is_added_to_them() -> None:
    logits, labels = drawn(2, 4, 8), labelled([IGNORE, 1, 2, 3], [IGNORE, IGNORE, 2, 3])
    assert distillation_loss(logits, logits + 5, labels).tolist() == pytest.approx([0, 0], abs=1e-6)


def test_distillation_is_the_teachers_divergence_averaged_over_the_answers_columns() -> None:
    p, q, r = [0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [1 / 3, 1 / 3, 1 / 3]
    teacher, student = likely(p, r, p)[None], likely(q, p, p)[None]
    first = 0.5 * math.log(2) + 0.25 * math.log(0.5)  # p against q
    second = sum(math.log(1 / 3 / x) / 3 for x in p)  # r against p
    made = distillation_loss(student, teacher, labelled([IGNORE, 1, 2]))
    assert made.tolist() == pytest.approx([(first + second) / 2], rel=1e-5)
    assert distillation_loss(student, teacher, labelled([IGNORE, IGNORE, 2])).tolist() == pytest.approx([second])
    assert float(distillation_loss(teacher, student, labelled([IGNORE, IGNORE, 2]))) != pytest.approx(second)


def test_a_row_of_padding_is_no_distance_from_a_teacher_that_may_hold_anything_there() -> None:
    student, teacher = drawn(2, 3, 8).requires_grad_(), -drawn(2, 3, 8)
    teacher[0, :, 0] = 1e30  # far, and finite: gradients flow past it
    losses = distillation_loss(student, teacher, labelled([IGNORE] * 3, [IGNORE, 1, 2]))
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert losses.tolist()[0] == 0 < losses.tolist()[1] < math.inf
    assert student.grad is not None and student.grad.isfinite().all() and not student.grad[0].any()
    teacher[0] = math.inf
    assert float(distillation_loss(student.detach(), teacher, labelled([IGNORE] * 3, [IGNORE, 1, 2]))[0]) == 0


def test_distillation_draws_the_student_towards_the_teacher() -> None:
    student, teacher = likely([0.5, 0.5], [0.5, 0.5])[None].requires_grad_(), likely([0.9, 0.1], [0.9, 0.1])[None]
    distillation_loss(student, teacher, labelled([IGNORE, 1])).sum().backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None and student.grad[0, 0].tolist() == pytest.approx([-0.4, 0.4], rel=1e-5)


def test_another_latent_must_be_worse_by_the_margin() -> None:
    matched, mismatched = torch.tensor([1.0, 1.0, 1.0, 2.0]), torch.tensor([1.0, 1.25, 3.0, 1.0])
    assert margin_loss(matched, mismatched, margin=0.5).tolist() == [0.5, 0.25, 0.0, 1.5]


def test_the_margin_lowers_the_matched_loss_and_raises_the_other_until_it_is_kept() -> None:
    matched, mismatched = torch.tensor([1.0, 1.0]).requires_grad_(), torch.tensor([1.5, 3.0]).requires_grad_()
    margin_loss(matched, mismatched, margin=1.0).sum().backward()  # type: ignore[no-untyped-call]
    assert matched.grad is not None and matched.grad.tolist() == [1, 0]
    assert mismatched.grad is not None and mismatched.grad.tolist() == [-1, 0]


@pytest.mark.parametrize("row", [[0.25] * 4, [0.7, 0.1, 0.1, 0.1], [1.0, 1e-12, 1e-12, 1e-12]])
def test_rows_that_all_say_the_same_have_no_diversity_however_sure_they_are(row: list[float]) -> None:
    assert diversity_loss(likely(row, row, row)).tolist() == pytest.approx([0, 0, 0], abs=1e-6)


@pytest.mark.parametrize("B", [2, 3, 5])
def test_rows_that_surely_say_different_things_reach_minus_log_b(B: int) -> None:
    assert diversity_loss(100 * torch.eye(B, 7)).tolist() == pytest.approx([-math.log(B)] * B, rel=1e-5)


def test_diversity_is_minus_the_divergence_from_the_batchs_mean() -> None:
    p, q = [0.75, 0.25], [0.25, 0.75]  # the mean is (1/2, 1/2)
    wanted = -(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert diversity_loss(likely(p, q)).tolist() == pytest.approx([wanted] * 2, rel=1e-5)


def test_a_step_down_the_diversity_gradient_drives_the_rows_apart() -> None:
    logits = likely([0.6, 0.4], [0.4, 0.6]).requires_grad_()
    diversity_loss(logits).sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad[0, 0] < 0 < logits.grad[0, 1] and logits.grad[1, 1] < 0 < logits.grad[1, 0]
    # By hand: minus the mutual information I, dI/dlogit_bv = p_bv (log p_bv / m_v - sum_u p_bu log p_bu / m_u).
    information = 0.6 * math.log(1.2) + 0.4 * math.log(0.8)
    assert float(logits.grad[0, 0]) == pytest.approx(-0.6 * (math.log(1.2) - information), rel=1e-4)


def test_an_answer_is_right_when_its_every_token_is_the_likeliest() -> None:
    labels = labelled([IGNORE, 1, 2], [IGNORE, 1, 2], [IGNORE, IGNORE, 2])
    logits = torch.zeros(3, 3, 4)
    for row, said in enumerate([(1, 2), (1, 3), (3, 2)]):
        for at, token in enumerate(said):
            logits[row, at, token] = 1
    assert answers_right(logits[:, :-1].argmax(dim=-1), labels).tolist() == [1, 0, 1]


def test_the_first_logits_are_those_that_foretell_the_first_token_of_each_answer() -> None:
    logits, labels = drawn(2, 4, 8), labelled([IGNORE, 5, 6, 7], [IGNORE, IGNORE, IGNORE, 3])
    first, wanted = first_logits(logits, labels)
    assert torch.equal(first, torch.stack([logits[0, 0], logits[1, 2]])) and wanted.tolist() == [5, 3]


def test_alignment_is_measured_over_covered_windows_and_never_nan() -> None:
    words = drawn(2, 3, 8)
    soft = words.clone()
    soft[0, 2] *= -1
    covered = torch.tensor([[True, True, False], [False, False, False]])
    losses = alignment_loss(soft, words, covered)
    assert losses.tolist() == pytest.approx([0, 0], abs=1e-6)
    assert float(alignment_loss(soft, words, torch.ones(2, 3, dtype=torch.bool))[0]) == pytest.approx(2 / 3)
