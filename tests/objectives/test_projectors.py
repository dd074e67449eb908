"""Projectors: written-out formulas, gradients, how they start, and widths that do not divide."""

import math

import pytest
import torch
from pydantic import TypeAdapter

from largekd.config.alignment import ProjectorConfig
from largekd.errors import ConfigError
from largekd.objectives.projectors import build_projector, is_shared

KEY = "objective.features.0"
KINDS = [
    {"kind": "pool"},
    {"kind": "linear"},
    {"kind": "linear", "bias": True},
    {"kind": "mlp"},
    {"kind": "mlp", "hidden": 11},
    {"kind": "low_rank_identity", "rank": 5},
]
WIDTHS = [(24, 37), (37, 24), (16, 48), (48, 16), (9, 9)]


def build(config: dict, *, student: int, teacher: int, seed: int = 0):
    torch.manual_seed(seed)
    parsed = TypeAdapter(ProjectorConfig).validate_python(config)
    return build_projector(parsed, student_width=student, teacher_width=teacher, key=KEY)


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pooled(states: torch.Tensor, *, width: int) -> torch.Tensor:
    wide = states.shape[-1]
    columns = [
        states[..., place * wide // width : math.ceil((place + 1) * wide / width)].mean(-1) for place in range(width)
    ]
    return torch.stack(columns, -1)


def reference(config: dict, module, states: torch.Tensor, *, teacher: int) -> torch.Tensor:
    parameters = {name.rsplit("map.", 1)[-1]: value for name, value in module.named_parameters()}
    match config["kind"]:
        case "pool":
            return pooled(states, width=min(teacher, states.shape[-1]))
        case "linear":
            return states @ parameters["weight"].T + parameters.get("bias", 0)
        case "mlp":
            inner = states @ parameters["inner.weight"].T + parameters["inner.bias"]
            gelu = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            return gelu @ parameters["outer.weight"].T + parameters["outer.bias"]
        case _:
            identity = torch.eye(teacher, states.shape[-1], dtype=states.dtype)
            return states @ (identity + parameters["up_ER"] @ parameters["down_RD"]).T


@pytest.mark.parametrize(("student", "teacher"), WIDTHS)
@pytest.mark.parametrize("config", KINDS, ids=str)
def test_forward_and_gradients_are_those_of_the_formula(config: dict, student: int, teacher: int) -> None:
    module = build(config, student=student, teacher=teacher).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    states = draw(2, 5, student).requires_grad_()
    ours, theirs = module(states), reference(config, module, states, teacher=teacher)
    assert ours.shape == (2, 5, module.width) and torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    direction = draw(*ours.shape, seed=2)
    wanted = [states, *module.parameters()]
    gradients = [torch.autograd.grad((result * direction).sum(), wanted) for result in (ours, theirs)]
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(("student", "teacher"), WIDTHS)
def test_pooling_narrows_the_wider_side_only(student: int, teacher: int) -> None:
    module = build({"kind": "pool"}, student=student, teacher=teacher)
    states, targets = draw(3, 4, student), draw(3, 4, teacher)
    assert not list(module.parameters())
    assert torch.allclose(module(states), pooled(states, width=min(student, teacher)))
    assert torch.allclose(module.of_teacher(targets), pooled(targets, width=min(student, teacher)))


@pytest.mark.parametrize("config", KINDS[1:], ids=str)
def test_the_teacher_is_left_as_it_is_by_maps_to_its_width(config: dict) -> None:
    module = build(config, student=7, teacher=12)
    targets = draw(3, 12)
    assert module.width == 12 and torch.equal(module.of_teacher(targets), targets)


@pytest.mark.parametrize(("student", "teacher"), WIDTHS)
def test_low_rank_identity_starts_as_the_identity_and_moves_away_from_it(student: int, teacher: int) -> None:
    module = build({"kind": "low_rank_identity", "rank": 4}, student=student, teacher=teacher)
    states = draw(6, student).float()
    expected = torch.zeros(6, teacher)
    expected[:, : min(student, teacher)] = states[:, : min(student, teacher)]
    assert torch.equal(module(states), expected)
    module(states).square().sum().backward()
    assert module.up_ER.grad.abs().max() > 0
    with torch.no_grad():
        module.up_ER -= 0.1 * module.up_ER.grad
    assert not torch.allclose(module(states), expected, atol=1e-3)


@pytest.mark.parametrize("config", KINDS[1:5], ids=str)
@pytest.mark.parametrize(("student", "teacher"), [(512, 384), (256, 777)])
def test_maps_start_with_about_the_variance_of_their_input(config: dict, student: int, teacher: int) -> None:
    if config.get("hidden"):
        config = config | {"hidden": 600}
    module = build(config, student=student, teacher=teacher)
    spread = module(draw(200, student).float()).std().item()
    assert 0.8 < spread < 1.25


def test_parameters_are_float32_depend_on_the_seed_alone_and_work_in_their_own_dtype() -> None:
    for config in KINDS[1:]:
        first, second, other = (build(config, student=10, teacher=6, seed=seed) for seed in (3, 3, 4))
        assert all(parameter.dtype == torch.float32 for parameter in first.parameters())
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
        assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
        assert first(draw(2, 10).bfloat16()).dtype == torch.float32
        assert first.bfloat16()(draw(2, 10).bfloat16()).dtype == torch.bfloat16


def test_pooling_of_bfloat16_is_not_rounded() -> None:
    states = draw(4, 30).bfloat16()
    for teacher in (15, 7):
        ours = build({"kind": "pool"}, student=30, teacher=teacher)(states)
        assert ours.dtype == torch.float32
        assert torch.allclose(ours.double(), pooled(states.double(), width=teacher), rtol=1e-6, atol=1e-6)


def test_comparing_unequal_widths_as_they_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"objective\.features\.0\.projector\.kind = none: .*24 wide.*37"):
        build({"kind": "none"}, student=24, teacher=37)
    states = draw(2, 8)
    assert build({"kind": "none"}, student=8, teacher=8)(states) is states


def test_a_rank_beyond_the_narrower_width_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"objective\.features\.0\.projector\.rank = 8.*at most 6"):
        build({"kind": "low_rank_identity"}, student=6, teacher=9)


@pytest.mark.parametrize("shared", [True, False])
def test_sharing_is_read_from_the_kinds_that_have_parameters(shared: bool) -> None:
    parse = TypeAdapter(ProjectorConfig).validate_python
    for kind in ("linear", "mlp", "low_rank_identity"):
        assert is_shared(parse({"kind": kind, "shared": shared})) is shared
    assert not is_shared(parse({"kind": "none"})) and not is_shared(parse({"kind": "pool"}))
