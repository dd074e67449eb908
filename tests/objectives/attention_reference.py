"""Attention terms written out query by query in float64, and the batches that the tests give both sides."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from largekd.contracts import IGNORE_LABEL, AttentionInputs, Batch, Segment, Translation
from largekd.models.taps import AttentionShape

Row = list[tuple[int, int]]  # (offset, length) of each sample


def make_batch(rows: list[Row], *, width: int, listed: bool = True) -> Batch:
    """Rows of samples; `listed`: the host knows the segments."""
    segment_BS = torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        for number, (offset, length) in enumerate(row):
            segment_BS[place, offset : offset + length] = number + 1
    segments = tuple(tuple(Segment(place * 100 + i, *at) for i, at in enumerate(row)) for place, row in enumerate(rows))
    return Batch(
        input_ids_BS=torch.zeros_like(segment_BS),
        labels_BS=torch.full_like(segment_BS, IGNORE_LABEL),
        token_weight_BS=torch.zeros(segment_BS.shape),
        counted_T=torch.zeros(0, dtype=torch.long),
        segments=segments if listed else (),
        segment_BS=segment_BS,
    )


_GROUP_FIELDS = ("student_start_G", "student_length_G", "teacher_start_G", "teacher_length_G")
Group = tuple[int, int, int, int]  # student start, length, teacher start, length, within the row


def make_translated(student: Batch, teacher: Batch, groups: list[list[Group]]) -> Batch:
    """A batch whose rows are aligned in `groups`."""
    starts: list[list[int]] = [[], [], [], []]
    numbers = []
    for batch, (at, count) in ((student, (0, 1)), (teacher, (2, 3))):
        assert batch.segment_BS is not None
        number_BS = torch.zeros_like(batch.segment_BS)
        for place, row in enumerate(groups):
            for number, group in enumerate(row):
                number_BS[place, group[at] : group[at] + group[count]] = number + 1
                starts[at].append(place * number_BS.shape[1] + group[at])
                starts[count].append(group[count])
        numbers.append(number_BS)
    known = {
        "teacher": teacher,
        "student_group_BS": numbers[0],
        "teacher_group_BS": numbers[1],
        **{name: torch.tensor(values, dtype=torch.long) for name, values in zip(_GROUP_FIELDS, starts, strict=True)},
    }
    # What is compared at predictions is not read here.
    rest = {item.name: torch.zeros(0, dtype=torch.long) for item in fields(Translation) if item.name not in known}
    return replace(student, translation=Translation(**known, **rest))


def make_inputs(
    shape: AttentionShape, *, rows: int, width: int, seed: int, dtype: torch.dtype = torch.float64, **options: Any
) -> AttentionInputs:
    """Random queries, keys and values, spread enough that maps are far from flat; leaves that want gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(heads: int, size: int) -> Tensor:
        values = 1.5 * torch.randn(rows, heads, width, size, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    query, key = normal(shape.heads, shape.head_width), normal(shape.key_heads, shape.head_width)
    value = normal(shape.key_heads, shape.value_width or shape.head_width)
    return AttentionInputs(query, key, value, **{"scale": shape.head_width**-0.5, **options})


def tensors(inputs: AttentionInputs) -> list[Tensor]:
    return [inputs.query_BHSd, inputs.key_BGSd, inputs.value_BGSd]


@dataclass(frozen=True)
class Side:
    """One row of one model: its samples' numbers, the column of each key, and what scores come from."""

    segment: list[int]
    column: list[int]
    query: Tensor
    key: Tensor
    inputs: AttentionInputs

    def sees(self, query: int) -> list[int]:
        window = self.inputs.window or len(self.segment)
        return [
            k for k in range(query + 1) if k > query - window and self.segment[k] == self.segment[query] and k <= query
        ]

    def map(self, query: int, keys: list[int], columns: list[int]) -> Tensor:
        """(heads, columns): softmax over `keys`, added up by column."""
        heads, key_heads = self.query.shape[0], self.key.shape[0]
        found = []
        for head in range(heads):
            score = self.inputs.scale * (self.key[head * key_heads // heads][keys] @ self.query[head, query])
            if self.inputs.softcap is not None:
                score = self.inputs.softcap * torch.tanh(score / self.inputs.softcap)
            p = torch.softmax(score, dim=0)
            found.append(
                torch.stack([sum(p[i] for i, k in enumerate(keys) if self.column[k] == column) for column in columns])
            )
        return torch.stack(found)


def reference_sum(
    student: AttentionInputs,
    teacher: AttentionInputs,
    batch: Batch,
    *,
    loss: str,
    match: str = "group",
    importance: str = "uniform",
    weight_H: Tensor | None = None,
) -> Tensor:
    """Σ over queries of the head-weighted loss; tensors of the arguments should be float64."""
    total = torch.zeros((), dtype=torch.float64)
    for place in range(batch.input_ids_BS.shape[0]):
        mine, theirs, queries = _row(student, teacher, batch, place=place)
        for student_query, teacher_query in queries:
            keys, other_keys = mine.sees(student_query), theirs.sees(teacher_query)
            columns = sorted({mine.column[k] for k in keys} & {theirs.column[k] for k in other_keys})
            s = mine.map(student_query, [k for k in keys if mine.column[k] in columns], columns)
            t = theirs.map(teacher_query, [k for k in other_keys if theirs.column[k] in columns], columns).detach()
            s, t = _match(s, t, match=match)
            total = total + (_weights(t, importance=importance, weight_H=weight_H) * _distance(s, t, loss=loss)).sum()
    return total


def _row(
    student: AttentionInputs, teacher: AttentionInputs, batch: Batch, *, place: int
) -> tuple[Side, Side, list[tuple[int, int]]]:
    assert batch.segment_BS is not None
    segment = batch.segment_BS[place].tolist()
    own, other = (
        (student.query_BHSd[place], student.key_BGSd[place]),
        (teacher.query_BHSd[place], teacher.key_BGSd[place]),
    )
    if batch.translation is None:
        column = list(range(len(segment)))
        queries = [(q, q) for q, number in enumerate(segment) if number]
        return Side(segment, column, *own, student), Side(segment, column, *other, teacher), queries
    translation = batch.translation
    assert translation.teacher.segment_BS is not None
    mine = Side(segment, translation.student_group_BS[place].tolist(), *own, student)
    theirs = Side(
        translation.teacher.segment_BS[place].tolist(), translation.teacher_group_BS[place].tolist(), *other, teacher
    )
    groups = range(1, max(mine.column) + 1)
    last = [
        tuple(max(k for k, column in enumerate(side.column) if column == group) for side in (mine, theirs))
        for group in groups
    ]
    return mine, theirs, [(a, b) for a, b in last]


def _match(s: Tensor, t: Tensor, *, match: str) -> tuple[Tensor, Tensor]:
    low, high = sorted((len(s), len(t)))

    def brought(maps: Tensor) -> Tensor:
        if match == "repeat":
            return torch.stack([maps[i * len(maps) // high] for i in range(high)])
        if match == "group":
            step = len(maps) // low
            return torch.stack([maps[i * step : (i + 1) * step].mean(0) for i in range(low)])
        return torch.nn.functional.adaptive_avg_pool1d(maps.T, low).T

    return brought(s), brought(t)


def _distance(s: Tensor, t: Tensor, *, loss: str) -> Tensor:
    if loss == "kl":
        return torch.xlogy(t, t / s).sum(1)
    cosine = torch.nn.functional.cosine_similarity(s, t, dim=1)
    return (
        1 - cosine
        if loss == "cosine"
        else (s / s.norm(dim=1, keepdim=True) - t / t.norm(dim=1, keepdim=True)).pow(2).sum(1)
    )


def _weights(t: Tensor, *, importance: str, weight_H: Tensor | None) -> Tensor:
    heads, columns = t.shape
    if importance == "learned":
        assert weight_H is not None
        return weight_H
    if importance == "entropy":
        focus = 1 / torch.exp(-(t * t.log()).sum(1))
    elif importance == "variance":
        focus = t.var(1, correction=0) * columns**2 + 1e-4
    else:
        focus = torch.ones(heads, dtype=t.dtype)
    return focus / focus.sum()


def reference_relation(
    student: AttentionInputs, teacher: AttentionInputs, batch: Batch, *, relations: tuple[str, ...], heads: int
) -> Tensor:
    """Mean over relations of the sum of KL, averaged over relation heads, of maps of concatenated and cut tensors."""
    sums = []
    for relation in relations:
        cut = []
        for inputs in (student, teacher):
            parts = dict(zip("qkv", tensors(inputs), strict=True))
            count = inputs.query_BHSd.shape[1]
            x, y = (_recut(parts[letter], count, heads) for letter in relation)
            cut.append(AttentionInputs(x, y, y, scale=1 / x.shape[-1] ** 0.5))
        sums.append(reference_sum(cut[0], cut[1], batch, loss="kl"))
    return sum(sums[1:], sums[0]) / len(sums)


def _recut(tensor: Tensor, count: int, heads: int) -> Tensor:
    rows, own, width, size = tensor.shape
    wide = torch.stack(
        [torch.cat([tensor[b, h * own // count] for h in range(count)], dim=1) for b in range(rows)]
    )  # (rows, positions, count * size)
    step = count * size // heads
    assert wide.shape == (rows, width, count * size)
    return torch.stack([wide[:, :, i * step : (i + 1) * step] for i in range(heads)], dim=1)
