"""Which keys a query sees, and attention maps of a block of queries.

Shape letters: B sequences, S positions, Q queries (positions, or with a translation groups), K keys, C columns that
maps are compared on, G key heads (of a translation: groups), H heads, d width of a head.

With one tokenizer a map's columns are the keys. With a translation a query is the last token of a group, and the
probabilities of a group's keys are added up: column 1 + g is group g of the row, column 0 holds every key outside of
groups. A column takes part in a row where both models can see it; a key of any other column is hidden. Otherwise KL
would be infinite wherever one model has unaligned tokens, or a longer window, and the other has not.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from largekd.contracts import Batch, Translation
from largekd.objectives.blockwise import precise


@dataclass(frozen=True)
class MapSide:
    """One model's keys and queries.

    segment_BK: sample numbers of keys, 0 is fill. position_BQ, segment_BQ: of each query (position_BQ may have one
    row for all). group_BK: column of each key; None: columns are keys. bounds_3Q: on the host, over all rows: the
    first key that a query may see, and the queries' lowest and highest position; highest −1: no row has the query.
    """

    segment_BK: Tensor
    position_BQ: Tensor
    segment_BQ: Tensor
    group_BK: Tensor | None
    bounds_3Q: Tensor

    def keys_of(self, queries: slice, /, *, window: int | None) -> slice | None:
        """The keys that a block of queries can see; None: no row has any of these queries."""
        first_Q, lowest_Q, highest_Q = self.bounds_3Q[:, queries]
        real_Q = highest_Q >= 0
        if not bool(real_Q.any()):
            return None
        start, lowest = int(first_Q[real_Q].min()), int(lowest_Q[real_Q].min())
        if window is not None:
            start = max(start, lowest - window + 1)
        return slice(start, int(highest_Q.max()) + 1)

    def visible(self, queries: slice, keys: slice, /, *, window: int | None) -> Tensor:
        """(B, Q, K) bool: causal, of the same sample, among the last `window` positions."""
        position_BQ1 = self.position_BQ[:, queries, None]
        key_K = torch.arange(keys.start, keys.stop, device=position_BQ1.device)
        seen = key_K <= position_BQ1
        if window is not None:
            seen = seen & (key_K > position_BQ1 - window)
        return seen & (self.segment_BQ[:, queries, None] == self.segment_BK[:, None, keys])


@dataclass(frozen=True)
class AttentionLayout:
    """The queries of a batch on both sides. valid_BQ: which of them exist. columns: None where columns are keys."""

    student: MapSide
    teacher: MapSide
    valid_BQ: Tensor
    columns: int | None

    @property
    def queries(self) -> int:
        """Queries of a row, fill included."""
        return self.valid_BQ.shape[1]

    @staticmethod
    def of(batch: Batch, /) -> "AttentionLayout":
        """The layout of a batch, made without waiting for a device.

        For a batch on the host, and with one tokenizer for any batch that lists its segments, blocks later skip keys
        and queries that no row needs.
        """
        assert batch.segment_BS is not None, "attention alignment needs the samples' numbers"
        if batch.translation is not None:
            return _translated(batch, batch.translation)
        segment_BS = batch.segment_BS
        position_1S = torch.arange(segment_BS.shape[1], device=segment_BS.device)[None]
        side = MapSide(segment_BS, position_1S, segment_BS, None, _bounds(batch))
        return AttentionLayout(side, side, segment_BS > 0, None)


def _bounds(batch: Batch, /) -> Tensor:
    rows, width = batch.input_ids_BS.shape
    position_S = torch.arange(width)
    if len(batch.segments) != rows:
        return torch.stack([torch.zeros_like(position_S), position_S, position_S])
    first_S = torch.full((width,), width)
    for segment in (segment for row in batch.segments for segment in row):
        place = first_S[segment.offset : segment.offset + segment.length]
        place.clamp_(max=segment.offset)
    return torch.stack([first_S, position_S, position_S.where(first_S < width, -1)])


def _translated(batch: Batch, translation: Translation, /) -> AttentionLayout:
    teacher = translation.teacher
    assert batch.segment_BS is not None and teacher.segment_BS is not None
    rows, width = batch.segment_BS.shape
    assert teacher.segment_BS.shape[0] == rows, "a translation keeps the rows"
    teacher_width = teacher.segment_BS.shape[1]
    start_G = translation.student_start_G
    row_G = start_G // width
    number_G = translation.student_group_BS.flatten()[start_G] - 1
    # The longest row is a number that only the host can read freely; elsewhere an upper bound costs no wait.
    queries = min(width, teacher_width, start_G.numel())
    if _on_host(start_G) and queries:
        queries = int(number_G.max()) + 1
    valid_BQ = torch.zeros(rows, queries, dtype=torch.bool, device=start_G.device)
    valid_BQ = valid_BQ.index_put((row_G, number_G), torch.ones_like(start_G, dtype=torch.bool))

    def side(segment_BS: Tensor, group_BS: Tensor, start_G: Tensor, length_G: Tensor) -> MapSide:
        last_G = start_G + length_G - 1 - row_G * segment_BS.shape[1]
        position_BQ = torch.zeros(rows, queries, dtype=last_G.dtype, device=last_G.device)
        position_BQ = position_BQ.index_put((row_G, number_G), last_G)
        segment_BQ = segment_BS.gather(1, position_BQ)
        return MapSide(segment_BS, position_BQ, segment_BQ, group_BS, _group_bounds(position_BQ, valid_BQ, segment_BS))

    return AttentionLayout(
        side(batch.segment_BS, translation.student_group_BS, start_G, translation.student_length_G),
        side(
            teacher.segment_BS,
            translation.teacher_group_BS,
            translation.teacher_start_G,
            translation.teacher_length_G,
        ),
        valid_BQ,
        1 + queries,
    )


def _group_bounds(position_BQ: Tensor, valid_BQ: Tensor, segment_BS: Tensor, /) -> Tensor:
    width, queries = segment_BS.shape[1], position_BQ.shape[1]
    if not _on_host(position_BQ) or not queries:
        bounds = torch.tensor([0, 0, width - 1])
        return bounds[:, None].expand(3, queries)
    lowest_Q = position_BQ.where(valid_BQ, width).amin(0)
    highest_Q = position_BQ.where(valid_BQ, -1).amax(0)
    return torch.stack([torch.zeros_like(lowest_Q), lowest_Q, highest_Q])


def _on_host(tensor: Tensor, /) -> bool:
    return tensor.device.type == "cpu"


def common_window(student: int | None, teacher: int | None, /) -> int | None:
    """The narrower of two windows over the same positions."""
    return min((window for window in (student, teacher) if window is not None), default=None)


def scores(query_BHQd: Tensor, key_BGKd: Tensor, /, *, scale: float, softcap: float | None) -> Tensor:
    """(B, H, Q, K): softcap(scale · query · keyᵀ); query head h reads key head ⌊h·G/H⌋."""
    rows, heads, queries, width = query_BHQd.shape
    key_heads = key_BGKd.shape[1]
    grouped = (query_BHQd * scale).reshape(rows, key_heads, heads // key_heads * queries, width)
    found = torch.matmul(grouped, key_BGKd.transpose(-1, -2)).view(rows, heads, queries, key_BGKd.shape[2])
    return found if softcap is None else softcap * torch.tanh(found / softcap)


def hide(scores_BHQK: Tensor, visible_BQK: Tensor, /) -> Tensor:
    """The scores, lowered to the smallest finite number where a key is not visible: a row of fill gives no NaN."""
    return scores_BHQK.masked_fill_(~visible_BQK[:, None], torch.finfo(scores_BHQK.dtype).min)


def collect(values_BHQK: Tensor, group_BK: Tensor, /, *, columns: int) -> Tensor:
    """(B, H, Q, columns): sums over the keys of each column."""
    index = group_BK[:, None, None].expand(values_BHQK.shape)
    return values_BHQK.new_zeros(*values_BHQK.shape[:3], columns).scatter_add(-1, index, values_BHQK)


def shared_columns(student: Tensor, teacher: Tensor, /, *, groups: tuple[Tensor, Tensor], columns: int) -> Tensor:
    """(B, Q, columns) bool: columns of which both sides see a key. `student`, `teacher`: (B, Q, K) what each sees."""
    counts = [
        collect(seen[:, None].to(precise(torch.float16)), group_BK, columns=columns)[:, 0]
        for seen, group_BK in zip((student, teacher), groups, strict=True)
    ]
    return (counts[0] > 0) & (counts[1] > 0)


def keys_of_columns(columns_BQC: Tensor, group_BK: Tensor, /) -> Tensor:
    """(B, Q, K): each key's entry of its column."""
    rows, queries, _ = columns_BQC.shape
    return columns_BQC.gather(-1, group_BK[:, None].expand(rows, queries, group_BK.shape[1]))


def select_queries(tensor_BHSd: Tensor, position_BQ: Tensor, /) -> Tensor:
    """(B, H, Q, d): the queries at `position_BQ`."""
    rows, heads, _, width = tensor_BHSd.shape
    return tensor_BHSd.gather(2, position_BQ[:, None, :, None].expand(rows, heads, position_BQ.shape[1], width))
