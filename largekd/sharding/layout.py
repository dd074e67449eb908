"""How a checkpoint stores a model's tensors: names on the hub, and fused tensors that it keeps in pieces.

transformers 5 holds the experts of a layer as one tensor (X, …), while the hub's folders hold one tensor per expert,
sometimes under other names. It converts whole state dicts; here its own table of conversions is read, and a conversion
becomes a list of stored tensors whose memories, one after the other, are the memory of the model's tensor.

Shape letters: X experts.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)

from largekd.errors import ConfigError


@dataclass(frozen=True)
class StoredNames:
    """The stored tensors that a tensor of the model is made of, in the order of its memory.

    `experts`: how many they stack along a first axis; None for a tensor that is stored as it is.
    """

    parts: tuple[str, ...]
    experts: int | None = None


class Layout:
    """The names that tensors of `module` have in a Hugging Face folder."""

    def __init__(self, module: nn.Module) -> None:
        # A prefix that comes and goes with the folder is the reader's affair.
        transforms = [
            transform
            for transform in get_model_conversion_mapping(cast(PreTrainedModel, module), add_legacy=False)
            if not isinstance(transform, PrefixChange)
        ]
        self._renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self._converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self._back_renamings = [renaming.reverse_transform() for renaming in reversed(self._renamings)]
        self._back_converters = [
            converter.reverse_transform() for converter in self._converters if _is_piecewise(converter)
        ]

    def model_names(self, stored: Iterable[str]) -> dict[str, StoredNames]:
        """Name of each of the model's tensors -> where it is stored.

        Errors: ConfigError where transformers would convert a tensor in a way that is not a row of parts.
        """
        parts: dict[str, dict[str, list[str]]] = {}
        converter_of: dict[str, WeightConverter] = {}
        found: dict[str, StoredNames] = {}
        for name in stored:
            renamed = _renamed(name, self._renamings)
            for converter in self._converters:
                target, pattern = converter.rename_source_key(renamed)
                if pattern is not None:
                    _require_piecewise(converter, name=name)
                    converter_of[target] = converter
                    parts.setdefault(target, {}).setdefault(pattern, []).append(name)
                    break
            else:
                found[renamed] = StoredNames((name,))
        for target, by_pattern in parts.items():
            found[target] = _interleaved(target, converter_of[target].source_patterns, by_pattern)
        return found

    def stored(self, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(stored name, view of `value`) of each part under which a tensor of the model is saved."""
        for converter in self._back_converters:
            renamed, pattern = converter.rename_source_key(name)
            if pattern is None:
                continue
            first, targets = converter.target_patterns[0], converter.target_patterns
            for expert, whole in enumerate(value.unbind(0)):
                for target, part in zip(targets, whole.chunk(len(targets)), strict=True):
                    part_name = renamed.replace(first, target, 1).replace("*", str(expert), 1)
                    yield _renamed(part_name, self._back_renamings), part
            return
        yield _renamed(name, self._back_renamings), value


def _renamed(name: str, renamings: Sequence[WeightTransform]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def _is_piecewise(converter: WeightConverter) -> bool:
    """Whether the operations are: stack experts along a first axis, then perhaps put parts one after the other."""
    steps = [(type(step), getattr(step, "dim", None)) for step in converter.operations]
    stack, join = (MergeModulelist, 0), (Concatenate, 1)
    return len(converter.target_patterns) == 1 and (
        (steps == [stack] and len(converter.source_patterns) == 1) or steps == [stack, join]
    )


def _require_piecewise(converter: WeightConverter, *, name: str) -> None:
    if not _is_piecewise(converter):
        steps = ", ".join(type(step).__name__ for step in converter.operations)
        raise ConfigError(
            f"tensor {name!r}: transformers converts it on loading ({steps}) in a way that is not read here. Load the "
            "model with transformers and save it with save_pretrained(folder, save_original_format=False)."
        )


def _interleaved(target: str, patterns: Sequence[str], by_pattern: Mapping[str, Sequence[str]]) -> StoredNames:
    """The parts of a fused tensor, expert by expert, and of each expert in the order of the conversion."""
    columns = []
    for pattern in patterns:
        names = {_expert(name): name for name in by_pattern.get(pattern, ())}
        columns.append([names.get(expert) for expert in range(len(names))])
    sizes = {len(column) for column in columns}
    if len(sizes) > 1 or any(name is None for column in columns for name in column):
        raise ConfigError(
            f"{target}: the checkpoint does not hold the same tensors of every expert, 0 to the last. Fetch it again."
        )
    rows = list(zip(*columns, strict=True))
    return StoredNames(tuple(name for row in rows for name in row if name is not None), experts=len(rows))


def _expert(name: str) -> int:
    """The expert that a stored tensor belongs to: the number after the list's name, which comes last."""
    return int(re.findall(r"\.(\d+)(?=\.)", name)[-1])
