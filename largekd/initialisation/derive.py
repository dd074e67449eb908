"""How each tensor of a student is made of tensors of its teacher."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from largekd.errors import ConfigError
from largekd.initialisation.axes import AxisMap, Select, StudentMaps
from largekd.initialisation.roles import WIDTH, Axis, axes_of, split_layer
from largekd.initialisation.sizes import Sizes, sizes_of
from largekd.models.build import layers_path
from largekd.sharding.stream import persistent_buffers

Read = Callable[[str], Tensor]
"""A teacher's whole tensor by its name."""

# Their embeddings are multiplied by sqrt(hidden_size) in the forward pass.
_SCALED_EMBEDDINGS = frozenset({"gemma", "gemma2", "gemma3_text"})
# Their norms multiply by 1 + weight.
_CENTRED_NORMS = _SCALED_EMBEDDINGS
# Their norms stand behind attention and MLP, and so divide what is written to the stream by fewer units; the second
# kind has no others: attention and MLP read the stream as it is.
_NORMS_BEHIND = frozenset({"gemma2", "gemma3_text", "olmo2", "olmo3"})
_ONLY_NORMS_BEHIND = frozenset({"olmo2", "olmo3"})


@dataclass(frozen=True)
class Derivation:
    """One tensor of the student: the teacher's tensors that it is made of, in words, and the making.

    copied_frac: the share of its entries that are entries of the teacher's, unchanged.
    """

    sources: tuple[str, ...]
    how: str
    make: Callable[[Read], Tensor]
    copied_frac: float = 0.0


Prepare = Callable[[str], Derivation]
"""The teacher's tensor of this name in another basis, such as with a norm's weight folded into it."""


def as_stored(name: str) -> Derivation:
    """The teacher's tensor as it is."""
    return Derivation((name,), "copied", lambda read: read(name), copied_frac=1.0)


def derivations(
    model: PreTrainedModel,
    *,
    maps: StudentMaps,
    teacher_config: PretrainedConfig,
    seed: int,
    prepare: Prepare = as_stored,
    given: Mapping[str, Derivation | None] | None = None,
) -> dict[str, Derivation]:
    """For every parameter (and persistent buffer) of the student `model`, how it is made.

    prepare: a change of the teacher's tensors that comes before the maps. given: parameters that another rule makes;
    None for those that are to be drawn as the family draws them, which then have no derivation here.
    seed: of what a rule draws.
    Errors: ConfigError naming a parameter that no rule covers.
    """
    given = given or {}
    plan = _Plan(model=model, maps=maps, teacher_config=teacher_config, prepare=prepare)
    made = {}
    for name in (*dict(model.named_parameters()), *dict(persistent_buffers(model))):
        derivation = given[name] if name in given else plan.derivation(name)
        if derivation is not None:
            made[name] = derivation
    return made


def rule_of_names(
    model: PreTrainedModel, *, maps: StudentMaps, teacher_config: PretrainedConfig, prepare: Prepare = as_stored
) -> Callable[[str], Derivation]:
    """Student's name -> derivation, also of tensors that the student has not, such as the MLP that becomes experts."""
    return _Plan(model=model, maps=maps, teacher_config=teacher_config, prepare=prepare).derivation


