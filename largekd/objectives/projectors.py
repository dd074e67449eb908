"""From the student's width to the teacher's, so that hidden states can be compared.

Shape letters: P positions, D student width, E teacher width, F width of the comparison (E but for pooling), R rank.

Every module draws its own parameters inside its own `__init__` and nowhere else: under ZeRO-3 they are partitioned
when that call ends. The functions of `nn.init` are not used, because models that will be loaded are built with them
switched off. Draws come from torch's global generator, which the caller seeds. Matrices start with the spread that
keeps the variance of their input.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from largekd.config.alignment import (
    LinearProjectorConfig,
    LowRankProjectorConfig,
    MLPProjectorConfig,
    NoProjectorConfig,
    PoolProjectorConfig,
    ProjectorConfig,
)
from largekd.errors import ConfigError

GELU_GAIN = 2.0**0.5
"""Factor on the spread of a matrix that follows a GELU, which halves the mean square of what it is given."""


class Projector(nn.Module):
    """`forward` maps student states (..., D) to (..., F); `of_teacher` the teacher's (..., E) to (..., F).

    `width` is F. `of_teacher` has no parameters, so it may be called outside `forward`.
    """

    width: int

    def of_teacher(self, teacher: Tensor) -> Tensor:
        """The teacher's states at the width of the comparison."""
        return teacher


class IdentityProjector(Projector):
    """States as they are."""

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, student: Tensor) -> Tensor:
        """`student` itself."""
        return student


class PoolProjector(Projector):
    """Averages of neighbouring columns: the wider side is brought to the narrower width, the other left as it is.

    Column j of F is the mean of columns ⌊j·W/F⌋ to ⌈(j+1)·W/F⌉ − 1 of W; they overlap where F does not divide W.
    Averages are taken in float32 or better.
    """

    def __init__(self, *, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.width = min(student_width, teacher_width)

    def forward(self, student: Tensor) -> Tensor:
        """(..., D) to (..., F)."""
        return _pooled(student, width=self.width)

    def of_teacher(self, teacher: Tensor) -> Tensor:
        """(..., E) to (..., F)."""
        return _pooled(teacher, width=self.width)


class Projection(nn.Linear):
    """x·Wᵀ (+ b) in the dtype of its weight; W starts normal with deviation gain/√in, b at zero."""

    def __init__(self, *, in_width: int, out_width: int, bias: bool, gain: float = 1.0) -> None:
        super().__init__(in_width, out_width, bias=bias)
        _draw(self.weight, deviation=gain * in_width**-0.5)
        if bias:
            _draw(self.bias, deviation=0.0)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return super().forward(input.to(self.weight.dtype))


class LinearProjector(Projector):
    """One linear map."""

    def __init__(self, *, student_width: int, teacher_width: int, bias: bool) -> None:
        super().__init__()
        self.width = teacher_width
        self.map = Projection(in_width=student_width, out_width=teacher_width, bias=bias)

    def forward(self, student: Tensor) -> Tensor:
        """(..., D) to (..., E)."""
        return self.map(student)


class TwoLayers(nn.Module):
    """Linear, GELU, linear, with biases: W₂·gelu(W₁·x + b₁) + b₂."""

    def __init__(self, *, in_width: int, hidden: int, out_width: int) -> None:
        super().__init__()
        self.inner = Projection(in_width=in_width, out_width=hidden, bias=True)
        self.outer = Projection(in_width=hidden, out_width=out_width, bias=True, gain=GELU_GAIN)

    def forward(self, states: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return self.outer(F.gelu(self.inner(states)))


class MLPProjector(Projector):
    """Linear, GELU, linear."""

    def __init__(self, *, student_width: int, teacher_width: int, hidden: int) -> None:
        super().__init__()
        self.width = teacher_width
        self.map = TwoLayers(in_width=student_width, hidden=hidden, out_width=teacher_width)

    def forward(self, student: Tensor) -> Tensor:
        """(..., D) to (..., E)."""
        return self.map(student)


class LowRankIdentityProjector(Projector):
    """I·x + U·(V·x) with the rectangular identity: x cut, or filled with zeros, to E columns; U (E, R) starts at zero.

    Source of the low-rank map that starts at zero: Hu et al. 2021 (LoRA), arXiv 2106.09685, section 4.1.
    """

    def __init__(self, *, student_width: int, teacher_width: int, rank: int) -> None:
        super().__init__()
        self.width = teacher_width
        self.down_RD = nn.Parameter(torch.empty(rank, student_width))
        self.up_ER = nn.Parameter(torch.empty(teacher_width, rank))
        _draw(self.down_RD, deviation=student_width**-0.5)
        _draw(self.up_ER, deviation=0.0)

    def forward(self, student: Tensor) -> Tensor:
        """(..., D) to (..., E)."""
        narrow = F.linear(student.to(self.down_RD.dtype), self.down_RD)
        # A negative amount of padding cuts.
        identity = F.pad(student, (0, self.width - student.shape[-1]))
        return identity + F.linear(narrow, self.up_ER)


def build_projector(config: ProjectorConfig, *, student_width: int, teacher_width: int, key: str) -> Projector:
    """The projector of `config` with fresh float32 parameters.

    key: the term's place in the configuration, such as `objective.features.0`.
    Errors: ConfigError when the widths differ and `none` is asked for, or when a rank exceeds one of the widths.
    """
    match config:
        case NoProjectorConfig():
            if student_width != teacher_width:
                raise ConfigError(
                    f"{key}.projector.kind = none: the student's states are {student_width} wide and the teacher's "
                    f"{teacher_width}, which can only be compared through pool, linear, mlp or low_rank_identity; "
                    f"change {key}.projector."
                )
            return IdentityProjector(width=student_width)
        case PoolProjectorConfig():
            return PoolProjector(student_width=student_width, teacher_width=teacher_width)
        case LinearProjectorConfig():
            return LinearProjector(student_width=student_width, teacher_width=teacher_width, bias=config.bias)
        case MLPProjectorConfig():
            hidden = config.hidden or teacher_width
            return MLPProjector(student_width=student_width, teacher_width=teacher_width, hidden=hidden)
        case LowRankProjectorConfig():
            narrower = min(student_width, teacher_width)
            if config.rank > narrower:
                raise ConfigError(
                    f"{key}.projector.rank = {config.rank}: a map between widths {student_width} and {teacher_width} "
                    f"has a rank of at most {narrower}; lower it."
                )
            return LowRankIdentityProjector(student_width=student_width, teacher_width=teacher_width, rank=config.rank)


def is_shared(config: ProjectorConfig) -> bool:
    """Whether all pairs of a term use one projector."""
    match config:
        case LinearProjectorConfig() | MLPProjectorConfig() | LowRankProjectorConfig():
            return config.shared
        case NoProjectorConfig() | PoolProjectorConfig():
            return False


def at_least_float32(states: Tensor) -> Tensor:
    """`states` in float32, or in their own dtype where that is finer."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def _draw(parameter: Tensor, *, deviation: float) -> None:
    with torch.no_grad():
        if deviation:
            parameter.normal_(std=deviation)
        else:
            parameter.zero_()


def _pooled(states: Tensor, *, width: int) -> Tensor:
    if states.shape[-1] == width:
        return states
    states = at_least_float32(states)
    if states.shape[-1] % width == 0:
        return states.unflatten(-1, (width, -1)).mean(-1)
    # As (rows, columns) it is one image of many channels: no dimension is inserted or copied.
    return F.adaptive_avg_pool1d(states.flatten(0, -2), width).reshape(*states.shape[:-1], width)
