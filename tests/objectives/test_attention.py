"""Attention alignment against maps written out query by query in float64."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_reference import (
    Group,
    make_batch,
    make_inputs,
    make_translated,
    reference_relation,
    reference_sum,
    tensors,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from largekd.config.alignment import AttentionConfig
from largekd.contracts import AttentionInputs, Batch
from largekd.errors import ConfigError
from largekd.models.taps import AttentionShape
from largekd.objectives.attention import AttentionTerm
from largekd.objectives.attention_maps import AttentionLayout

WIDTH = 13
STUDENT = AttentionShape(heads=4, key_heads=2, head_width=3)
TEACHER = AttentionShape(heads=8, key_heads=2, head_width=5)
ROWS = {
    "padded": [[(0, 13)], [(0, 6)], []],
    "left_padded": [[(2, 11)], [(0, 13)]],
    "packed": [[(0, 5), (5, 1), (6, 4)], [(0, 3), (3, 10)]],
}
WINDOWS = {"none": (None, None), "teacher": (None, 4), "both": (5, 3)}
LOSSES = ["kl", "cosine", "mse"]


def term_of(*, shapes: tuple[AttentionShape, AttentionShape] = (STUDENT, TEACHER), **options: Any) -> AttentionTerm:
    translated = options.pop("translated", False)
    pairs = options.pop("pairs", [(0, 0)])
    config = AttentionConfig(**{"query_block": 4, **options})
    return AttentionTerm(config, pairs=pairs, student=shapes[0], teacher=shapes[1], translated=translated).double()


def sides(
    batch: Batch,
    *,
    shapes: tuple[AttentionShape, AttentionShape] = (STUDENT, TEACHER),
    windows: tuple[int | None, int | None] = (None, None),
    seed: int = 0,
    **options: Any,
) -> tuple[AttentionInputs, AttentionInputs]:
    teacher_batch = batch if batch.translation is None else batch.translation.teacher
    student, teacher = (
        make_inputs(shape, rows=len(own.input_ids_BS), width=own.input_ids_BS.shape[1], seed=seed + i, **options)
        for i, (shape, own) in enumerate(zip(shapes, (batch, teacher_batch), strict=True))
    )
    return replace(student, window=windows[0]), replace(teacher, window=windows[1])


def value_of(term: AttentionTerm, student: AttentionInputs, teacher: AttentionInputs, batch: Batch) -> Tensor:
    return term({0: student}, {0: teacher}, layout=AttentionLayout.of(batch), pairs=[(0, 0)])


def assert_same(found: Tensor, expected: Tensor, leaves: list[Tensor], **tolerances: float) -> None:
    """Equal values and equal gradients, which must not all be zero."""
    torch.testing.assert_close(found, expected.to(found.dtype), **tolerances)
    ours = torch.autograd.grad(found, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(expected, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(ours, theirs, **tolerances)
    assert any(gradient.any() for gradient in theirs)


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("loss", LOSSES)
def test_maps_equal_the_reference(loss: str, rows: str, windows: str) -> None:
    batch = make_batch(ROWS[rows], width=WIDTH)
    student, teacher = sides(batch, windows=WINDOWS[windows])
    found = value_of(term_of(loss=loss), student, teacher, batch)
    expected = reference_sum(
        *(replace(side, window=min(filter(None, WINDOWS[windows]), default=None)) for side in (student, teacher)),
        batch,
        loss=loss,
    )
    assert_same(found, expected, tensors(student))
    assert torch.autograd.grad(found, tensors(teacher), allow_unused=True) == (None, None, None)


@pytest.mark.parametrize("match", ["group", "repeat", "pool"])
@pytest.mark.parametrize("loss", LOSSES)
def test_head_matching_equals_the_reference(loss: str, match: str) -> None:
    batch = make_batch(ROWS["packed"], width=WIDTH)
    heads = (6, 4) if match == "pool" else (8, 4)
    shapes = (AttentionShape(heads[0], 2, 3), AttentionShape(heads[1], 4, 5))
    student, teacher = sides(batch, shapes=shapes, softcap=2.0)
    found = value_of(term_of(shapes=shapes, loss=loss, match_heads=match), student, teacher, batch)
    assert_same(found, reference_sum(student, teacher, batch, loss=loss, match=match), tensors(student))


@pytest.mark.parametrize("importance", ["learned", "entropy", "variance"])
@pytest.mark.parametrize("loss", LOSSES)
def test_head_importance_equals_the_reference(loss: str, importance: str) -> None:
    batch = make_batch(ROWS["packed"], width=WIDTH)
    student, teacher = sides(batch)
    term = term_of(loss=loss, head_importance=importance)
    leaves, weight_H = tensors(student), None
    if term.head_weights is not None:
        with torch.no_grad():
            term.head_weights.logits_PH.copy_(torch.linspace(-1, 1, 4))
        leaves.append(term.head_weights.logits_PH)
        weight_H = torch.softmax(term.head_weights.logits_PH[0], dim=0)
    expected = reference_sum(student, teacher, batch, loss=loss, importance=importance, weight_H=weight_H)
    assert_same(value_of(term, student, teacher, batch), expected, leaves)


@pytest.mark.parametrize("relations", [("qq", "kk", "vv"), ("qk",), ("kk", "qk")])
@pytest.mark.parametrize("rows", ["padded", "packed"])
def test_relations_equal_the_reference(rows: str, relations: Any) -> None:
    batch = make_batch(ROWS[rows], width=WIDTH)
    shapes = (replace(STUDENT, value_width=6), TEACHER)
    student, teacher = sides(batch, shapes=shapes, windows=(3, None), softcap=1.0)  # relations know neither
    term = term_of(shapes=shapes, loss="relation", relations=relations, relation_heads=2)
    expected = reference_relation(student, teacher, batch, relations=relations, heads=2)
    assert_same(value_of(term, student, teacher, batch), expected, tensors(student))


@pytest.mark.parametrize("block", [1, 7, 64])
@pytest.mark.parametrize("windows", ["none", "both"])
def test_blocks_change_nothing(block: int, windows: str) -> None:
    """Also: what the host knows of the segments spares keys and queries, and changes nothing."""
    batch = make_batch([[(0, 5), (5, 1), (6, 3)], [(0, 9)]], width=WIDTH)
    student, teacher = sides(batch, windows=WINDOWS[windows])
    whole = value_of(term_of(query_block=WIDTH), student, teacher, replace(batch, segments=()))
    found = value_of(term_of(query_block=block), student, teacher, batch)
    assert_same(found, whole, tensors(student))


def test_keys_that_a_block_cannot_see_are_not_read() -> None:
    layout = AttentionLayout.of(make_batch([[(0, 5), (5, 6)], [(1, 3), (4, 7)]], width=WIDTH))
    side = layout.student
    assert side.keys_of(slice(0, 3), window=None) == slice(0, 3)
    assert side.keys_of(slice(5, 8), window=None) == slice(4, 8)
    assert side.keys_of(slice(8, 13), window=None) == slice(4, 11)
    assert side.keys_of(slice(8, 13), window=2) == slice(7, 11)
    assert side.keys_of(slice(11, 13), window=None) is None


@pytest.mark.parametrize(
    "options", [{}, {"head_importance": "entropy"}, {"head_importance": "variance"}, {"loss": "mse"}]
)
def test_padding_micro_batches_and_packing_change_nothing(options: dict[str, Any]) -> None:
    lengths = [6, 1, 4]
    term = term_of(**options)
    alone = [make_batch([[(0, length)]], width=length) for length in lengths]
    pairs = [sides(batch, seed=10 * i) for i, batch in enumerate(alone)]
    expected = torch.stack([value_of(term, *pair, batch) for pair, batch in zip(pairs, alone, strict=True)]).sum()
    leaves = [tensor for student, _ in pairs for tensor in tensors(student)]

    def placed(rows: list[list[tuple[int, int, int]]], width: int) -> Tensor:
        """The term of rows of (sample, offset, length); fill holds large numbers."""
        both = []
        for side in (0, 1):
            parts = []
            for name in range(3):
                sizes = tensors(pairs[0][side])[name].shape
                full = torch.full((len(rows), sizes[1], width, sizes[3]), 50.0, dtype=torch.float64)
                for place, row in enumerate(rows):
                    for sample, offset, length in row:
                        full[place, :, offset : offset + length] = tensors(pairs[sample][side])[name][0]
                parts.append(full)
            both.append(AttentionInputs(*parts, scale=pairs[0][side].scale))
        batch = make_batch([[at[1:] for at in row] for row in rows], width=width)
        return value_of(term, both[0], both[1], batch)

    padded = placed([[(0, 0, 6)], [(1, 0, 1)], [(2, 0, 4)], []], 9)
    left = placed([[(0, 7, 6)], [(2, 9, 4)], [(1, 12, 1)]], 13)
    packed = placed([[(1, 0, 1), (2, 1, 4), (0, 5, 6)]], 12)
    for found in (padded, left, packed):
        assert_same(found, expected, leaves)


def test_one_visible_key_carries_nothing() -> None:
    batch = make_batch([[(i, 1) for i in range(WIDTH)]], width=WIDTH)
    student, teacher = sides(batch)
    for loss in LOSSES:
        found = value_of(term_of(loss=loss), student, teacher, batch)
        torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_models_have_no_distance(loss: str) -> None:
    batch = make_batch(ROWS["packed"], width=WIDTH)
    student, _ = sides(batch)
    found = value_of(term_of(shapes=(STUDENT, STUDENT), loss=loss), student, student, batch)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("loss", [*LOSSES, "relation"])
def test_low_precision_inputs_are_evaluated_in_fp32(loss: str, dtype: torch.dtype, rtol: float) -> None:
    batch = make_batch(ROWS["packed"], width=WIDTH)
    student, teacher = sides(batch, dtype=dtype)
    found = value_of(term_of(loss=loss, relation_heads=2).float(), student, teacher, batch)
    assert found.dtype == torch.float32
    precise = [
        AttentionInputs(*(tensor.detach().double().requires_grad_() for tensor in tensors(side)), scale=side.scale)
        for side in (student, teacher)
    ]
    expected = value_of(term_of(loss=loss, relation_heads=2), precise[0], precise[1], batch)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    ours = torch.autograd.grad(found, tensors(student)[:2])
    for gradient, wanted in zip(ours, torch.autograd.grad(expected, tensors(precise[0])[:2]), strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.double(), wanted, rtol=rtol, atol=rtol * wanted.abs().max().item() / 10)


def test_scores_far_apart_stay_finite() -> None:
    batch = make_batch(ROWS["packed"], width=WIDTH)
    student, teacher = (replace(side, scale=400.0) for side in sides(batch, dtype=torch.float32))
    for options in ({"shapes": (STUDENT, TEACHER)}, {"loss": "cosine"}):
        found = value_of(term_of(**options).float(), student, teacher, batch)
        gradients = torch.autograd.grad(found, tensors(student)[:2])
        assert found.isfinite() and all(gradient.isfinite().all() for gradient in gradients)


def test_pairs_are_averaged_and_inactive_ones_get_zero_gradients() -> None:
    batch = make_batch(ROWS["packed"], width=WIDTH)
    student, teacher = sides(batch)
    other, _ = sides(batch, seed=9)
    term = term_of(head_importance="learned", pairs=[(0, 0), (1, 0), (3, 2)])
    assert term.head_weights is not None
    logits = term.head_weights.logits_PH
    layout = AttentionLayout.of(batch)

    def run(*pairs: tuple[int, int]) -> Tensor:
        return term({0: student, 1: other}, {0: teacher}, layout=layout, pairs=pairs)

    torch.testing.assert_close(run((0, 0), (1, 0)), (run((0, 0)) + run((1, 0))) / 2)
    (gradient,) = torch.autograd.grad(run((1, 0)), [logits])
    assert gradient[1].any() and not gradient[[0, 2]].any()
    (gradient,) = torch.autograd.grad(run(), [logits])
    assert not gradient.any()


def test_a_teacher_that_wants_gradients_leaves_nothing_behind() -> None:
    """The maps of a self-teacher are constants: autograd keeps as many tensors as for one without gradients."""
    batch = make_batch(ROWS["packed"], width=WIDTH)
    student, teacher = sides(batch)
    frozen = replace(teacher, query_BHSd=teacher.query_BHSd.detach(), key_BGSd=teacher.key_BGSd.detach())
    counts = []
    for side in (teacher, frozen):
        kept: Counter[str] = Counter()

        def keep(tensor: Tensor, kept: Counter[str] = kept) -> Tensor:
            kept["tensors"] += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value_of(term_of(), student, side, batch)
        counts.append(kept["tensors"])
    assert counts[0] == counts[1] > 0


def test_no_gradient_is_kept_while_gradients_are_off() -> None:
    batch = make_batch(ROWS["packed"], width=WIDTH)
    student, teacher = sides(batch)
    with torch.no_grad():
        found = value_of(term_of(), student, teacher, batch)
    assert not found.requires_grad
    torch.testing.assert_close(found, value_of(term_of(), student, teacher, batch).detach())


GROUPS: list[list[Group]] = [
    # Two samples: [0, 6) and [6, 11) of the student, [0, 5) and [5, 12) of the teacher; unaligned tokens on both sides.
    [(0, 1, 1, 1), (1, 2, 2, 1), (3, 1, 3, 2), (6, 2, 5, 2), (9, 1, 7, 3), (10, 1, 11, 1)],
    [(2, 1, 0, 2), (3, 3, 2, 1)],
    [],
]


def translated() -> Batch:
    student = make_batch([[(0, 6), (6, 5)], [(0, 8)], [(0, 3)]], width=11)
    teacher = make_batch([[(0, 5), (5, 7)], [(0, 4)], [(0, 2)]], width=12)
    return make_translated(student, teacher, GROUPS)


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("importance", ["uniform", "entropy", "variance"])
@pytest.mark.parametrize("loss", LOSSES)
def test_translated_maps_equal_the_reference(loss: str, importance: str, windows: str) -> None:
    batch = translated()
    student, teacher = sides(batch, windows=WINDOWS[windows])
    term = term_of(loss=loss, head_importance=importance, translated=True)
    expected = reference_sum(student, teacher, batch, loss=loss, importance=importance)
    assert_same(value_of(term, student, teacher, batch), expected, tensors(student))


@pytest.mark.parametrize("block", [1, 3, 64])
def test_translated_blocks_change_nothing(block: int) -> None:
    batch = translated()
    student, teacher = sides(batch, windows=(4, 6))
    whole = value_of(term_of(query_block=6, translated=True), student, teacher, batch)
    assert_same(value_of(term_of(query_block=block, translated=True), student, teacher, batch), whole, tensors(student))


def test_a_translation_without_groups_is_zero() -> None:
    batch = make_translated(make_batch([[(0, 3)]], width=4), make_batch([[(0, 5)]], width=5), [[]])
    student, teacher = sides(batch)
    found = value_of(term_of(translated=True), student, teacher, batch)
    assert found.item() == 0
    assert not torch.autograd.grad(found, tensors(student)[:1])[0].any()


def test_one_token_groups_are_the_same_as_no_translation() -> None:
    plain = make_batch([[(0, 6), (6, 5)]], width=11)
    batch = make_translated(plain, plain, [[(i, 1, i, 1) for i in range(11)]])
    student, teacher = sides(batch)
    found = value_of(term_of(translated=True), student, teacher, batch)
    assert_same(found, value_of(term_of(), student, teacher, plain), tensors(student)[:2])


class Sizes(TorchDispatchMode):
    """The largest number of elements of any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, Tensor))])
        return found


