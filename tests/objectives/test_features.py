"""Feature terms against references written over one sample at a time, in float64; layouts that must not matter."""

from collections.abc import Sequence
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from largekd.config.alignment import FeatureConfig
from largekd.contracts import COUNT_NAMES, Batch, Segment, Translation, counts_of
from largekd.errors import ConfigError
from largekd.objectives import features
from largekd.objectives.features import CKA_WITH_TRANSLATION, FeaturePositions, FeatureTerm
from largekd.objectives.layer_maps import LayerPair

PAIRS = (LayerPair(0, 1), LayerPair(2, 5), LayerPair(3, 7))
LOSSES = ("mse", "normalised_mse", "cosine", "cka", "predictive")
PROJECTORS = [
    {"kind": "none"},
    {"kind": "pool"},
    {"kind": "linear", "bias": True},
    {"kind": "linear", "shared": True},
    {"kind": "mlp", "hidden": 19},
    {"kind": "mlp", "shared": True},
    {"kind": "low_rank_identity", "rank": 3, "shared": False},
    {"kind": "low_rank_identity", "rank": 3},
]
LENGTHS = {10: 7, 11: 1, 12: 30, 13: 2}
STUDENT, TEACHER = 24, 37


def build(loss: str, projector: dict, *, student: int = STUDENT, teacher: int = TEACHER) -> FeatureTerm:
    torch.manual_seed(0)
    config = FeatureConfig(loss=loss, projector=projector, predictor_hidden=13)
    widths = {"student_width": student, "teacher_width": student if projector["kind"] == "none" else teacher}
    term = FeatureTerm(config, pairs=PAIRS, **widths, key="objective.features.0").double()
    # Away from the start, where one factor of the low-rank map is zero.
    with torch.no_grad():
        for parameter in term.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return term


def states_of(sample: int, layer: int, *, width: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * sample + 10 * layer + side)
    scale = torch.linspace(0.2, 3, width, dtype=torch.float64)
    return torch.randn(LENGTHS[sample], width, generator=generator, dtype=torch.float64) * scale + 0.5


def batch_of(rows: Sequence[Sequence[int]], *, width: int, gap: int = 0) -> Batch:
    """Rows of the samples named, `gap` positions of fill between them."""
    segments = []
    segment_BS = torch.zeros(len(rows), width, dtype=torch.int64)
    for place, row in enumerate(rows):
        offset, placed = 0, []
        for number, sample in enumerate(row, start=1):
            placed.append(Segment(sample, offset, LENGTHS[sample]))
            segment_BS[place, offset : offset + LENGTHS[sample]] = number
            offset += LENGTHS[sample] + gap
        segments.append(tuple(placed))
    zeros = torch.zeros(len(rows), width, dtype=torch.int64)
    none = torch.zeros(0, dtype=torch.int64)
    return Batch(zeros, zeros, zeros.float(), none, segments=tuple(segments), segment_BS=segment_BS)


def laid_out(batch: Batch, layers: Sequence[int], *, width: int, side: int) -> dict[int, Tensor]:
    """Layer -> (B, S, width) with the samples' states in place and a large number in the fill."""
    result = {}
    for layer in layers:
        states = torch.full((*batch.input_ids_BS.shape, width), 1e3, dtype=torch.float64)
        for place, row in enumerate(batch.segments):
            for sample, offset, length in row:
                states[place, offset : offset + length] = states_of(sample, layer, width=width, side=side)
        result[layer] = states.requires_grad_()
    return result


def inputs_of(batch: Batch, term: FeatureTerm, *, pairs: Sequence[LayerPair] = PAIRS, teacher: int = TEACHER):
    same = any(type(module).__name__ == "IdentityProjector" for module in term.modules())
    return (
        laid_out(batch, [pair.student for pair in pairs], width=STUDENT, side=0),
        laid_out(batch, [pair.teacher for pair in pairs], width=STUDENT if same else teacher, side=1),
    )


