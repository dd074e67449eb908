"""Shorter axes without a look at activations: the first entries, or evenly resampled ones."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from largekd.errors import ConfigError
from largekd.initialisation.axes import AxisMap, Blend, Mix, Role, Select, StudentMaps, evenly_spaced
from largekd.initialisation.sizes import Sizes

Shorten = Callable[[int, int], AxisMap]
"""(teacher's length, student's length) -> the map of an axis without inner order."""


def truncated(old: int, new: int) -> Select:
    """The first `new` of `old` entries."""
    assert new <= old
    return Select(torch.arange(new))


def interpolated(old: int, new: int) -> Blend:
    """Linear resampling: entry i is read at position i (old − 1) / (new − 1) between the teacher's entries.

    The first and the last entry are the teacher's own; one entry alone is the first.
    """
    assert new <= old
    position_N = torch.arange(new, dtype=torch.float64) * ((old - 1) / max(new - 1, 1))
    below_N = position_N.floor().long().clamp_max(old - 1)
    above_N = (below_N + 1).clamp_max(old - 1)
    return Blend(below_N, above_N, (position_N - below_N).float())


def plain_maps(*, teacher: Sizes, student: Sizes, layers: Sequence[int], even: bool, gain: float) -> StudentMaps:
    """Every axis that is shorter in the student: truncated, or resampled evenly where `even`.

    Heads move whole in either case, because averaging the queries and keys of two heads is no attention that either
    has: the first ones, or evenly spaced ones; see `head_maps`. Weights that read an axis shortened from m to n are
    multiplied by (m / n) ** gain: 1/2 keeps the scale of sums whose parts are unrelated, and with a stream whose other
    units are zero it is what the norm over fewer units takes away; 1 keeps the scale of sums whose parts agree.
    Errors: ConfigError for an axis that is longer in the student, or heads that do not map.
    """
    check_sizes(teacher=teacher, student=student)
    shorten: Shorten = interpolated if even else truncated

    def along(role: Role) -> AxisMap | None:
        old, new = teacher.of(role), student.of(role)
        return None if old == new else shorten(old, new)

    heads, kv_heads = head_maps(teacher=teacher, student=student, even=even)
    check_neurons(teacher=teacher, student=student, layers=layers)
    neurons = [(teacher.neurons(old), student.neurons(new)) for new, old in enumerate(layers)]
    places = range(len(layers))
    gains: dict[Role, float] = {
        role: (teacher.of(role) / student.of(role)) ** gain
        for role in ("width", "ffn", "heads")
        if teacher.of(role) != student.of(role)
    }
    return StudentMaps(
        layers=tuple(layers),
        width=along("width"),
        vocabulary=vocabulary_map(teacher=teacher, student=student),
        ffn={place: shorten(old, new) for place, (old, new) in enumerate(neurons) if old != new},
        heads={} if heads is None else dict.fromkeys(places, heads),
        kv_heads={} if kv_heads is None else dict.fromkeys(places, kv_heads),
        gains=gains,
    )


def vocabulary_map(*, teacher: Sizes, student: Sizes) -> Select | None:
    """The rows of the shared ids: a student's vocabulary may leave out the teacher's padding at the end."""
    if student.vocabulary == teacher.vocabulary:
        return None
    return truncated(teacher.vocabulary, student.vocabulary)


def head_maps(*, teacher: Sizes, student: Sizes, even: bool) -> tuple[Select | None, AxisMap | None]:
    """Query heads that are kept, and the key heads they look at; (None, None) where both numbers are the teacher's.

    A query head keeps its key head. Fewer query heads on each key head: some of them are dropped. More: key heads are
    averaged, and their queries stand together (Ainslie et al. 2023). More key heads than the teacher has: key heads are
    repeated, and their queries are dealt out. Errors: ConfigError when the counts do not allow that.
    """
    if (teacher.heads, teacher.kv_heads) == (student.heads, student.kv_heads):
        return None, None
    have, want = teacher.heads // teacher.kv_heads, student.heads // student.kv_heads
    if student.kv_heads <= teacher.kv_heads:
        window = -(-want // have)
        starts = _windows(student.kv_heads, of=teacher.kv_heads, length=window, even=even)
        queries, matrix_GM = [], torch.zeros(student.kv_heads, teacher.kv_heads)
        for group, start in enumerate(starts):
            matrix_GM[group, start : start + window] = 1 / window
            inner = evenly_spaced(want, of=window * have) if even else range(want)
            queries += [start * have + query for query in inner]
        keys: AxisMap = Select(torch.tensor(starts)) if window == 1 else Mix(matrix_GM)
        return Select(torch.tensor(queries)), keys
    return _repeated_keys(teacher=teacher, student=student)


def _repeated_keys(*, teacher: Sizes, student: Sizes) -> tuple[Select, Select]:
    have, want = teacher.heads // teacher.kv_heads, student.heads // student.kv_heads
    copies, rest = divmod(student.kv_heads, teacher.kv_heads)
    if rest or copies * want > have:
        raise ConfigError(
            f"student.initialise: {student.heads} query heads on {student.kv_heads} key heads cannot be made of the "
            f"teacher's {teacher.heads} on {teacher.kv_heads}: more key heads must be a multiple of the teacher's. "
            "Change num_key_value_heads or num_attention_heads of student.config."
        )
    keys: Tensor = torch.arange(teacher.kv_heads).repeat_interleave(copies)
    queries = torch.arange(teacher.heads).unflatten(0, (teacher.kv_heads, have))[:, : copies * want]
    return Select(queries.flatten()), Select(keys)


def _windows(count: int, *, of: int, length: int, even: bool) -> list[int]:
    """Where `count` windows of key heads start: side by side from the first one, or evenly spaced."""
    if not even and count * length <= of:
        return [index * length for index in range(count)]
    return list(evenly_spaced(count, of=of - length + 1))


def check_neurons(*, teacher: Sizes, student: Sizes, layers: Sequence[int]) -> None:
    """Errors: ConfigError for an MLP with more neurons than that of the teacher's layer it is made of."""
    for new, old in enumerate(layers):
        have, want = teacher.neurons(old), student.neurons(new)
        if want > have:
            raise ConfigError(
                f"student.initialise: the MLP of the student's layer {new} has {want} neurons, and that of the "
                f"teacher's layer {old}, which it is made of, {have}; student.config may have at most as many "
                "(intermediate_size, or moe_intermediate_size of experts), or choose other student.initialise.layers."
            )


