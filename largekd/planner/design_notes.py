"""What the user should know of a designed student, one line each."""

from collections.abc import Iterator, Mapping
from typing import Any

from largekd.planner.design_space import Sizes, grid_step
from largekd.planner.shapes import ModelShape

DOMINATES = 0.4
"""Share of embedding and head from which they are told."""


def design_notes(
    config: Mapping[str, Any], *, shape: ModelShape, teacher: ModelShape, full: Sizes, sizes: Sizes
) -> tuple[str, ...]:
    """Where the student's proportions differ from the teacher's, and what that means."""
    return tuple(
        (
            *_vocabulary(shape),
            *_heads(full, sizes=sizes),
            *_mlp(full, sizes=sizes),
            *_beyond(full, sizes=sizes),
            *_layers(config, shape=shape, teacher=teacher),
        )
    )


def _vocabulary(shape: ModelShape) -> Iterator[str]:
    outside = shape.count_of("embedding") + shape.count_of("head")
    share = outside / shape.parameter_count
    if share < DOMINATES:
        return
    remedy = "a smaller vocabulary would pay most"
    if not shape.tied:
        saved = shape.count_of("head")
        remedy = f"tied = true would save {saved / 1e6:,.1f}M parameters, and a smaller vocabulary pays as well"
    yield f"embedding and head are {share:.0%} of the parameters ({outside / 1e6:,.1f}M): {remedy}"


def _heads(full: Sizes, *, sizes: Sizes) -> Iterator[str]:
    before, after = full.heads / full.kv_heads, sizes.heads / sizes.kv_heads
    if before != after:
        yield (
            f"{after:g} query heads share a key head, in the teacher {before:g}: heads cannot be copied group by group"
        )
    if sizes.head_dim != full.head_dim:
        yield f"heads have {sizes.head_dim} dimensions, in the teacher {full.head_dim}: rotary angles differ"
    query = sizes.heads * sizes.head_dim
    if query != sizes.width and full.heads * full.head_dim == full.width:
        yield f"queries are {query} wide and the model {sizes.width}: config.json says head_dim = {sizes.head_dim}"


def _beyond(full: Sizes, *, sizes: Sizes) -> Iterator[str]:
    for name in ("layers", "width", "mlp_width", "heads"):
        size, whole = getattr(sizes, name), getattr(full, name)
        if size > whole:
            yield f"{name} = {size} is more than the teacher's {whole}: student.initialise cannot make that"


def _mlp(full: Sizes, *, sizes: Sizes) -> Iterator[str]:
    before, after = full.mlp_width / full.width, sizes.mlp_width / sizes.width
    if abs(after / before - 1) > 0.05:
        yield f"the MLP is {after:.2f} times as wide as the model, in the teacher {before:.2f}"
    for name, size, whole in (("width", sizes.width, full.width), ("mlp_width", sizes.mlp_width, full.mlp_width)):
        step = grid_step(whole)
        if size != whole and size % step:
            yield f"{name} = {size} is no multiple of {step}: kernels are slower"


def _layers(config: Mapping[str, Any], *, shape: ModelShape, teacher: ModelShape) -> Iterator[str]:
    if len(shape.layers) != len(teacher.layers):
        kinds = [key for key in ("layer_types", "no_rope_layers", "mlp_only_layers") if config.get(key)]
        mixed = [key for key in kinds if key == "mlp_only_layers" or len(set(config[key])) > 1]
        if mixed:
            yield f"layers are of several kinds ({', '.join(mixed)}): keep teacher layers of the same kind"
    if shape.expert_count and not teacher.expert_count:
        yield "experts of a dense teacher: the router is new; copied experts keep the function before training"
    if teacher.expert_count and not shape.expert_count:
        yield f"the MLP stands for {teacher.active_experts} of the teacher's {teacher.expert_count} experts"
