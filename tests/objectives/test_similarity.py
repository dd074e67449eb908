"""Linear CKA against its definition: kernels, centring matrix and traces, in float64."""

import pytest
import torch

from largekd.objectives.similarity import linear_cka

SHAPES = [(2, 3, 5), (5, 24, 37), (40, 3, 7), (64, 7, 7), (30, 24, 37)]


def reference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    rows = len(x)
    H = torch.eye(rows, dtype=x.dtype) - 1 / rows
    K, L = H @ x @ x.T @ H, H @ y @ y.T @ H
    return torch.trace(K @ L) / (torch.trace(K @ K) * torch.trace(L @ L)).sqrt()


def draw(rows: int, width: int, *, seed: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("rows", "width_x", "width_y"), SHAPES)
def test_value_and_gradient_are_those_of_the_definition(rows: int, width_x: int, width_y: int) -> None:
    x, y = draw(rows, width_x, seed=1) + 3, draw(rows, width_y, seed=2)
    y[:, :3] += x[:, :3]
    x.requires_grad_(), y.requires_grad_()
    value, expected = linear_cka(x, y), reference(x, y)
    assert torch.allclose(value, expected, rtol=1e-10)
    for ours, theirs in zip(torch.autograd.grad(value, (x, y)), torch.autograd.grad(expected, (x, y)), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("rows", "width_x", "width_y"), [(4, 5, 3), (19, 3, 2)])
def test_gradcheck(rows: int, width_x: int, width_y: int) -> None:
    x, y = draw(rows, width_x, seed=3).requires_grad_(), draw(rows, width_y, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(linear_cka, (x, y))


def test_rotation_shift_and_scale_change_nothing_and_other_features_do() -> None:
    x = draw(50, 12, seed=5)
    rotation = torch.linalg.qr(draw(12, 12, seed=6))[0]
    assert linear_cka(x, 7 * x @ rotation - 2).item() == pytest.approx(1, abs=1e-12)
    assert linear_cka(x, draw(50, 12, seed=7)).item() < 0.5


def test_float32_keeps_large_activations_in_range() -> None:
    x, y = draw(33, 40, seed=8) * 1e9, draw(33, 21, seed=9) * 1e-9
    ours = linear_cka(x.float(), y.float())
    assert ours.item() == pytest.approx(reference(x, y).item(), rel=1e-4)


@pytest.mark.parametrize("rows", [1, 6, 200])
@pytest.mark.parametrize("constant", [0.0, 123.456])
def test_features_that_do_not_vary_have_no_similarity_and_finite_gradients(rows: int, constant: float) -> None:
    x = torch.full((rows, 5), constant) * torch.tensor([1.0, -2.0, 3.0, 0.1, 0.7])
    y = draw(rows, 9, seed=10, dtype=torch.float32)
    x.requires_grad_(), y.requires_grad_()
    value = linear_cka(x, y)
    gradients = torch.autograd.grad(value, (x, y))
    assert abs(value.item()) < 1e-3
    assert all(gradient.isfinite().all() and gradient.abs().max() < 10 for gradient in gradients)


@pytest.mark.parametrize("rows", [7, 200, 1000])
def test_rounding_of_two_constant_sides_is_not_taken_for_similarity(rows: int) -> None:
    x = torch.rand(1, 50, generator=torch.Generator().manual_seed(11)).expand(rows, -1) * 100
    y = torch.rand(1, 30, generator=torch.Generator().manual_seed(12)).expand(rows, -1) * 100
    assert abs(linear_cka(x, y).item()) < 1e-2


def test_variation_within_rounding_is_not_taken_for_similarity() -> None:
    noise = draw(20, 6, seed=13, dtype=torch.float32)
    base = torch.tensor([100.0, 50.0, -70.0, 90.0, 60.0, -80.0])
    x = base * (1 + 2e-7 * noise)
    assert (x != x[:1]).any()
    assert linear_cka(x, x).item() < 0.05
    assert linear_cka(base * (1 + 2e-4 * noise), base * (1 + 2e-4 * noise)).item() == pytest.approx(1, abs=1e-5)