def of_rows(states: Tensor, batch: Batch) -> dict[int, Tensor]:
    """Sample -> its rows of (B, S, …)."""
    return {
        sample: states[place, offset : offset + length]
        for place, row in enumerate(batch.segments)
        for sample, offset, length in row
    }


def reference_loss(loss: str, s: Tensor, t: Tensor) -> Tensor:
    """One sample's sum over its positions, by definition."""
    unit = [states / states.square().sum(-1, keepdim=True).sqrt() for states in (s, t)]
    match loss:
        case "mse":
            return ((s - t) ** 2).mean(-1).sum()
        case "normalised_mse":
            centred = [states - states.mean(-1, keepdim=True) for states in (s, t)]
            a, b = (states / ((states**2).mean(-1, keepdim=True) + 1e-8).sqrt() for states in centred)
            return ((a - b) ** 2).mean(-1).sum()
        case "cosine":
            return sum(1 - (a @ b) for a, b in zip(*unit, strict=True))
        case "predictive":
            return ((unit[0] - unit[1]) ** 2).sum()
        case _:
            if len(s) < 2:
                return s.sum() * 0
            H = torch.eye(len(s), dtype=s.dtype) - 1 / len(s)
            K, L = H @ s @ s.T @ H, H @ t @ t.T @ H
            return 1 - (K * L).sum() / ((K * K).sum() * (L * L).sum()).sqrt()


def reference(term: FeatureTerm, student: dict, teacher: dict, batch: Batch, pairs=PAIRS) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        name = f"{pair.student}_{pair.teacher}"
        projector = term.projectors["shared" if "shared" in term.projectors else name]
        targets = of_rows(teacher[pair.teacher].detach(), batch)
        for sample, rows in of_rows(student[pair.student], batch).items():
            mapped = projector(rows)
            mapped = term.predictors[name](mapped) if len(term.predictors) else mapped
            total = total + reference_loss(term.loss, mapped, projector.of_teacher(targets[sample])) / len(pairs)
    return total


def gradients_of(value: Tensor, term: FeatureTerm, student: dict) -> list[Tensor]:
    return list(torch.autograd.grad(value, [*student.values(), *term.parameters()], retain_graph=True))


def assert_close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    # Gradients that are zero by symmetry (a shift under cka) are rounding on both sides.
    largest = max(b.abs().max().item() for b in theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12 * largest)


BATCH = batch_of([[10, 11], [12], [], [13]], width=33, gap=2)


@pytest.mark.parametrize("projector", PROJECTORS, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_value_and_gradients_are_those_of_the_definition(loss: str, projector: dict, monkeypatch) -> None:
    # Blocks end in the middle of samples.
    monkeypatch.setattr(features, "BLOCK_ROWS", 9)
    term = build(loss, projector)
    student, teacher = inputs_of(BATCH, term)
    ours = term(student, teacher, positions=FeaturePositions.of(BATCH), pairs=PAIRS)
    theirs = reference(term, student, teacher, BATCH)
    assert ours.shape == () and theirs.item() > 0.05
    assert_close([ours], [theirs])
    # A factor on the loss is a factor on its gradients.
    ours, theirs = gradients_of(3 * ours, term, student), gradients_of(3 * theirs, term, student)
    assert_close(ours, theirs)
    assert all(gradient.abs().max() > 0 for gradient in theirs)
    with torch.no_grad():
        assert_close(
            [term(student, teacher, positions=FeaturePositions.of(BATCH), pairs=PAIRS) * 3],
            [3 * reference(term, student, teacher, BATCH)],
        )


@pytest.mark.parametrize("teacher_width", [11, 48, 24])
@pytest.mark.parametrize("loss", LOSSES)
def test_pooling_to_narrower_wider_and_equal_widths(loss: str, teacher_width: int) -> None:
    term = build(loss, {"kind": "pool"}, teacher=teacher_width)
    student, teacher = inputs_of(BATCH, term, teacher=teacher_width)
    ours = term(student, teacher, positions=FeaturePositions.of(BATCH), pairs=PAIRS)
    theirs = reference(term, student, teacher, BATCH)
    assert_close([ours, *gradients_of(ours, term, student)], [theirs, *gradients_of(theirs, term, student)])


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss: str) -> None:
    term = build(loss, {"kind": "linear"}, student=3, teacher=4)
    batch = batch_of([[13, 11]], width=4)
    positions = FeaturePositions.of(batch)
    student = laid_out(batch, [0], width=3, side=0)[0].detach().clamp(max=3).requires_grad_()
    teacher = {1: laid_out(batch, [1], width=4, side=1)[1]}
    assert torch.autograd.gradcheck(lambda x: term({0: x}, teacher, positions=positions, pairs=PAIRS[:1]), (student,))


