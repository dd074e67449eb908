"""What one pass of the student with its losses is asked for, beside its rows and its signal."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from largekd.objectives.alignment import AlignmentPlan


@dataclass(frozen=True)
class PassOptions:
    """The options of one pass; the default is what an evaluation asks for, without its figures.

    plan: the pairs of layers that take part; without pairs the alignment is left out, and its sums are 0.
    temperature: (), in place of 1. limit: (), the score above which a selection keeps a token. load_LX: the share of
    each expert in what the routers have chosen so far. measure: give health figures too. term_gradients: give
    the squared norm of each term's gradient too. left_out: layers of the student that hand their input on.
    Tensors stand on the model's device: an engine moves nothing that is in here.
    """

    plan: AlignmentPlan = field(default_factory=AlignmentPlan)
    temperature: Tensor | None = None
    limit: Tensor | None = None
    load_LX: Tensor | None = None
    measure: bool = False
    term_gradients: bool = False
    left_out: Sequence[int] = ()


PLAIN = PassOptions()
