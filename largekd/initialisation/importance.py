"""Which hidden units, neurons and heads a smaller student keeps, by the teacher's activations."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from largekd.errors import ConfigError
from largekd.initialisation.axes import Role, Select, StudentMaps
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

    Errors: ConfigError for an axis that is longer in the student, for more query heads per key head than the teacher
    has, and for a layer whose activations are not those of one MLP or one attention.
    """
    chosen: dict[str, dict[int, Select]] = {"ffn": {}, "heads": {}, "kv_heads": {}}
    for index, layer in enumerate(layers):
        if student.ffn != teacher.ffn:
            scores_F = _measured(statistics.neurons_NF[layer], layer=layer, length=teacher.ffn, what="MLP")
            chosen["ffn"][index] = Select(most_important(scores_F, keep=student.ffn, role="ffn"))
        if (student.heads, student.kv_heads) != (teacher.heads, teacher.kv_heads):
            scores_H = _measured(statistics.heads_NH[layer], layer=layer, length=teacher.heads, what="attention")
            heads, groups = important_heads(
                scores_H, teacher_groups=teacher.kv_heads, heads=student.heads, groups=student.kv_heads
            )
            chosen["heads"][index], chosen["kv_heads"][index] = Select(heads), Select(groups)
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
        kv_heads=chosen["kv_heads"],
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


def important_heads(scores_H: Tensor, *, teacher_groups: int, heads: int, groups: int) -> tuple[Tensor, Tensor]:
    """Query heads and key heads that are kept: the `groups` key heads whose query heads have the greatest sums, and
    inside each the heads / groups greatest ones, all in the teacher's order, so that a query keeps its key.

    Errors: ConfigError when a key head would need more query heads than it has.
    """
    have, want = len(scores_H) // teacher_groups, heads // groups
    if want > have:
        raise ConfigError(
            f"student.initialise.width = 'importance': the student has {heads} query heads on {groups} key heads, "
            f"{want} on each; the teacher has {have} on each. Give the student more key heads or fewer query heads."
        )
    scores_GX = scores_H.unflatten(0, (teacher_groups, have))
    kept_G = most_important(scores_GX.sum(1), keep=groups, role="kv_heads")
    kept_GX = torch.stack([most_important(scores_GX[group], keep=want, role="heads") for group in kept_G.tolist()])
    return (kept_G[:, None] * have + kept_GX).flatten(), kept_G


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
            "projections whose activations could be measured (experts have none in common); choose another rule."
        )
    return scores
