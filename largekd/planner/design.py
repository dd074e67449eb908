"""A student's config.json from the teacher's and a target.

The valid shapes (design_space.py) are put in order of size and the nearest one is taken; between two of them the
width of the MLP is moved, by two fifths at most, to come nearer. A larger target never gives a smaller student.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from largekd.config.design import DesignConfig
from largekd.config.design_checks import design_problems
from largekd.errors import ConfigError
from largekd.planner.deployment import Budget, read_budget
from largekd.planner.design_notes import design_notes
from largekd.planner.design_space import Sizes, Space, full_sizes
from largekd.planner.figures import cache_bytes, weight_bytes
from largekd.planner.mixtures import Named, with_experts
from largekd.planner.shapes import ModelShape, read_shape

NEAR = 0.02
"""A shape of pure proportions this near to the target is taken as it is."""

# What describes the teacher's own files and not its shape.
_NOT_SHAPE = ("_name_or_path", "auto_map", "quantization_config", "transformers_version")


@dataclass(frozen=True)
class Target:
    """What a design aims at: `wanted` of `what`, a count of parameters or of bytes; a budget is not exceeded."""

    what: str
    key: str
    wanted: float
    budget: Budget | None = None


@dataclass(frozen=True)
class Design:
    """The student: its config.json and shape, beside the teacher's; what was wanted and achieved of the target."""

    config: dict[str, Any]
    shape: ModelShape
    teacher: ModelShape
    target: Target | None
    achieved: float
    notes: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """Parameters of the student over the teacher's."""
        return self.shape.parameter_count / self.teacher.parameter_count


@dataclass(frozen=True)
class _Point:
    sizes: Sizes
    measure: float


def design_student(
    teacher: Mapping[str, Any], *, design: DesignConfig, named: Named | None = None, model: str = "teacher.model"
) -> Design:
    """The student that `design` asks for; `named` writes a field of it in messages, `model` is the teacher's place.

    Errors: ConfigError for a target that no valid shape comes near, sizes that cannot be together, and experts that the
    family cannot have; PlanUnavailableError for a family that is not counted.
    """
    named = named or (lambda field: f"student.design.{field}")
    for field, rule in design_problems(design):
        raise ConfigError(f"{named(field)}{rule}.")
    teacher_shape = read_shape(teacher)
    plain = {key: value for key, value in teacher.items() if key not in _NOT_SHAPE}
    base = with_experts(plain, experts=design.experts, active=design.active_experts, named=named)
    full = full_sizes(base, shape=read_shape(base), model=model)
    space = Space(config=base, full=full, design=design, named=named)
    target = _target(design, teacher=teacher_shape, named=named)
    if target is None:
        sizes, achieved = next(space.shapes()), 0.0
    else:
        found = _search(space, target=target)
        sizes, achieved = found.sizes, found.measure
    config = space.written(sizes)
    shape = read_shape(config)
    if target is None and config == base and design.experts is None and design.active_experts is None:
        raise ConfigError(f"{named('ratio')}: the given sizes are the teacher's own; a student differs from it.")
    notes = design_notes(config, shape=shape, teacher=teacher_shape, full=full, sizes=sizes)
    return Design(config, shape, teacher_shape, target, achieved, notes)


def _target(design: DesignConfig, *, teacher: ModelShape, named: Named) -> Target | None:
    budget = read_budget(design)
    if budget is not None:
        key = "deploy" if design.deploy is not None else "memory_bytes"
        return Target("bytes of weights, keys and values", named(key), budget.bytes, budget)
    active = design.counted == "active"
    what = "active parameters" if active else "parameters"
    if design.parameters is not None:
        return Target(what, named("parameters"), design.parameters)
    if design.ratio is not None:
        whole = teacher.active_parameter_count if active else teacher.parameter_count
        return Target(what, named("ratio"), design.ratio * whole)
    return None


