"""Blockwise sums against the same function evaluated whole."""

import weakref

import pytest
import torch
from torch import Tensor

from largekd.objectives.blockwise import blockwise_sum

LENGTH = 11


def rows_loss(query: Tensor, key: Tensor, weight: Tensor) -> Tensor:
    return (torch.softmax(query @ key.transpose(-1, -2), dim=-1).square().sum(-1) * weight.square().sum()).sum()


def make(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = [(2, LENGTH, 3), (2, LENGTH, 3), (5,)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]


def cuts(block: int) -> list[tuple[slice, None, None]]:
    return [(slice(i, min(i + block, LENGTH)), None, None) for i in range(0, LENGTH, block)]


def summed(inputs: list[Tensor], *, block: int) -> Tensor:
    return blockwise_sum(lambda _, *pieces: rows_loss(*pieces), inputs=inputs, blocks=cuts(block))


@pytest.mark.parametrize("block", [1, 4, LENGTH])
def test_value_and_gradients_equal_those_of_the_whole(block: int) -> None:
    inputs = make()
    whole = rows_loss(*inputs)
    found = summed(inputs, block=block)
    torch.testing.assert_close(found, whole)
    expected = torch.autograd.grad(3 * whole, inputs)
    torch.testing.assert_close(torch.autograd.grad(3 * found, inputs), expected)


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(lambda *inputs: summed(list(inputs), block=4), make())


def test_a_second_backward_gives_the_same_gradients() -> None:
    inputs = make()
    found = summed(inputs, block=4)
    first = [gradient.clone() for gradient in torch.autograd.grad(2 * found, inputs, retain_graph=True)]
    torch.testing.assert_close(torch.autograd.grad(2 * found, inputs), tuple(first), rtol=0, atol=0)


def test_only_inputs_that_want_a_gradient_get_one() -> None:
    query, key, weight = make()
    expected = torch.autograd.grad(rows_loss(query, key, weight), [query, weight])
    seen: list[tuple[bool, ...]] = []

    def value(_: int, *pieces: Tensor) -> Tensor:
        seen.append(tuple(piece.requires_grad for piece in pieces))
        return rows_loss(*pieces)

    found = blockwise_sum(value, inputs=[query, key.detach(), weight], blocks=cuts(4))
    torch.testing.assert_close(torch.autograd.grad(found, [query, weight]), expected)
    assert set(seen) == {(True, False, True)}


def test_nothing_is_differentiated_while_gradients_are_off() -> None:
    inputs = make()

    def value(_: int, *pieces: Tensor) -> Tensor:
        assert not torch.is_grad_enabled() and not any(piece.requires_grad for piece in pieces)
        return rows_loss(*pieces)

    with torch.no_grad():
        found = blockwise_sum(value, inputs=inputs, blocks=cuts(4))
    assert not found.requires_grad
    torch.testing.assert_close(found, rows_loss(*inputs).detach())


def test_blocks_in_bf16_are_summed_in_fp32_and_rounded_once() -> None:
    inputs = make(torch.bfloat16)
    precise = [tensor.detach().float().requires_grad_() for tensor in inputs]
    expected = torch.autograd.grad(rows_loss(*precise), precise)
    found = summed(inputs, block=1)
    assert found.dtype == torch.float32
    for gradient, wanted in zip(torch.autograd.grad(found, inputs), expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.float(), wanted, rtol=2**-8, atol=1e-6)


def test_an_enclosing_autocast_does_not_round() -> None:
    inputs = make(torch.float32)
    plain = summed(inputs, block=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = rows_loss(*inputs)
        found = summed(inputs, block=4)
    assert not torch.equal(rounded, plain), "this function must be one that autocast changes"
    assert torch.equal(found, plain)


def test_no_blocks_give_zero_with_zero_gradients() -> None:
    inputs = make()
    found = blockwise_sum(lambda *_: pytest.fail("no block is there"), inputs=inputs, blocks=[])
    assert found.item() == 0
    for gradient in torch.autograd.grad(found, inputs):
        assert not gradient.any()


class Held:
    """A tensor that autograd keeps for a backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_activations_of_blocks_do_not_outlive_their_block() -> None:
    held: weakref.WeakSet[Held] = weakref.WeakSet()
    alive: list[tuple[int, int]] = []

    def pack(tensor: Tensor) -> Held:
        held.add(keeper := Held(tensor))
        return keeper

    def value(_: int, *pieces: Tensor) -> Tensor:
        before = len(held)
        result = rows_loss(*pieces)
        alive.append((before, len(held)))
        return result

    inputs = make()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda keeper: keeper.tensor):
        found = blockwise_sum(value, inputs=inputs, blocks=cuts(4))
    assert all(before == 0 and during > 3 for before, during in alive) and len(alive) == 3
    assert len(held) == len(inputs), "one gradient per input is kept, nothing else"
    found.backward()
