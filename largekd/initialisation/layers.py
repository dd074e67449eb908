"""Which of the teacher's layers a shallower student is made of."""

from collections.abc import Callable, Mapping, Sequence

from largekd.errors import ConfigError
from largekd.initialisation.axes import evenly_spaced


def uniform_layers(count: int, *, depth: int) -> tuple[int, ...]:
    """`count` of `depth` layers at equal distances, the first and the last among them (one layer: the first)."""
    return evenly_spaced(count, of=depth)


def first_layers(count: int, *, depth: int) -> tuple[int, ...]:
    """Layers 0 to count − 1."""
    assert count <= depth
    return tuple(range(count))


def first_and_last_layers(count: int, *, depth: int) -> tuple[int, ...]:
    """Half of the layers from the bottom and half from the top; of an odd number the bottom has one more."""
    bottom = (count + 1) // 2
    return (*range(bottom), *range(depth - (count - bottom), depth))


LAYER_RULES: Mapping[str, Callable[..., tuple[int, ...]]] = {
    "uniform": uniform_layers,
    "first": first_layers,
    "first_last": first_and_last_layers,
}
"""Rules that look at nothing but the two depths."""


def check_depth(count: int, *, depth: int, chosen: str | Sequence[int]) -> None:
    """Errors: ConfigError for a student deeper than its teacher, or indices that are not as many existing layers."""
    if count > depth:
        raise ConfigError(
            f"student.initialise: the student has {count} layers and the teacher {depth}; give student.config "
            f"(num_hidden_layers) at most {depth}, or remove student.initialise."
        )
    if isinstance(chosen, str):
        return
    wrong = next((index for index in chosen if not 0 <= index < depth), None)
    if wrong is not None:
        raise ConfigError(
            f"student.initialise.layers = {list(chosen)}: the teacher has layers 0 to {depth - 1}; {wrong} is not one "
            "of them."
        )
    if len(chosen) != count:
        raise ConfigError(
            f"student.initialise.layers = {list(chosen)}: {len(chosen)} layers, but the student has {count} "
            "(num_hidden_layers of student.config); name as many."
        )
