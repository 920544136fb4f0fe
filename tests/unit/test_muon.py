"""The optimiser of matrices: the products of Newton and Schulz, in whichever order they are made."""

import pytest
import torch
from torch import Tensor

from latentwire.training.muon import orthogonal

SHAPES = [(6, 6), (6, 8), (8, 6), (6, 12), (12, 6), (5, 40), (40, 5)]


def by_hand(x: Tensor, steps: int = 5) -> Tensor:
    """The iteration as it is written down, for one matrix."""
    if x.shape[0] > x.shape[1]:
        return by_hand(x.T, steps).T
    x = x / x.norm()
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [2, 5])
def test_matrices_of_any_shape_and_rank_are_orthogonalised_as_one_by_one(shape: tuple[int, int], rank: int) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, shape[0], rank) @ torch.randn(3, rank, shape[1]) + 1e-4 * torch.randn(3, *shape)
    wanted = torch.stack([by_hand(matrix.double()) for matrix in matrices])
    torch.testing.assert_close(orthogonal(matrices).double(), wanted, rtol=0, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_each_step_of_the_iteration_is_made(steps: int) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(1, 4, 16)
    torch.testing.assert_close(orthogonal(matrix, steps)[0], by_hand(matrix[0], steps), rtol=1e-4, atol=1e-5)
