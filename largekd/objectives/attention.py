"""Alignment of attention: distances between rows of the student's and the teacher's attention maps.

Shape letters: B sequences, S positions, Q queries of a block, K keys, C columns of a map, H heads, G key heads, d width
of a head, R relation heads, P pairs of layers.

Maps are formed from captured queries and keys, in float32, for `query_block` queries of each row at a time, for both
models and under one mask: causal, of the same sample, within the narrower of both windows. Per query row and head, s
and t being the student's and the teacher's row:

cosine    1 − s·t / (‖s‖ ‖t‖)
mse       ‖ s/‖s‖ − t/‖t‖ ‖², which is twice `cosine`
kl        KL(t ‖ s)
relation  KL of softmax(x·yᵀ/√d) with x, y among the queries, keys and values, their heads concatenated and cut into a
          common number of relation heads (MiniLMv2, arXiv 2012.15828, section 3); key and value heads are repeated to
          the number of query heads first. Relations know no window, no logit cap and no scale of the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from largekd.config.alignment import AttentionConfig
from largekd.contracts import AttentionInputs
from largekd.errors import ConfigError
from largekd.models.taps import AttentionShape
from largekd.objectives.attention_maps import (
    AttentionLayout,
    MapSide,
    collect,
    common_window,
    hide,
    keys_of_columns,
    scores,
    select_queries,
    shared_columns,
)
from largekd.objectives.blockwise import blockwise_sum
from largekd.objectives.heads import (
    Importance,
    LearnedHeadWeights,
    match_maps,
    matched_heads,
    matching_weights,
    teacher_importance,
)

RowLoss = Literal["cosine", "mse", "kl"]


class AttentionTerm(nn.Module):
    """The mean over pairs of layers of Σ over queries of the head-weighted loss of their rows.

    `pairs` are [student layer, teacher layer], resolved; both shapes hold for all layers. `translated`: the teacher has
    another tokenizer. Raises ConfigError for head counts, widths or a loss that cannot be compared.
    """

    def __init__(
        self,
        config: AttentionConfig,
        /,
        *,
        pairs: Sequence[tuple[int, int]],
        student: AttentionShape,
        teacher: AttentionShape,
        translated: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.pairs = tuple(pairs)
        assert self.pairs and len(set(self.pairs)) == len(self.pairs), f"pairs must differ: {self.pairs}"
        if translated and config.loss == "relation":
            raise ConfigError(
                f"objective.attention.{config.name}.loss is 'relation', which compares positions one to one, but the "
                "teacher has another tokenizer: use 'kl', 'cosine' or 'mse'"
            )
        self.heads = matched_heads(config, student=student, teacher=teacher)
        self.head_weights: LearnedHeadWeights | None = None
        if config.head_importance == "learned":
            self.head_weights = LearnedHeadWeights(pairs=len(self.pairs), heads=self.heads)

    def forward(
        self,
        student: Mapping[int, AttentionInputs],
        teacher: Mapping[int, AttentionInputs],
        *,
        layout: AttentionLayout,
        pairs: Sequence[tuple[int, int]],
    ) -> Tensor:
        """The differentiable sum over valid queries, averaged over heads and over the active `pairs`.

        A scalar, float32 (float64 for float64 inputs); its count is "positions". Mappings are by layer. No call waits
        for the device. Parameters of inactive pairs get the gradient 0.
        """
        weights_PH = None if self.head_weights is None else self.head_weights()
        total = torch.zeros((), device=layout.valid_BQ.device)
        if weights_PH is not None:
            total = total + 0 * weights_PH.sum()
        for pair in pairs:
            weight_H = None if weights_PH is None else weights_PH[self.pairs.index(pair)]
            found = self._pair_sum(student[pair[0]], teacher[pair[1]], layout=layout, weight_H=weight_H)
            total = total + found / len(pairs)
        return total

    def _pair_sum(
        self, student: AttentionInputs, teacher: AttentionInputs, /, *, layout: AttentionLayout, weight_H: Tensor | None
    ) -> Tensor:
        config = self.config
        loss: RowLoss = "kl" if config.loss == "relation" else config.loss
        compared = [(student, teacher)]
        if config.loss == "relation":
            compared = [
                (relation_inputs(student, name, heads=self.heads), relation_inputs(teacher, name, heads=self.heads))
                for name in config.relations
            ]
        sums = [
            compare_maps(
                mine,
                theirs,
                layout=layout,
                loss=loss,
                heads=self.heads,
                importance=config.head_importance,
                weight_H=weight_H,
                query_block=config.query_block,
            )
            for mine, theirs in compared
        ]
        return torch.stack(sums).mean()


def relation_inputs(inputs: AttentionInputs, relation: str, /, *, heads: int) -> AttentionInputs:
    """Attention inputs whose map is softmax(x·yᵀ/√d) of `relation` ("qk": x are queries, y keys) in `heads` heads."""
    tensors = {"q": inputs.query_BHSd, "k": inputs.key_BGSd, "v": inputs.value_BGSd}
    query_heads = inputs.query_BHSd.shape[1]

    def cut(letter: str) -> Tensor:
        tensor_BNSd = tensors[letter]
        tensor_BHSd = tensor_BNSd.repeat_interleave(query_heads // tensor_BNSd.shape[1], dim=1)
        return tensor_BHSd.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)

    x_BRSd, y_BRSd = cut(relation[0]), cut(relation[1])
    return AttentionInputs(query_BHSd=x_BRSd, key_BGSd=y_BRSd, value_BGSd=y_BRSd, scale=x_BRSd.shape[-1] ** -0.5)


def compare_maps(
    student: AttentionInputs,
    teacher: AttentionInputs,
    /,
    *,
    layout: AttentionLayout,
    loss: RowLoss,
    heads: int,
    importance: Importance = "uniform",
    weight_H: Tensor | None = None,
    query_block: int,
) -> Tensor:
    """Σ over valid queries and heads of head weight · row loss, differentiable in the student's tensors and `weight_H`.

    heads: to which both sides' heads are matched. weight_H: their weights where `importance` is learned.
    """
    windows = (student.window, teacher.window)
    if layout.columns is None:
        windows = (common_window(*windows),) * 2
    else:
        student = replace(student, query_BHSd=select_queries(student.query_BHSd, layout.student.position_BQ))
        teacher = replace(teacher, query_BHSd=select_queries(teacher.query_BHSd, layout.teacher.position_BQ))
    assert student.query_BHSd.shape[2] == teacher.query_BHSd.shape[2] == layout.queries
    blocks = _blocks(layout, windows=windows, query_block=query_block)
    comparison = _Comparison(loss, heads, importance, layout, student, teacher, windows, blocks)
    inputs = [student.query_BHSd, student.key_BGSd]
    cuts: list[tuple[slice | None, ...]] = [(block.queries, block.student_keys) for block in blocks]
    if weight_H is not None:
        inputs.append(weight_H)
        cuts = [(*cut, None) for cut in cuts]
    return blockwise_sum(comparison, inputs=inputs, blocks=cuts)


@dataclass(frozen=True)
class _Block:
    queries: slice
    student_keys: slice
    teacher_keys: slice


def _blocks(layout: AttentionLayout, /, *, windows: tuple[int | None, int | None], query_block: int) -> list[_Block]:
    """Blocks of queries with the keys that they can see; blocks without a query are left out."""
    found = []
    for start in range(0, layout.queries, query_block):
        queries = slice(start, min(start + query_block, layout.queries))
        mine = layout.student.keys_of(queries, window=windows[0])
        theirs = layout.teacher.keys_of(queries, window=windows[1])
        if mine is not None and theirs is not None:
            found.append(_Block(queries, mine, theirs))
    return found


@dataclass(frozen=True)
class _Sight:
    """What a block's queries see: keys of either side, and how many columns; groups (B, K) where columns are groups."""

    student_BQK: Tensor
    teacher_BQK: Tensor
    columns_BQ: Tensor
    groups: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class _Comparison:
    """The value of one block of queries, for `blockwise_sum`."""

    loss: RowLoss
    heads: int
    importance: Importance
    layout: AttentionLayout
    student: AttentionInputs
    teacher: AttentionInputs
    windows: tuple[int | None, int | None]
    blocks: list[_Block]

    def __call__(self, number: int, query_BHQd: Tensor, key_BGKd: Tensor, weight_H: Tensor | None = None) -> Tensor:
        block = self.blocks[number]
        sight = self._sight(block)
        student = hide(
            scores(query_BHQd, key_BGKd, scale=self.student.scale, softcap=self.student.softcap), sight.student_BQK
        )
        teacher_BHQC = self._teacher_maps(block, sight, dtype=query_BHQd.dtype)
        student_groups = None if sight.groups is None else sight.groups[0]
        student_BHQC = self._maps(student, student_groups, logarithms=self.loss == "kl")
        rows_BHQ = _row_loss(self.loss, student_BHQC, teacher_BHQC)
        if self.importance == "learned":
            assert weight_H is not None
            rows_BQ = (rows_BHQ * weight_H[:, None]).sum(1)
        elif self.importance == "uniform":
            rows_BQ = rows_BHQ.mean(1)
        else:
            weight_BHQ = teacher_importance(self.importance, teacher_BHQC, columns_BQ=sight.columns_BQ)
            rows_BQ = (rows_BHQ * weight_BHQ).sum(1)
        return rows_BQ.masked_fill(~self.layout.valid_BQ[:, block.queries], 0).sum()

    def _sight(self, block: _Block, /) -> _Sight:
        sides = (self.layout.student, self.layout.teacher)
        cuts = (block.student_keys, block.teacher_keys)
        seen = [
            side.visible(block.queries, keys, window=window)
            for side, keys, window in zip(sides, cuts, self.windows, strict=True)
        ]
        if self.layout.columns is None:
            return _Sight(seen[0], seen[1], seen[0].sum(-1), None)
        groups = (_groups(sides[0], cuts[0]), _groups(sides[1], cuts[1]))
        shared_BQC = shared_columns(seen[0], seen[1], groups=groups, columns=self.layout.columns)
        student, teacher = (
            seen_BQK & keys_of_columns(shared_BQC, group_BK) for seen_BQK, group_BK in zip(seen, groups, strict=True)
        )
        return _Sight(student, teacher, shared_BQC.sum(-1), groups)

    @torch.no_grad()
    def _teacher_maps(self, block: _Block, sight: _Sight, /, *, dtype: torch.dtype) -> Tensor:
        teacher = self.teacher
        query_BHQd = teacher.query_BHSd[:, :, block.queries].to(dtype)
        key_BGKd = teacher.key_BGSd[:, :, block.teacher_keys].to(dtype)
        found = hide(scores(query_BHQd, key_BGKd, scale=teacher.scale, softcap=teacher.softcap), sight.teacher_BQK)
        return self._maps(found, None if sight.groups is None else sight.groups[1])

    def _maps(self, scores_BHQK: Tensor, group_BK: Tensor | None, /, *, logarithms: bool = False) -> Tensor:
        """(B, matched heads, Q, C): rows of a map, or their logarithms."""
        matching = matching_weights(scores_BHQK.shape[1], self.heads, like=scores_BHQK)
        if logarithms and group_BK is None and matching is None:
            return torch.log_softmax(scores_BHQK, dim=-1)
        maps = torch.softmax(scores_BHQK, dim=-1)
        if group_BK is not None:
            assert self.layout.columns is not None
            maps = collect(maps, group_BK, columns=self.layout.columns)
        maps = match_maps(maps, matching)
        return _finite_log(maps) if logarithms else maps


def _groups(side: MapSide, keys: slice, /) -> Tensor:
    assert side.group_BK is not None
    return side.group_BK[:, keys]


def _row_loss(loss: RowLoss, student_BHQC: Tensor, teacher_BHQC: Tensor, /) -> Tensor:
    """(B, H, Q): the distance of every row; the student's are logarithms for `kl`."""
    if loss == "kl":
        # Where a column is hidden the teacher has exactly 0 and both logarithms are finite.
        return (teacher_BHQC * (_finite_log(teacher_BHQC) - student_BHQC)).sum(-1)
    # 1 − cos as half the squared distance of unit rows: the subtraction from 1 would cancel for similar rows.
    distance = (_unit(student_BHQC) - _unit(teacher_BHQC)).square().sum(-1)
    return distance if loss == "mse" else distance / 2


def _finite_log(maps: Tensor, /) -> Tensor:
    """log p, at least the logarithm of the smallest normal number (e⁻⁸⁷ in float32); the gradient is 0 there."""
    return maps.clamp_min(torch.finfo(maps.dtype).tiny).log()


def _unit(rows: Tensor, /) -> Tensor:
    return rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
