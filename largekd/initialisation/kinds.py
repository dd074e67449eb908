"""What the teacher's weights are made for: students in which the same numbers would be another function are refused."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig

from largekd.errors import ConfigError
from largekd.initialisation.expert_shapes import experts_of, has_experts
from largekd.initialisation.influence import influential_layers
from largekd.initialisation.layers import LAYER_RULES, check_depth

Kind = tuple[object, ...]
"""What a layer is beside its weights: the positions it attends to, whether it turns them, whether it has experts."""

_MUST_AGREE = (
    "hidden_act",
    "hidden_activation",
    "partial_rotary_factor",
    "use_parallel_residual",
    "use_qk_norm",
    "clip_qkv",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
    "logit_scale",
)
# Added to a mean over the stream, so that a narrower one may want another: up to this factor either way.
_NEAR, _FACTOR = ("rms_norm_eps", "layer_norm_eps"), 10.0
_BIASES = ("attention_bias", "mlp_bias")
_ADAPTING = ("uniform", "block_influence")


def check_agreement(*, teacher: PretrainedConfig, student: PretrainedConfig) -> None:
    """Errors: ConfigError for a value of student.config with which the teacher's weights mean another function."""
    values: list[tuple[str, object, object]] = [
        (name, getattr(teacher, name, None), getattr(student, name, None)) for name in _MUST_AGREE
    ]
    if "sliding_attention" in (*_attended(teacher), *_attended(student)):
        window, own_window = (getattr(config, "sliding_window", None) for config in (teacher, student))
        values.append(("sliding_window", window, own_window))
    before, after = experts_of(teacher), experts_of(student)
    if before is not None and after is not None:
        values.append(("norm_topk_prob", before.renormalised, after.renormalised))
    for name in _NEAR:
        eps, own_eps = (float(getattr(config, name, None) or 0.0) for config in (teacher, student))
        if max(eps, own_eps) > _FACTOR * min(eps, own_eps) * (1 + 1e-6):
            values.append((name, eps, own_eps))
    for name, theirs, ours in values:
        if theirs != ours:
            raise ConfigError(
                f"student.initialise: student.config has {name} = {ours!r} and the teacher {theirs!r}; the teacher's "
                "weights mean another function with it. Use the teacher's value."
            )
    for name in _BIASES:
        had, has = (bool(getattr(config, name, False)) for config in (teacher, student))
        if had != has:
            raise ConfigError(
                f"student.initialise: {name} is {had} in the teacher and {has} in the {student.model_type!r} student, "
                f"which would {'lose' if had else 'lack'} these weights. Use the teacher's value in student.config; "
                "where the student's family has no such key, choose another teacher."
            )
    if _rope(teacher) != _rope(student):
        raise ConfigError(
            "student.initialise: student.config turns positions otherwise than the teacher (rope_parameters "
            f"{_rope(student)}, the teacher's {_rope(teacher)}); use the teacher's values."
        )


def drops_head(*, teacher: PretrainedConfig, student: PretrainedConfig) -> bool:
    """Whether a head that the teacher trained is lost, because the student's is its embedding."""
    return bool(student.tie_word_embeddings) and not teacher.tie_word_embeddings


def choose_layers(
    rule: str | Sequence[int],
    *,
    teacher: PretrainedConfig,
    student: PretrainedConfig,
    influence_N: Tensor | None = None,
) -> tuple[int, ...]:
    """The teacher's layer of each of the student's, which is of its kind.

    uniform: where an evenly spaced layer is of another kind, the ascending layers of the right kinds that lie nearest
    to even places. block_influence: likewise those of the greatest influence in sum; without it, before it is
    measured, any that fit. The other rules, and chosen indices, stand or fall.
    Errors: ConfigError for a student deeper than its teacher, layers that do not exist, or that are of other kinds.
    """
    depth, count = int(teacher.num_hidden_layers), int(student.num_hidden_layers)
    check_depth(count, depth=depth, chosen=rule)
    theirs, ours = layer_kinds(teacher, other=student), layer_kinds(student, other=teacher)
    layers: tuple[int, ...] | None
    if isinstance(rule, str):
        if rule == "block_influence":
            measured = torch.zeros(depth) if influence_N is None else influence_N
            layers = influential_layers(measured, keep=count)
            # As there, the first layer stays whatever its influence.
            first = float(measured.abs().sum()) + 1
            scores = [[first, *measured[1:].tolist()]] * count
        else:
            layers = LAYER_RULES[rule](count, depth=depth)
            places = [index * (depth - 1) / max(count - 1, 1) for index in range(count)]
            scores = [[-abs(layer - place) for layer in range(depth)] for place in places]
        if rule in _ADAPTING and not _agree(layers, theirs=theirs, ours=ours):
            layers = _fitting(scores, theirs=theirs, ours=ours)
    else:
        layers = tuple(rule)
    if layers is None or not _agree(layers, theirs=theirs, ours=ours):
        raise _other_kinds(rule, layers=layers, theirs=theirs, ours=ours)
    return layers


