"""Which student layer is compared with which teacher layer.

Layers are decoder layers; the first is 0. Depths: Ls of the student, Lt of the teacher. Fractions of layers are
rounded half up, in whole numbers, so that a map does not depend on floating point.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from largekd.config.alignment import (
    AdaptiveLayersConfig,
    ClosestLayersConfig,
    ExplicitLayersConfig,
    LastLayersConfig,
    LayersConfig,
    SkipLayersConfig,
    UniformLayersConfig,
)
from largekd.errors import ConfigError


class LayerPair(NamedTuple):
    """Indices of a student layer and of the teacher layer that it is compared with."""

    student: int
    teacher: int


def pair_layers(
    config: LayersConfig,
    *,
    student_depth: int,
    teacher_depth: int,
    kept: Sequence[int] | None,
    similarity: Tensor | None = None,
    key: str,
) -> tuple[LayerPair, ...]:
    """The pairs of a term, without repetition, ordered by student layer (explicit pairs: as written).

    kept: the teacher layer that each student layer was copied from; None: the student was not made so.
    similarity: (Ls, Lt), higher is more alike; needed by `adaptive` alone.
    key: the term's place in the configuration, such as `objective.features.0`.
    Errors: ConfigError for layers that do not exist, repeated pairs, and counts beyond a depth.
    """
    key = f"{key}.layers"
    match config:
        case ExplicitLayersConfig():
            return _explicit(config.pairs, depths=(student_depth, teacher_depth), key=key)
        case UniformLayersConfig():
            layers = _spread(config.count, depth=student_depth, key=key)
            return tuple(LayerPair(i, _same_depth(i, of=student_depth, depth=teacher_depth)) for i in layers)
        case LastLayersConfig():
            return _last(config.count, student_depth=student_depth, teacher_depth=teacher_depth, key=key)
        case SkipLayersConfig():
            return _skip(config, student_depth=student_depth, teacher_depth=teacher_depth, key=key)
        case ClosestLayersConfig():
            return _closest(kept, student_depth=student_depth, teacher_depth=teacher_depth, key=key)
        case AdaptiveLayersConfig():
            assert similarity is not None and similarity.shape == (student_depth, teacher_depth)
            layers = _spread(config.count, depth=student_depth, key=key)
            return _most_similar(layers, similarity=similarity)


def check_sample_pairs(count: int | None, *, pairs: Sequence[LayerPair], key: str) -> None:
    """Nothing. Errors: ConfigError when more pairs are to be drawn per step than there are."""
    if count is not None and count > len(pairs):
        raise ConfigError(
            f"{key}.sample_pairs = {count}: the layer map has {len(pairs)} pairs; "
            f"lower it, or pair more layers with {key}.layers."
        )


def sample_pairs(pairs: Sequence[LayerPair], *, count: int, seed: int, step: int) -> tuple[LayerPair, ...]:
    """One pair from each of `count` contiguous blocks of `pairs`, as even as possible, in order.

    The draw is a function of (seed, step) alone, so that all ranks run the same modules. Each pair of a block is
    equally likely; where blocks differ by one pair, those of the smaller ones are drawn a little more often.
    """
    assert 1 <= count <= len(pairs)
    generator = np.random.default_rng([seed, step])
    bounds = [len(pairs) * block // count for block in range(count + 1)]
    return tuple(pairs[int(generator.integers(bounds[block], bounds[block + 1]))] for block in range(count))


def _round_half_up(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


def _same_depth(layer: int, *, of: int, depth: int) -> int:
    """The layer of a model of `depth` layers after as large a share of it as `layer` is in a model of `of` layers."""
    return max(_round_half_up((layer + 1) * depth, of) - 1, 0)


def _spread(count: int | None, *, depth: int, key: str) -> tuple[int, ...]:
    """`count` layers at equal distances, the last among them."""
    count = depth if count is None else count
    if count > depth:
        raise ConfigError(f"{key}.count = {count}: the student has {depth} layers; lower it, or null for all of them.")
    return tuple(_round_half_up((place + 1) * depth, count) - 1 for place in range(count))


def _explicit(pairs: Sequence[tuple[int, int]], *, depths: tuple[int, int], key: str) -> tuple[LayerPair, ...]:
    resolved: list[LayerPair] = []
    for place, written in enumerate(pairs):
        for model, layer, depth in zip(("student", "teacher"), written, depths, strict=True):
            if not -depth <= layer < depth:
                raise ConfigError(
                    f"{key}.pairs.{place} = {list(written)}: {layer} is no layer of the {model}, which has {depth}; "
                    f"give 0 to {depth - 1}, or {-depth} to -1 to count from the end."
                )
        pair = LayerPair(written[0] % depths[0], written[1] % depths[1])
        if pair in resolved:
            raise ConfigError(
                f"{key}.pairs.{place} = {list(written)}: layers {list(pair)} are paired before; remove one of the two."
            )
        resolved.append(pair)
    return tuple(resolved)


def _last(count: int, *, student_depth: int, teacher_depth: int, key: str) -> tuple[LayerPair, ...]:
    if count > min(student_depth, teacher_depth):
        raise ConfigError(
            f"{key}.count = {count}: the student has {student_depth} layers and the teacher {teacher_depth}; "
            f"give at most {min(student_depth, teacher_depth)}."
        )
    return tuple(LayerPair(student_depth - back, teacher_depth - back) for back in range(count, 0, -1))


def _skip(config: SkipLayersConfig, *, student_depth: int, teacher_depth: int, key: str) -> tuple[LayerPair, ...]:
    pairs: list[LayerPair] = []
    for strides in range((student_depth - 1) // config.stride + 1):
        student = student_depth - 1 - strides * config.stride
        if config.teacher_stride is None:
            back = _round_half_up(strides * config.stride * teacher_depth, student_depth)
            pairs.append(LayerPair(student, max(teacher_depth - 1 - back, 0)))
            continue
        teacher = teacher_depth - 1 - strides * config.teacher_stride
        if teacher < 0:
            raise ConfigError(
                f"{key}.teacher_stride = {config.teacher_stride}: student layer {student} is {strides} strides "
                f"from the last, but the teacher's {teacher_depth} layers end before; lower it, or raise {key}.stride."
            )
        pairs.append(LayerPair(student, teacher))
    return tuple(reversed(pairs))


def _closest(kept: Sequence[int] | None, *, student_depth: int, teacher_depth: int, key: str) -> tuple[LayerPair, ...]:
    if kept is None:
        raise ConfigError(
            f"{key}.map = closest_non_pruned: the student was not cut out of the teacher, or its layers are chosen "
            "only when it is made (student.initialise.layers null or 'block_influence'), so no layer is known to be "
            "kept; set student.teacher_layers, or student.initialise.layers to indices or a rule that measures "
            "nothing, or choose another map such as uniform."
        )
    assert len(kept) == student_depth
    pairs = []
    for teacher in range(teacher_depth):
        # Ties go to the deeper layer.
        distances = [(abs(original - teacher), -original, -student) for student, original in enumerate(kept)]
        pairs.append(LayerPair(-min(distances)[2], teacher))
    return tuple(sorted(pairs))


def _most_similar(layers: Sequence[int], *, similarity: Tensor) -> tuple[LayerPair, ...]:
    """For the student's `layers`, the ascending teacher layers with the largest sum of similarities.

    They ascend strictly, unless the teacher has fewer layers than are to be paired; then they may repeat. Among equal
    sums the shallower teacher layers win. Dynamic programming: best[j + 1] is the largest sum that ends at layer j or
    before.
    """
    rows = similarity.detach().double().cpu().numpy()[list(layers)]
    assert np.isfinite(rows).all()
    count, depth = rows.shape
    step = 1 if depth >= count else 0
    best = np.zeros(depth + 1)
    choices = np.zeros((count, depth + 1), np.int64)
    for place, row in enumerate(rows):
        sums = np.full(depth + 1, -np.inf)
        for layer in range(depth):
            # best is indexed from 1: entry 0 stands for no teacher layer at all.
            reached = best[layer + 1 - step] + row[layer]
            better = reached > sums[layer]
            sums[layer + 1] = reached if better else sums[layer]
            choices[place, layer + 1] = layer if better else choices[place, layer]
        best = sums
    chosen, limit = [], depth
    for place in range(count - 1, -1, -1):
        layer = int(choices[place, limit])
        chosen.append(layer)
        limit = layer + 1 - step
    return tuple(LayerPair(student, teacher) for student, teacher in zip(layers, reversed(chosen), strict=True))