def _search(space: Space, *, target: Target) -> _Point:
    def measure(sizes: Sizes) -> float:
        config = space.written(sizes)
        shape = read_shape(config)
        if target.budget is not None:
            tokens = target.budget.context_tokens
            cached = cache_bytes(config, shape=shape, context_tokens=tokens)
            return weight_bytes(shape, storage=target.budget.storage) + cached
        return shape.active_parameter_count if space.design.counted == "active" else shape.parameter_count

    # Of several shapes of one size the first, which is the narrowest.
    found_by_size: dict[float, _Point] = {}
    for sizes in space.shapes():
        size = measure(sizes)
        found_by_size.setdefault(size, _Point(sizes, size))
    points = [found_by_size[size] for size in sorted(found_by_size)]
    largest = points[-1]
    # A model with a size that was given can have a larger one beside it, the full one cannot.
    if largest.sizes == space.full and target.wanted > largest.measure:
        raise ConfigError(_too_large(target, largest=largest))
    found = _within(points, space=space, target=target, measure=measure)
    if target.budget is None and abs(found.measure / target.wanted - 1) > space.design.tolerance:
        raise ConfigError(_too_far(points, found=found, space=space, target=target))
    return found


def _within(points: Sequence[_Point], *, space: Space, target: Target, measure: Callable[[Sizes], float]) -> _Point:
    """The nearest point, or under a budget the largest that fits; then its MLP moved inside of its own cell.

    Cells do not overlap, so a larger target never gives a smaller student.
    """
    wanted = target.wanted
    if target.budget is not None:
        fitting = [index for index, point in enumerate(points) if point.measure <= wanted]
        index = fitting[-1] if fitting else 0
        low = points[0].measure if fitting else 0.0
        high = wanted if index + 1 == len(points) else min(wanted, points[index + 1].measure - 1)
    else:
        index = min(range(len(points)), key=lambda i: abs(points[i].measure - wanted))
        low = (points[index - 1].measure + points[index].measure) / 2 if index else 0.0
        last = index + 1 == len(points)
        high = float("inf") if last else (points[index].measure + points[index + 1].measure) / 2
    pure = points[index]
    candidates = [pure] if low <= pure.measure <= high else []
    if space.refinable and not (candidates and abs(pure.measure / wanted - 1) <= NEAR):
        moved = (_Point(sizes, measure(sizes)) for sizes in space.refined(pure.sizes))
        candidates += [point for point in moved if low <= point.measure <= high]
    if not candidates:
        raise ConfigError(_too_small(points, space=space, target=target))
    return min(candidates, key=lambda point: abs(point.measure - wanted))


def _too_large(target: Target, *, largest: _Point) -> str:
    if target.budget is not None:
        return (
            f"{target.key}: the budget of {target.wanted:,.0f} bytes holds the whole model ({largest.measure:,.0f} "
            "bytes), so nothing has to be smaller; lower the budget, or give ratio or parameters."
        )
    return (
        f"{target.key}: {target.wanted:,.0f} {target.what} are more than the largest valid shape has, "
        f"{largest.measure:,.0f}; lower it."
    )


def _too_small(points: Sequence[_Point], *, space: Space, target: Target) -> str:
    smallest = points[0]
    shape = read_shape(space.written(smallest.sizes))
    outside = shape.count_of("embedding") + shape.count_of("head")
    return (
        f"{target.key}: {target.wanted:,.0f} {target.what} are less than the smallest valid shape has "
        f"({smallest.measure:,.0f}: {smallest.sizes.layers} layers of width {smallest.sizes.width}, "
        f"{outside / shape.parameter_count:.0%} of its parameters in embedding and head); raise it, or change "
        f"{space.named('keep')} = {space.design.keep!r}."
    )


def _too_far(points: Sequence[_Point], *, found: _Point, space: Space, target: Target) -> str:
    if target.wanted < points[0].measure:
        return _too_small(points, space=space, target=target)
    return (
        f"{target.key}: {target.wanted:,.0f} {target.what} are wanted, and the nearest valid shape has "
        f"{found.measure:,.0f}, {found.measure / target.wanted - 1:+.1%}; change {space.named('keep')}, the target or "
        f"{space.named('tolerance')} = {space.design.tolerance}."
    )