@pytest.mark.parametrize("loss", LOSSES)
def test_fill_packing_and_micro_batches_change_nothing(loss: str) -> None:
    term = build(loss, {"kind": "mlp"})
    layouts = [
        [batch_of([[10], [11], [12], [13]], width=30)],
        [batch_of([[10], [11], [12], [13], []], width=47)],
        [batch_of([[10, 11, 12, 13]], width=40)],
        [batch_of([[13, 11, 10], [12]], width=41, gap=3)],
        [batch_of([[13, 11]], width=8), batch_of([[12], [10]], width=30), batch_of([[], []], width=8)],
        [batch_of([[sample]], width=LENGTHS[sample]) for sample in LENGTHS],
    ]
    results = []
    for batches in layouts:
        total, by_sample = torch.zeros((), dtype=torch.float64), {}
        term.zero_grad()
        for batch in batches:
            student, teacher = inputs_of(batch, term)
            value = term(student, teacher, positions=FeaturePositions.of(batch), pairs=PAIRS)
            value.backward()
            total += value.detach()
            by_sample |= of_rows(torch.cat([states.grad for states in student.values()], -1), batch)
            fill = batch.segment_BS == 0
            assert all(states.grad[fill].eq(0).all() for states in student.values())
        gradients = [parameter.grad.clone() for parameter in term.parameters()]
        results.append([total, *gradients, *(by_sample[sample] for sample in LENGTHS)])
        counts = dict(zip(COUNT_NAMES, counts_of(batches).tolist(), strict=True))
        assert counts["positions"] == 40 and counts["samples"] == 3
    for result in results[1:]:
        assert_close(result, results[0])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "projector", [{"kind": "linear"}, {"kind": "mlp"}, {"kind": "linear", "shared": True}], ids=str
)
def test_pairs_without_a_part_have_gradients_of_zero(loss: str, projector: dict) -> None:
    term = build(loss, projector)
    active = (PAIRS[1],)
    student, teacher = inputs_of(BATCH, term, pairs=active)
    value = term(student, teacher, positions=FeaturePositions.of(BATCH), pairs=active)
    theirs = reference(term, student, teacher, BATCH, pairs=active)
    assert_close([value], [theirs])
    value.backward()
    for name, parameter in term.named_parameters():
        takes_part = ".2_5." in name or ".shared." in name
        assert parameter.grad is not None and bool(parameter.grad.abs().max() > 0) is takes_part, name


@pytest.mark.parametrize("projector", PROJECTORS, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_without_anything_to_compare_gives_zero_and_gradients_of_zero(loss: str, projector: dict) -> None:
    term = build(loss, projector)
    empty = [batch_of([[], []], width=8)] + ([batch_of([[11], [11]], width=8)] if loss == "cka" else [])
    for batch in empty:
        term.zero_grad()
        student, teacher = inputs_of(batch, term)
        value = term(student, teacher, positions=FeaturePositions.of(batch), pairs=PAIRS[:2])
        assert value.item() == 0
        value.backward()
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in term.parameters())


