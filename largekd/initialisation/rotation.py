"""A narrower residual stream by its principal directions: one rotation for the whole model (SliceGPT-like).

An RMSNorm without a weight commutes with a rotation of the stream. So every norm's weight is folded into the weights
that read it, the stream is rotated to the principal directions of its normalised second moment, and the last directions
are cut. SliceGPT turns the stream anew at every block, by a matrix that a plain Hugging Face model has no room for; one
rotation for all blocks keeps less of the energy.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from largekd.errors import ConfigError
from largekd.initialisation.axes import Mix, StudentMaps
from largekd.initialisation.derive import Derivation, Prepare, Read, as_stored
from largekd.initialisation.importance import width_gain
from largekd.initialisation.roles import axes_of, split_layer
from largekd.models.build import layers_path
from largekd.runtime.ranks import current_ranks, tensor_of_main

ROTATABLE = frozenset({"llama", "mistral", "phi3", "qwen2", "qwen3"})
"""Model types in which RMSNorms alone read the stream, and nothing else scales, centres or norms it."""

_MODULE_NORMS = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}


def check_rotatable(student: PretrainedConfig, *, key: str = "student.config") -> None:
    """Errors: ConfigError for a family whose norms do not commute with a rotation, and for tied embeddings, which
    cannot hold the final norm's weight: the head has it, the embedding must not."""
    rule = "student.initialise.width = 'pca'"
    if student.model_type not in ROTATABLE:
        raise ConfigError(
            f"{rule}: a {student.model_type!r} model has more than weighted RMSNorms around its stream, which cannot "
            f"be rotated; it can be for {', '.join(sorted(ROTATABLE))}. Choose another rule, such as importance."
        )
    if student.tie_word_embeddings:
        raise ConfigError(
            f"{rule}: the final norm's weight moves into the head, which is tied to the embedding; set "
            f"tie_word_embeddings to false in {key}, or student.design.tied to false (the head then has weights of its "
            "own), or choose another rule."
        )


def check_positions(positions: float, *, width: int) -> None:
    """Errors: ConfigError when less text was measured than there are directions to choose."""
    if positions < width:
        raise ConfigError(
            f"student.initialise.width = 'pca': {positions:,.0f} positions were measured, which span fewer than the "
            f"student's {width} directions; raise student.initialise.calibration_rows, best to several times as many."
        )


def principal_directions(moment_DD: Tensor, *, width: int) -> tuple[Tensor, float]:
    """(D, width) orthonormal directions of the greatest second moment, greatest first, and the sum of their moments.

    Each direction's largest entry is positive.
    """
    values_D, vectors_DD = torch.linalg.eigh(moment_DD.double())
    kept_DK = vectors_DD[:, -width:].flip(1)
    largest_K = kept_DK.gather(0, kept_DK.abs().argmax(0, keepdim=True))
    return kept_DK * largest_K.sign(), float(values_D[-width:].clamp_min(0).sum())


def rotated_maps(maps: StudentMaps, *, moment_DD: Tensor, width: int) -> StudentMaps:
    """`maps` with the rotation to `width` principal directions as the map of hidden units, and its gain.

    A collective call: rank 0 finds the directions. Nearly equal moments give each machine, and each number of threads,
    other ones, and a student's shards must be of one.
    """
    directions_DK = torch.empty(len(moment_DD), width, dtype=torch.float64)
    energies = torch.zeros(1, dtype=torch.float64)
    if current_ranks().is_main:
        directions_DK, kept = principal_directions(moment_DD, width=width)
        energies.fill_(kept)
    directions_DK, energy = tensor_of_main(directions_DK), float(tensor_of_main(energies))
    return replace(
        maps,
        width=Mix(directions_DK.T.float().contiguous()),
        gains={**maps.gains, "width": width_gain(energy, width=width)},
    )


def fold_norms(model: PreTrainedModel) -> Prepare:
    """For `derivations(prepare=…)`: teacher tensors that read the stream, with the weight of their norm folded in.

    Embedding and projections that write to the stream stay as they are, and so does the head: `rotated_ends` has it.
    """
    model_type, path = str(model.config.model_type), layers_path(model)

    def prepare(name: str) -> Derivation:
        norm = _norm_read_by(name, model_type=model_type, path=path)
        if norm is None:
            return as_stored(name)
        return Derivation((name, norm), "norm folded in", _folding(name, norm=norm))

    return prepare


def rotated_ends(
    model: PreTrainedModel, *, maps: StudentMaps, teacher_config: PretrainedConfig
) -> Mapping[str, Derivation]:
    """For `derivations(given=…)`: the student's norms of the stream, ones after folding, and its head.

    The gain of the width stands in the weights behind the norms inside of layers, and in the final norm for the head.
    """
    names = dict(model.named_parameters())
    model_type, path = str(model.config.model_type), layers_path(model)
    norms = [name for name in names if _is_stream_norm(name, model_type=model_type, path=path)]
    final = next(name for name in norms if split_layer(name, layers_path=path) is None)
    gain, width = maps.gains.get("width", 1.0), int(model.config.hidden_size)
    given = {name: _constant(1.0, width=width) for name in norms if name != final}
    given[final] = _constant(gain, width=width)
    head, embedding = (
        next(name for name, value in names.items() if value is wanted)
        for wanted in (model.get_output_embeddings().weight, model.get_input_embeddings().weight)
    )
    source = embedding if teacher_config.tie_word_embeddings else head
    given[head] = Derivation((source, final), "final norm folded in, width mixed", _head(source, norm=final, maps=maps))
    return given


def _folding(name: str, *, norm: str) -> Callable[[Read], Tensor]:
    # The weights of a norm belong to the last dimension of whatever reads it.
    return lambda read: read(name).float() * read(norm).float()


def _head(source: str, *, norm: str, maps: StudentMaps) -> Callable[[Read], Tensor]:
    folded = _folding(source, norm=norm)

    def make(read: Read) -> Tensor:
        value_VD = folded(read)
        if maps.vocabulary is not None:
            value_VD = maps.vocabulary.apply(value_VD, dim=0)
        return value_VD if maps.width is None else maps.width.apply(value_VD, dim=1)

    return make


def _constant(value: float, *, width: int) -> Derivation:
    how = "one: folded into the weights that read it" if value == 1 else f"{value:.4g}: folded into the head"
    return Derivation((), how, lambda _read: torch.full((width,), value))


def _is_stream_norm(name: str, *, model_type: str, path: str) -> bool:
    axes = axes_of(name, model_type=model_type, layers_path=path)
    return axes is not None and len(axes) == 1 and axes[0].role == "width" and "norm" in name.rsplit(".", 2)[-2]


def _norm_read_by(name: str, *, model_type: str, path: str) -> str | None:
    """The norm in front of a tensor that reads the stream inside a layer; None for every other tensor."""
    inside, axes = (
        split_layer(name, layers_path=path),
        axes_of(name, model_type=model_type, layers_path=path),
    )
    if inside is None or axes is None or len(axes) < 2 or axes[-1].role != "width":
        return None
    layer, rest = inside
    return f"{path}.{layer}.{_MODULE_NORMS[rest.split('.', 1)[0]]}.weight"