def check_sizes(*, teacher: Sizes, student: Sizes) -> None:
    """Errors: ConfigError for another head_dim, an axis that is longer in the student, heads that do not divide.

    Entries inside a head are pairs that rotary embeddings turn at fixed frequencies, so they are never cut.
    """
    if student.head_dim != teacher.head_dim:
        raise ConfigError(
            f"student.initialise: the student's heads have {student.head_dim} entries and the teacher's "
            f"{teacher.head_dim}; rotary embeddings give each entry its own frequency, so student.config must keep "
            f"head_dim = {teacher.head_dim} (hidden_size / num_attention_heads where the family has no head_dim)."
        )
    keys: dict[Role, str] = {
        "width": "hidden_size",
        "ffn": "intermediate_size",
        "heads": "num_attention_heads",
        "vocabulary": "vocab_size",
    }
    for role, key in keys.items():
        if student.of(role) > teacher.of(role):
            raise ConfigError(
                f"student.initialise: student.config has {key} = {student.of(role)}, the teacher {teacher.of(role)}; "
                "a student can only be made of a teacher that has at least as many."
            )
    if student.heads % student.kv_heads:
        raise ConfigError(
            f"student.config: num_attention_heads = {student.heads} must be a multiple of num_key_value_heads = "
            f"{student.kv_heads}."
        )