@pytest.mark.parametrize("projector", PROJECTORS, ids=str)
def test_modules_run_in_an_order_that_does_not_depend_on_the_positions(projector: dict) -> None:
    def calls(batch: Batch) -> list[str]:
        order: list[str] = []
        term = build("predictive" if "shared" not in projector else "mse", projector)
        for name, module in term.named_modules():
            if module is not term:
                module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        student, teacher = inputs_of(batch, term)
        term(student, teacher, positions=FeaturePositions.of(batch), pairs=PAIRS[1:])
        return order

    assert calls(BATCH) == calls(batch_of([[]], width=4)) != []


@pytest.mark.parametrize("loss", ["mse", "normalised_mse", "cosine", "cka"])
@pytest.mark.parametrize("projector", [{"kind": "none"}, {"kind": "pool"}, {"kind": "low_rank_identity"}], ids=str)
def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient(loss: str, projector: dict) -> None:
    term = FeatureTerm(
        FeatureConfig(loss=loss, projector=projector), pairs=PAIRS, student_width=24, teacher_width=24, key="k"
    )
    student = {pair.student: laid_out(BATCH, [9], width=24, side=0)[9].float().detach() for pair in PAIRS}
    teacher = {pair.teacher: student[pair.student] for pair in PAIRS}
    student = {layer: states.requires_grad_() for layer, states in student.items()}
    value = term(student, teacher, positions=FeaturePositions.of(BATCH), pairs=PAIRS)
    assert abs(value.item()) < 2e-5
    gradients = torch.autograd.grad(value, list(student.values()))
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients)


def test_values_at_the_ends_of_their_ranges() -> None:
    s = torch.tensor([[1.0, 2.0, -3.0]], dtype=torch.float64)
    assert features.cosine(s, -5 * s).item() == pytest.approx(2)
    assert features.predictive(s, -5 * s).item() == pytest.approx(4)
    assert features.normalised_mse(s, 3 - 5 * s).item() == pytest.approx(4, abs=1e-6)
    assert features.normalised_mse(s, 3 + 5 * s).item() == pytest.approx(0, abs=1e-6)
    assert features.mse(s, torch.zeros_like(s)).item() == pytest.approx(14 / 3)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_states_that_are_zero_or_constant_keep_loss_and_gradient_finite(loss: str, constant: float) -> None:
    student_NF = torch.full((3, 16), constant, requires_grad=True)
    teacher_NF = torch.zeros(3, 16)
    value = features.ROW_LOSSES[loss](student_NF, teacher_NF)
    (gradient,) = torch.autograd.grad(value, student_NF)
    assert value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("projector", [{"kind": "none"}, {"kind": "pool"}, {"kind": "linear"}], ids=str)
def test_bfloat16_states_are_compared_in_float32(loss: str, projector: dict) -> None:
    term = build(loss, projector)
    student, teacher = inputs_of(BATCH, term)
    narrow = [
        {layer: s.detach().bfloat16().requires_grad_() for layer, s in side.items()} for side in (student, teacher)
    ]
    wide = [{layer: s.detach().double().requires_grad_() for layer, s in side.items()} for side in narrow]
    wide_term = build(loss, projector)
    wide_term.load_state_dict({name: value.bfloat16().double() for name, value in term.state_dict().items()})
    term.bfloat16()
    value = term(*narrow, positions=FeaturePositions.of(BATCH), pairs=PAIRS)
    expected = reference(wide_term, *wide, BATCH)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=5e-3 if list(term.parameters()) else 1e-6)
    ours = torch.autograd.grad(value, list(narrow[0].values()))
    theirs = torch.autograd.grad(expected, list(wide[0].values()))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.bfloat16 and (a.double() - b).norm() < 0.02 * b.norm()


def test_a_large_scale_in_half_precision_does_not_overflow_on_the_way() -> None:
    term = build("mse", {"kind": "none"}).half()
    student, teacher = inputs_of(BATCH, term)
    student, teacher = ({layer: 0.05 * s.detach().half() for layer, s in side.items()} for side in (student, teacher))
    student = {layer: states.requires_grad_() for layer, states in student.items()}
    value = term(student, teacher, positions=FeaturePositions.of(BATCH), pairs=PAIRS)
    gradients = torch.autograd.grad(value * 2.0**19, list(student.values()))
    assert all(gradient.isfinite().all() and gradient.abs().max() > 1e3 for gradient in gradients)