class _Plan:
    """The maps, applied name by name."""

    def __init__(
        self, *, model: PreTrainedModel, maps: StudentMaps, teacher_config: PretrainedConfig, prepare: Prepare
    ) -> None:
        self._model_type = str(model.config.model_type)
        self._path = layers_path(model)
        self._maps = maps
        self._prepare = prepare
        self._teacher = sizes_of(teacher_config)
        self._student = sizes_of(model.config)
        self._buffers = frozenset(dict(persistent_buffers(model)))
        self._embedding = _name_of(model, model.get_input_embeddings().weight)
        # A tied head has no name of its own.
        self._head = None
        if teacher_config.tie_word_embeddings and not model.config.tie_word_embeddings:
            self._head = _name_of(model, model.get_output_embeddings().weight)

    def derivation(self, name: str) -> Derivation:
        inside = split_layer(name, layers_path=self._path)
        layer, source = None, self._embedding if name == self._head else name
        if inside is not None:
            layer = inside[0]
            source = f"{self._path}.{self._maps.layers[layer]}.{inside[1]}"
        axes = axes_of(name, model_type=self._model_type, layers_path=self._path)
        if axes is None and name in self._buffers:
            return as_stored(source)
        if axes is None:
            raise ConfigError(
                f"student.initialise: no rule says what the dimensions of {name!r} count ({self._model_type!r} model); "
                "use student.model or student.teacher_layers, which take tensors whole."
            )
        base = self._prepare(source)
        steps = [
            (dim, axis, [None if role is None else self._maps.of(role, layer=layer) for role in axis.roles])
            for dim, axis in enumerate(axes)
        ]
        changes = [(dim, axis, maps) for dim, axis, maps in steps if any(map_ is not None for map_ in maps)]
        gain, centred = self._gain(name, axes=axes, layer=layer), self._is_centred_norm(name)
        chosen = all(isinstance(map_, Select | None) for _, _, maps in changes for map_ in maps)
        words = [base.how, *(_in_words(axis, maps) for _, axis, maps in changes)]
        if gain != 1:
            words.append(f"times {gain:.4g}")
        return Derivation(
            sources=base.sources,
            how=", ".join(words),
            make=functools.partial(
                _make, base=base, changes=changes, sizes=self._teacher, gain=gain, offset=1.0 if centred else 0.0
            ),
            copied_frac=base.copied_frac if chosen and gain == 1 else 0.0,
        )

    def _gain(self, name: str, *, axes: tuple[Axis, ...], layer: int | None) -> float:
        """What a tensor is multiplied by: the gain of the axis it reads, or of the axis that its norm divides by."""
        width = self._maps.gains.get("width", 1.0)
        if layer is not None:
            if len(axes) == 1:
                behind = self._model_type in _NORMS_BEHIND and ".post_" in name and name.endswith("norm.weight")
                return width if behind else 1.0
            role = axes[-1].role
            if role is None or (role == "width" and self._model_type in _ONLY_NORMS_BEHIND):
                return 1.0
            return self._maps.gains.get(role, 1.0)
        embedding = 1.0
        if self._model_type in _SCALED_EMBEDDINGS:
            embedding = math.sqrt(self._teacher.width / self._student.width)
        # The head reads the final norm; tied to the embedding it has that one's factor already.
        return width / embedding if axes == (WIDTH,) else embedding if len(axes) == 2 else 1.0

    def _is_centred_norm(self, name: str) -> bool:
        return self._model_type in _CENTRED_NORMS and name.endswith("norm.weight")


def _make(
    read: Read,
    *,
    base: Derivation,
    changes: list[tuple[int, Axis, list[AxisMap | None]]],
    sizes: Sizes,
    gain: float,
    offset: float,
) -> Tensor:
    value = base.make(read)
    for dim, axis, maps in changes:
        value = _along(value, dim=dim, axis=axis, maps=maps, sizes=sizes)
    if gain != 1:
        value = ((value.float() + offset) * gain - offset).to(value.dtype)
    return value


def _along(value: Tensor, *, dim: int, axis: Axis, maps: list[AxisMap | None], sizes: Sizes) -> Tensor:
    """`value` with each part of one dimension mapped; heads move whole."""
    parts = _parts(value, dim=dim, axis=axis, sizes=sizes)
    mapped = []
    for part, role, map_ in zip(parts, axis.roles, maps, strict=True):
        if map_ is None or role is None:
            mapped.append(part)
            continue
        block = _block(axis, role=role, sizes=sizes)
        blocks = part.unflatten(dim, (-1, block))
        mapped.append(map_.apply(blocks, dim=dim).flatten(dim, dim + 1))
    return mapped[0] if len(mapped) == 1 else torch.cat(mapped, dim=dim)


def _parts(value: Tensor, *, dim: int, axis: Axis, sizes: Sizes) -> Sequence[Tensor]:
    if len(set(axis.roles)) == 1:
        # Neurons of the layer at hand: some families have layers with and without experts.
        return value.chunk(len(axis.roles), dim=dim)
    lengths = [sizes.of(role) * _block(axis, role=role, sizes=sizes) for role in axis.roles if role is not None]
    return value.split(lengths, dim=dim)


def _block(axis: Axis, *, role: str, sizes: Sizes) -> int:
    """Entries of one head, neuron or unit along the dimension."""
    return max(axis.per_head * sizes.head_dim, 1) if role in ("heads", "kv_heads") else 1


def _in_words(axis: Axis, maps: list[AxisMap | None]) -> str:
    words = []
    for role, map_ in dict(zip(axis.roles, maps, strict=True)).items():
        if isinstance(map_, Select):
            words.append(f"{role} chosen")
        elif map_ is not None:
            words.append(f"{role} mixed")
    return " and ".join(words)


def _name_of(model: PreTrainedModel, wanted: Tensor | nn.Module) -> str:
    return next(name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is wanted)