@pytest.mark.parametrize("loss", [*LOSSES, "relation"])
def test_no_tensor_is_larger_than_a_block_of_maps(loss: str) -> None:
    width, block = 96, 8
    batch = make_batch([[(0, width)]], width=width)
    student, teacher = sides(batch)
    term = term_of(loss=loss, query_block=block, relation_heads=4)
    with Sizes() as sizes:
        value_of(term, student, teacher, batch).backward()
    assert sizes.largest <= block * width * TEACHER.heads


def without_data(inputs: AttentionInputs) -> AttentionInputs:
    return replace(
        inputs,
        query_BHSd=inputs.query_BHSd.detach().to("meta").requires_grad_(),
        key_BGSd=inputs.key_BGSd.detach().to("meta").requires_grad_(),
        value_BGSd=inputs.value_BGSd.detach().to("meta").requires_grad_(),
    )


@pytest.mark.parametrize(
    "options", [{}, {"loss": "mse"}, {"loss": "relation", "relation_heads": 2}, {"translated": True}]
)
@pytest.mark.parametrize("importance", ["learned", "entropy"])
def test_nothing_waits_for_the_device(options: dict[str, Any], importance: str) -> None:
    """Tensors without data refuse to be read: a branch on a value, `.item()` or `nonzero` would raise."""
    batch = translated() if options.get("translated") else make_batch(ROWS["packed"], width=WIDTH)
    student, teacher = (without_data(side) for side in sides(batch))
    term = term_of(**options, head_importance=importance).to("meta")
    found = value_of(term, student, teacher, batch.to(device=torch.device("meta")))
    found.backward()
    assert student.query_BHSd.grad is not None


def test_on_a_device_the_upper_bound_of_groups_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from largekd.objectives import attention_maps

    batch = translated()
    student, teacher = sides(batch, windows=(4, 6))
    exact = value_of(term_of(translated=True), student, teacher, batch)
    monkeypatch.setattr(attention_maps, "_on_host", lambda _: False)
    layout = AttentionLayout.of(batch)
    assert layout.queries > max(len(row) for row in GROUPS)
    assert_same(value_of(term_of(translated=True), student, teacher, batch), exact, tensors(student))


def test_relations_are_refused_with_another_tokenizer() -> None:
    with pytest.raises(ConfigError, match=r"objective\.attention\.rel\.loss is 'relation'.*tokenizer"):
        term_of(loss="relation", name="rel", relation_heads=2, translated=True)