def test_the_teacher_is_never_differentiated() -> None:
    for loss in LOSSES:
        term = build(loss, {"kind": "linear"})
        student, teacher = inputs_of(BATCH, term)
        term(student, teacher, positions=FeaturePositions.of(BATCH), pairs=PAIRS).backward()
        assert all(states.grad is None for states in teacher.values())


def test_positions_are_those_of_samples_in_order() -> None:
    positions = FeaturePositions.of(BATCH)
    assert torch.equal(positions.student_P, BATCH.segment_BS.flatten().nonzero()[:, 0])
    assert torch.equal(positions.teacher_P, positions.student_P)
    assert positions.student_P.dtype == torch.int64
    numbers = BATCH.segment_BS.flatten()[positions.student_P]
    assert [place.stop - place.start for place in positions.sample_ranges] == [7, 1, 30, 2]
    assert all(numbers[place].unique().numel() == 1 for place in positions.sample_ranges)


def translated() -> Batch:
    """Sample 12 (30 student positions at offset 5 of row 1) and 8 teacher positions, in three groups."""
    batch = batch_of([[13], [11, 12]], width=36, gap=4)
    teacher = batch_of([[13, 10]], width=12)
    groups = {
        "student_start_G": torch.tensor([0, 36 + 5, 36 + 9]),
        "student_length_G": torch.tensor([2, 3, 1]),
        "teacher_start_G": torch.tensor([0, 2, 6]),
        "teacher_length_G": torch.tensor([1, 2, 3]),
    }
    # The rest is for other terms.
    rest = {field.name: torch.zeros(0, dtype=torch.int64) for field in fields(Translation)}
    return replace(batch, translation=Translation(**(rest | groups | {"teacher": teacher})))


@pytest.mark.parametrize("loss", ["mse", "normalised_mse", "cosine", "predictive"])
def test_under_a_translation_the_last_positions_of_groups_are_compared(loss: str) -> None:
    batch = translated()
    positions = FeaturePositions.of(batch)
    assert positions.student_P.tolist() == [1, 43, 45] and positions.teacher_P.tolist() == [0, 3, 8]
    term = build(loss, {"kind": "linear"})
    student = laid_out(batch, [0], width=STUDENT, side=0)
    teacher = laid_out(batch.translation.teacher, [1], width=TEACHER, side=1)
    value = term(student, teacher, positions=positions, pairs=PAIRS[:1])
    rows = student[0].flatten(0, 1)[[1, 43, 45]]
    mapped = term.projectors["0_1"](rows)
    mapped = term.predictors["0_1"](mapped) if loss == "predictive" else mapped
    expected = reference_loss(loss, mapped, teacher[1].detach().flatten(0, 1)[[0, 3, 8]])
    assert_close([value, *gradients_of(value, term, student)], [expected, *_with_zeros(expected, term, student)])


def _with_zeros(value: Tensor, term: FeatureTerm, student: dict) -> list[Tensor]:
    wanted = [*student.values(), *term.parameters()]
    found = torch.autograd.grad(value, wanted, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True)]


def test_samples_are_counted_by_cka_alone() -> None:
    assert {build(loss, {"kind": "linear"}).count_key for loss in LOSSES if loss != "cka"} == {"positions"}
    assert build("cka", {"kind": "linear"}).count_key == "samples"
    assert "objective.features.3.loss" in CKA_WITH_TRANSLATION.format(key="objective.features.3")


def test_unequal_widths_as_they_are_are_refused_with_the_key() -> None:
    config = FeatureConfig(projector={"kind": "none"})
    with pytest.raises(ConfigError, match=r"objective\.features\.4\.projector"):
        FeatureTerm(config, pairs=PAIRS, student_width=8, teacher_width=9, key="objective.features.4")
