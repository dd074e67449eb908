"""A designed student beside its teacher, as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from largekd.config.design import Storage
from largekd.planner.capacity import guidance
from largekd.planner.deployment import DEFAULT_CONTEXT, Budget
from largekd.planner.design import Design
from largekd.planner.figures import cache_bytes, cache_bytes_per_token, forward_flops, weight_bytes
from largekd.planner.shapes import FAMILIES, ModelShape

_STORAGES: tuple[Storage, ...] = ("bf16", "int8", "int4")


def render_design(design: Design, *, teacher: Mapping[str, Any], keep: str) -> str:
    """The table of both models, how near the target was met, notes and guidance."""
    lines = [compared({"teacher": (teacher, design.teacher), "student": (design.config, design.shape)}, design=design)]
    if design.target is not None:
        lines.append(_target_line(design))
    lines += [f"note: {note}" for note in design.notes]
    lines.append("")
    lines.append("published results near this ratio (ranges, not predictions):")
    told = guidance(ratio=design.ratio, parameters=design.shape.parameter_count, keep=keep)
    lines += [f"  {line}" for line in told]
    return "\n".join(lines)


def compared(models: Mapping[str, tuple[Mapping[str, Any], ModelShape]], *, design: Design) -> str:
    """Columns of models, rows of figures; memory and operations at the context of the design's budget."""
    budget = None if design.target is None else design.target.budget
    context = DEFAULT_CONTEXT if budget is None else budget.context_tokens
    rows: dict[str, list[str]] = {"": list(models)}
    for config, shape in models.values():
        for name, value in _figures(config, shape=shape, context=context, teacher=design.teacher).items():
            rows.setdefault(name, []).append(value)
    first = max(len(name) for name in rows)
    widths = [max(len(row[column]) for row in rows.values()) for column in range(len(models))]
    return "\n".join(
        f"{name:<{first}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for name, cells in rows.items()
    )


def _figures(config: Mapping[str, Any], *, shape: ModelShape, context: int, teacher: ModelShape) -> dict[str, str]:
    outside = shape.count_of("embedding") + shape.count_of("head")
    experts = f"{shape.active_experts} of {shape.expert_count}" if shape.expert_count else "-"
    figures = {
        "family": shape.model_type,
        "layers": str(len(shape.layers)),
        "width": f"{shape.width:,}",
        "heads / key heads / size": f"{shape.heads} / {shape.kv_heads} / {shape.head_dim}",
        "MLP or expert width": f"{config[FAMILIES[shape.model_type].expert_width_key]:,}",
        "experts a token / all": experts,
        "embedding": "tied" if shape.tied else "untied",
        "parameters": f"{shape.parameter_count:,}",
        "  of the teacher's": f"{shape.parameter_count / teacher.parameter_count:.4f}",
        "  active": f"{shape.active_parameter_count:,}",
        "  embedding and head": f"{outside / shape.parameter_count:.0%}",
    }
    for storage in _STORAGES:
        figures[f"weights in {storage}, GB"] = f"{weight_bytes(shape, storage=storage) / 1e9:.3f}"
    figures |= {
        "keys and values a token, kB": f"{cache_bytes_per_token(shape) / 1e3:.1f}",
        f"  of {context:,} tokens, GB": f"{cache_bytes(config, shape=shape, context_tokens=context) / 1e9:.3f}",
        f"GFLOP a token, {context:,} tokens": f"{forward_flops(shape, context_tokens=context) / 1e9:.3f}",
    }
    return figures


def _target_line(design: Design) -> str:
    target = design.target
    assert target is not None
    line = f"target: {target.wanted:,.0f} {target.what}; achieved {design.achieved:,.0f}"
    line += f" ({design.achieved / target.wanted - 1:+.2%})"
    return line + (f"\nbudget: {_budget_line(target.budget)}" if target.budget is not None else "")


def _budget_line(budget: Budget) -> str:
    return f"{budget.name}, weights in {budget.storage}, {budget.context_tokens:,} tokens; {budget.source}"


def side_by_side(designs: Mapping[str, Design | str], *, teacher: Mapping[str, Any]) -> str:
    """The same target under several rules of `keep`; a rule without a valid shape tells its reason below."""
    made = {name: design for name, design in designs.items() if isinstance(design, Design)}
    reasons = [f"{name}: {reason}" for name, reason in designs.items() if isinstance(reason, str)]
    if not made:
        return "\n".join(reasons)
    first: Design = next(iter(made.values()))
    columns = {"teacher": (teacher, first.teacher)} | {name: (d.config, d.shape) for name, d in made.items()}
    notes: Sequence[str] = [f"{name}: {note}" for name, design in made.items() for note in design.notes]
    return "\n".join([compared(columns, design=first), *notes, *reasons])
