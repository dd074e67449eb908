"""The projections of several teachers for the chunks of a walk.

Shape letters: T counted tokens, C tokens of one chunk, R rows of one block, V shared ids, E a teacher's width, P
positions, M members.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from largekd.contracts import MixtureSignal
from largekd.objectives.mixture import MixtureRows


@dataclass(frozen=True)
class MemberBuffers:
    """Per member one reused buffer (chunk, shared ids) in the dtype of its head."""

    signal: MixtureSignal
    buffers_CV: tuple[Tensor, ...]
    biases_V: tuple[Tensor | None, ...]
    log_weight_M: Tensor

    @classmethod
    def allocate(cls, signal: MixtureSignal, *, rows: int, ids: int, dtype: torch.dtype) -> "MemberBuffers":
        """Buffers for chunks of `rows` tokens; `dtype` is that of blocks."""
        heads = [member.head for member in signal.members]
        return cls(
            signal=signal,
            buffers_CV=tuple(head.weight_VD.new_empty(rows, ids) for head in heads),
            biases_V=tuple(None if head.bias_V is None else head.bias_V[:ids] for head in heads),
            log_weight_M=signal.log_weight_M.to(dtype),
        )

    def possible(self) -> Tensor | None:
        """(V,) false for ids that a bias of −inf makes impossible for every member; None: there are none."""
        impossible = None
        for member, bias_V in zip(self.signal.members, self.biases_V, strict=True):
            if bias_V is None or member.head.softcap is not None:
                return None
            gone_V = torch.isneginf(bias_V)
            impossible = gone_V if impossible is None else impossible & gone_V
        return None if impossible is None else ~impossible

    def project(self, positions_C: Tensor) -> None:
        """Fill the buffers' first rows with hidden · weightᵀ for these flat positions."""
        for member, buffer_CV in zip(self.signal.members, self.buffers_CV, strict=True):
            weight_VE = member.head.weight_VD[: buffer_CV.shape[1]]
            hidden_CE = member.hidden_BSE.reshape(-1, member.hidden_BSE.shape[-1])[positions_C]
            torch.mm(hidden_CE.to(weight_VE.dtype), weight_VE.t(), out=buffer_CV[: positions_C.numel()])

    def block(self, rows: slice, *, tokens: slice) -> MixtureRows:
        """The rows of this chunk that are `tokens` of the walk."""
        route_T = self.signal.route_T
        return MixtureRows(
            members_RV=tuple(buffer_CV[rows] for buffer_CV in self.buffers_CV),
            biases_V=self.biases_V,
            log_weight_M=self.log_weight_M,
            route_R=None if route_T is None else route_T[tokens],
        )
