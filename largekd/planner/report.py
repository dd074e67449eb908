"""A plan as text for a terminal and as plain data for plan.json."""

import typing
from collections.abc import Sequence
from typing import Any

from largekd.config.run import RunConfig
from largekd.config.staging import stages_of
from largekd.planner.errors import PlanUnavailableError
from largekd.planner.memory import PLACES, Place
from largekd.planner.plan import Plan, plan
from largekd.planner.shapes import ModelShape, Part
from largekd.planner.switches import with_switches

_GB = 1e9


def plan_text(config: RunConfig, *, world_size: int) -> str:
    """The plan as a table, or one line that says why there is none; of several stages all, and the largest as a table.

    Errors: ConfigError.
    """
    try:
        plans = _plans(config, world_size=world_size)
    except PlanUnavailableError as reason:
        return f"no plan: {reason}"
    largest = _largest(plans)
    table = render_plan(plans[largest])
    if len(plans) == 1:
        return table
    lines = [f"{'stage':<24}{'length':<20}{'GB a rank, all places':>24}"]
    for stage, made in zip(stages_of(config), plans, strict=True):
        train = stage.config.train
        length = f"{train.max_steps} steps" if train.max_steps is not None else f"{train.max_epochs} epochs"
        lines.append(f"  {stage.name:<22}{length:<20}{_together_bytes(made) / _GB:>24.3f}")
    lines += [
        f"  {'peak of any stage':<54}{place:<13}{'':<11}{size / _GB:>10.3f}" for place, size in _peaks(plans).items()
    ]
    return "\n".join([*lines, f"the largest is {stages_of(config)[largest].name}:", table])


def plan_record(config: RunConfig, *, world_size: int) -> dict[str, Any]:
    """The content of plan.json; `{"unavailable": reason}` where there is no plan. Errors: ConfigError."""
    try:
        plans = _plans(config, world_size=world_size)
    except PlanUnavailableError as reason:
        return {"unavailable": str(reason)}
    record = plan_to_mapping(plans[_largest(plans)])
    if len(plans) > 1:
        record["peak_bytes"] = _peaks(plans)
        record["stages"] = {stage.name: dict(made.peaks) for stage, made in zip(stages_of(config), plans, strict=True)}
    return record


def _plans(config: RunConfig, *, world_size: int) -> list[Plan]:
    """A plan for each stage, as if nothing were frozen in it."""
    stages = stages_of(config)
    return with_switches([plan(stage.config, world_size=world_size) for stage in stages], stages=stages)


def _peaks(plans: Sequence[Plan]) -> dict[Place, int]:
    """What each place must hold: one stage may fill the accelerator, another one the host."""
    return {place: max(made.peaks[place] for made in plans) for place in PLACES}


def _largest(plans: Sequence[Plan]) -> int:
    return max(range(len(plans)), key=lambda index: _together_bytes(plans[index]))


def _together_bytes(made: Plan) -> int:
    return sum(made.peaks.values())


def render_plan(made: Plan) -> str:
    """The plan as a table."""
    lines = [
        f"plan: ranks {made.world_size}, micro-batches a step {made.accumulation}, "
        f"tokens a step {made.tokens_per_step:,}",
        *(_model_line(name if name == "teacher" else f"teacher {name}", shape) for name, shape in made.teachers),
        _model_line("student", made.student),
        "",
        f"{'memory of one rank':<56}{'place':<13}{'when':<11}{'GB':>10}",
    ]
    lines += [
        f"  {term.role + ': ' + term.name:<54}{term.place:<13}{term.phase:<11}{term.bytes / _GB:>10.3f}"
        for term in made.terms
    ]
    for place in PLACES:
        if made.peaks[place]:
            lines.append(f"  {'peak':<54}{place:<13}{'':<11}{made.peaks[place] / _GB:>10.3f}")
    together = (made.peaks["accelerator"] + made.peaks["host"]) / _GB
    lines.append(f"without a GPU the accelerator is host memory: {together:.3f} GB a rank together")
    lines += [f"warning: {warning}" for warning in made.warnings]
    return "\n".join(lines)


def plan_to_mapping(made: Plan) -> dict[str, Any]:
    """The plan as plain data; sizes in bytes."""
    return {
        "world_size": made.world_size,
        "accumulation": made.accumulation,
        "tokens_per_step": made.tokens_per_step,
        "teachers": {name: _shape_mapping(shape) for name, shape in made.teachers},
        "student": _shape_mapping(made.student),
        "terms": [
            {"role": term.role, "name": term.name, "place": term.place, "phase": term.phase, "bytes": term.bytes}
            for term in made.terms
        ],
        "peak_bytes": dict(made.peaks),
        "warnings": list(made.warnings),
    }


def _model_line(role: str, shape: ModelShape) -> str:
    active = f" ({shape.active_parameter_count / 1e6:,.1f}M active)" if shape.expert_count else ""
    return (
        f"  {role}: {shape.model_type}, {shape.parameter_count / 1e6:,.1f}M parameters{active}, {len(shape.layers)} x "
        f"{shape.width}, heads {shape.heads}/{shape.kv_heads}, vocabulary {shape.vocab_size:,}"
        + (" tied" if shape.tied else "")
    )


def _shape_mapping(shape: ModelShape) -> dict[str, Any]:
    parts = typing.get_args(Part)
    return {
        "model_type": shape.model_type,
        "parameters": shape.parameter_count,
        "active_parameters": shape.active_parameter_count,
        "layers": len(shape.layers),
        "width": shape.width,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "mlp_width": shape.mlp_width,
        "vocab_size": shape.vocab_size,
        "tied": shape.tied,
        "max_positions": shape.max_positions,
        "by_part": {part: shape.count_of(part) for part in parts if shape.count_of(part)},
    }
