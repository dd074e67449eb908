"""Which hidden units, neurons and heads a smaller student keeps, by the teacher's activations."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from largekd.errors import ConfigError
from largekd.initialisation.axes import AxisMap, Mix, Role, Select, StudentMaps, evenly_spaced
from largekd.initialisation.sizes import Sizes
from largekd.initialisation.statistics import Statistics
from largekd.initialisation.width import vocabulary_map


def importance_maps(
    statistics: Statistics, *, layers: Sequence[int], teacher: Sizes, student: Sizes, width: bool = True
) -> StudentMaps:
    """Each axis keeps its most active entries, in the teacher's order; axes of equal length are taken whole.

    `layers[i]` is the teacher's layer of the student's layer i; neurons and heads are chosen layer by layer, hidden
    units once for all, because the residual stream joins the layers. width False: they are left to another rule.
    The gain of the width is what `width_gain` says of the kept units, so that a teacher whose other units are always
    zero is preserved.

    Errors: ConfigError for an axis that is longer in the student, and for a layer whose activations are not those of
    one MLP or one attention.
    """
    chosen: dict[str, dict[int, Select]] = {"ffn": {}, "heads": {}}
    keys: dict[int, AxisMap] = {}
    for index, layer in enumerate(layers):
        have, want = teacher.neurons(layer), student.neurons(index)
        if want != have:
            scores_F = _measured(statistics.neurons_NF[layer], layer=layer, length=have, what="MLP")
            chosen["ffn"][index] = Select(most_important(scores_F, keep=want, role="ffn"))
        if (student.heads, student.kv_heads) != (teacher.heads, teacher.kv_heads):
            scores_H = _measured(statistics.heads_NH[layer], layer=layer, length=teacher.heads, what="attention")
            heads, keys[index] = important_heads(
                scores_H, teacher_groups=teacher.kv_heads, heads=student.heads, groups=student.kv_heads
            )
            chosen["heads"][index] = Select(heads)
    units, gains = None, dict[Role, float]()
    if width and student.width != teacher.width:
        kept_D = most_important(statistics.units_D, keep=student.width, role="width")
        units = Select(kept_D)
        gains["width"] = width_gain(float(statistics.energy_D[kept_D].sum()), width=student.width)
    return StudentMaps(
        layers=tuple(layers),
        width=units,
        vocabulary=vocabulary_map(teacher=teacher, student=student),
        ffn=chosen["ffn"],
        heads=chosen["heads"],
        kv_heads=keys,
        gains=gains,
    )


def most_important(scores_N: Tensor, *, keep: int, role: Role) -> Tensor:
    """(keep,) indices of the greatest scores in ascending order; of equal ones the first. Errors: ConfigError."""
    if keep > len(scores_N):
        raise ConfigError(
            f"student.initialise.width = 'importance': the student has {keep} entries of {role!r}, the teacher only "
            f"{len(scores_N)}; give student.config or student.design at most as many."
        )
    order = torch.sort(scores_N, descending=True, stable=True).indices
    return order[:keep].sort().values


def important_heads(scores_H: Tensor, *, teacher_groups: int, heads: int, groups: int) -> tuple[Tensor, AxisMap]:
    """Query heads that are kept, and the map of key heads: the `groups` key heads whose query heads have the greatest
    sums, and inside each the heads / groups greatest ones, all in the teacher's order, so that a query keeps its key.

    Where the student has more query heads on each key head than the teacher, so many neighbouring key heads as have
    them are averaged, as in `head_maps`. Errors: ConfigError for more key heads than the teacher has.
    """
    have, want = len(scores_H) // teacher_groups, heads // groups
    window = -(-want // have)
    if groups * window <= teacher_groups:
        starts = torch.arange(0, teacher_groups - window + 1, window)
    else:
        starts = torch.tensor(_windows(groups, of=teacher_groups, length=window))
    place_GX = starts[:, None] * have + torch.arange(window * have)
    scores_GX = scores_H[place_GX]
    kept_G = most_important(scores_GX.sum(1), keep=groups, role="kv_heads")
    kept_GX = torch.stack([most_important(scores_GX[group], keep=want, role="heads") for group in kept_G.tolist()])
    queries = place_GX[kept_G].gather(1, kept_GX).flatten()
    if window == 1:
        return queries, Select(starts[kept_G])
    matrix_GM = torch.zeros(groups, teacher_groups)
    matrix_GM.scatter_(1, starts[kept_G][:, None] + torch.arange(window), 1 / window)
    return queries, Mix(matrix_GM)


def _windows(count: int, *, of: int, length: int) -> list[int]:
    """Where `count` windows start that have to overlap; more windows than places are refused later, by their number."""
    places = of - length + 1
    return list(evenly_spaced(min(count, places), of=places))


def check_importance(*, teacher: Sizes, student: Sizes, layers: Sequence[int], experts: Sequence[bool]) -> None:
    """What can be told before the teacher is measured. experts: by the teacher's layer, whether it is a mixture.

    Errors: ConfigError for more key heads than the teacher has, and for narrower experts.
    """
    rule = "student.initialise.width = 'importance' or 'pca'"
    window = -(-(student.heads // student.kv_heads) // (teacher.heads // teacher.kv_heads))
    changed = (student.heads, student.kv_heads) != (teacher.heads, teacher.kv_heads)
    if changed and student.kv_heads > teacher.kv_heads - window + 1:
        raise ConfigError(
            f"{rule}: the student has {student.heads} query heads on {student.kv_heads} key heads, which cannot be "
            f"chosen from the teacher's {teacher.heads} on {teacher.kv_heads}; give it fewer key heads "
            "(num_key_value_heads of student.config, student.design.kv_heads), or choose truncate or interpolate."
        )
    for new, old in enumerate(layers):
        if experts[old] and student.neurons(new) != teacher.neurons(old):
            raise ConfigError(
                f"{rule}: layer {new} of the student has {student.neurons(new)} neurons and the experts of the "
                f"teacher's layer {old}, which it is made of, {teacher.neurons(old)}; experts have no activations in "
                "common that could be measured. Keep their width (moe_intermediate_size or intermediate_size of "
                "student.config, student.design.mlp_width), or choose truncate or interpolate."
            )


def width_gain(kept_energy: float, *, width: int) -> float:
    """sqrt(kept energy / width): what weights behind an RMSNorm are multiplied by when the stream is cut to `width`.

    The norm divides by the root mean square over fewer entries, so that a stream that had nothing in the others comes
    out √(width / teacher's width) times as large; kept_energy is then the teacher's width, and the factor is its
    inverse. Where a part of the energy is lost the norm stretches the rest, which this factor takes back on average.
    """
    return math.sqrt(kept_energy / width)


def _measured(scores: Tensor | None, *, layer: int, length: int, what: str) -> Tensor:
    if scores is None or len(scores) != length:
        raise ConfigError(
            f"student.initialise.width = 'importance': layer {layer} of the teacher has no one {what} of plain "
            "projections whose activations could be measured (experts have none in common); choose truncate or "
            "interpolate."
        )
    return scores