def layer_kinds(config: PretrainedConfig, *, other: PretrainedConfig) -> tuple[Kind, ...]:
    """The kind of every layer, as far as it has to be the same in `other`: between a mixture and a dense model experts
    are made of MLPs and MLPs of experts, between two mixtures they are not."""
    depth = int(config.num_hidden_layers)
    turned = getattr(config, "no_rope_layers", None) or [None] * depth
    mixtures = experts_of(config) is not None and experts_of(other) is not None
    mixture = [
        ("experts" if has_experts(config, layer=layer) else "MLP") if mixtures else None for layer in range(depth)
    ]
    turns = [None if flag is None else "positions turned" if flag else "positions not turned" for flag in turned]
    return tuple(zip(_attended(config), turns, mixture, strict=True))


def _attended(config: PretrainedConfig) -> list[str]:
    found = getattr(config, "layer_types", None)
    if found:
        return list(found)
    kind = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return [kind] * int(config.num_hidden_layers)


def _agree(layers: Sequence[int] | None, *, theirs: Sequence[Kind], ours: Sequence[Kind]) -> bool:
    return layers is not None and all(theirs[old] == kind for old, kind in zip(layers, ours, strict=True))


def _fitting(
    scores: Sequence[Sequence[float]], *, theirs: Sequence[Kind], ours: Sequence[Kind]
) -> tuple[int, ...] | None:
    """Ascending layers of the right kinds with the greatest sum of scores[student's layer][teacher's layer]; of equal
    sums the earlier layers. None where there are none."""
    best: list[tuple[float, tuple[int, ...]] | None] = [(0.0, ())] * (len(theirs) + 1)
    for index, kind in enumerate(ours):
        # best[n]: the layers so far, among the teacher's first n.
        found: list[tuple[float, tuple[int, ...]] | None] = [None]
        for layer, other in enumerate(theirs):
            former, taken = best[layer], found[-1]
            if other == kind and former is not None:
                candidate = (former[0] + scores[index][layer], (*former[1], layer))
                taken = candidate if taken is None or candidate[0] > taken[0] else taken
            found.append(taken)
        best = found
    return None if best[-1] is None else best[-1][1]


def _other_kinds(
    rule: str | Sequence[int], *, layers: Sequence[int] | None, theirs: Sequence[Kind], ours: Sequence[Kind]
) -> ConfigError:
    named = rule if isinstance(rule, str) else list(rule)
    keys = "layer_types, no_rope_layers, mlp_only_layers, decoder_sparse_step"
    if layers is None:
        return ConfigError(
            f"student.initialise.layers = {named!r}: the student's {len(ours)} layers are of kinds that the teacher "
            f"has not in this order and number; change student.config ({keys}) so that its layers, in their order, are "
            "some of the teacher's."
        )
    new, old = next((new, old) for new, old in enumerate(layers) if theirs[old] != ours[new])
    described = [" with ".join(str(part) for part in kind if part is not None) for kind in (ours[new], theirs[old])]
    return ConfigError(
        f"student.initialise.layers = {named!r}: layer {new} of the student is {described[0]} and the teacher's layer "
        f"{old}, which it would be made of, {described[1]}; choose other layers, or change student.config ({keys})."
    )


def _rope(config: PretrainedConfig) -> dict[str, object]:
    found = getattr(config, "rope_parameters", None) or {}
    return {key: value for key, value in found.items() if value is not None}
