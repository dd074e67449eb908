"""How alike two representations of the same rows are, whatever their widths and rotations."""

import torch
from torch import Tensor
from torch.linalg import vector_norm

ROUNDING_FLOOR = 16.0
"""In units of the dtype's epsilon: what is left of features after centring, relative to them, and is rounding alone."""


def linear_cka(x_ND: Tensor, y_NE: Tensor) -> Tensor:
    """‖XᵀY‖² / (‖XᵀX‖·‖YᵀY‖) in Frobenius norms, columns centred: a scalar in [0, 1]; 1: equal up to a rotation.

    x_ND, y_NE: (N rows, widths), of one floating dtype, float32 or better. Differentiable in both. With few rows it is
    computed from the N × N Gram matrices, ⟨XXᵀ, YYᵀ⟩ / (‖XXᵀ‖·‖YYᵀ‖), which is the same number. Where a side does not
    vary from row to row (one row included) it is 0 with a gradient of 0, rather than undefined.
    Source: Kornblith et al. 2019, arXiv 1905.00414, section 3 (linear kernel, biased estimator).
    """
    x_ND, y_NE = _centred(x_ND), _centred(y_NE)
    rows, (width_x, width_y) = len(x_ND), (x_ND.shape[1], y_NE.shape[1])
    if rows * (width_x + width_y) <= width_x * width_y + width_x * width_x + width_y * width_y:
        gram_x, gram_y = x_ND @ x_ND.T, y_NE @ y_NE.T
        shared = (gram_x * gram_y).sum()
    else:
        gram_x, gram_y = x_ND.T @ x_ND, y_NE.T @ y_NE
        shared = (x_ND.T @ y_NE).square().sum()
    return shared / (_norm(gram_x, rank=min(rows, width_x)) * _norm(gram_y, rank=min(rows, width_y)))


def _centred(x_ND: Tensor) -> Tensor:
    """Column means removed, scaled to a Frobenius norm of 1, which keeps products of large activations in range."""
    centred_ND = x_ND - x_ND.mean(0)
    # The second pass removes the first one's rounding, which is a direction that all rows share.
    centred_ND = centred_ND - centred_ND.mean(0)
    floor = vector_norm(x_ND.detach()) * (ROUNDING_FLOOR * torch.finfo(x_ND.dtype).eps)
    norm = torch.maximum(vector_norm(centred_ND), floor)
    return centred_ND / norm.clamp_min(torch.finfo(x_ND.dtype).tiny ** 0.5)


def _norm(gram: Tensor, *, rank: int) -> Tensor:
    # For features of norm 1 and at most this rank it is at least rank^-½: the floor acts on constant features alone.
    return vector_norm(gram).clamp_min(0.5 * rank**-0.5)
