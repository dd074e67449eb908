"""The row function, eager or compiled, behind one call."""

import logging
from collections.abc import Callable
from functools import partial

import torch

from largekd.objectives.rows import RowBlock, RowPlan, RowResult, evaluate_rows

_LOGGER = logging.getLogger(__name__)


class RowFunction:
    """Calls `evaluate_rows`; with `compiles` through torch.compile, one compiled form per plan.

    Health figures are rare and stay eager. Where compilation fails (no C++ compiler, an unsupported interpreter) the
    eager form takes over for good and the reason is logged once. A failed compilation has executed nothing, so that
    the block is simply evaluated again.
    """

    def __init__(self, *, compiles: bool) -> None:
        self.compiles = compiles
        self._compiled: dict[RowPlan, Callable[[RowBlock], RowResult]] = {}

    def __call__(self, block: RowBlock, /, *, plan: RowPlan) -> RowResult:
        if not self.compiles or plan.measure:
            return evaluate_rows(block, plan=plan)
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # loading these takes seconds

        if plan not in self._compiled:
            self._compiled[plan] = torch.compile(partial(evaluate_rows, plan=plan), dynamic=False, fullgraph=True)
        try:
            return self._compiled[plan](block)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            self.compiles = False
            self._compiled.clear()
            reason = " ".join(str(error).split())[:300]
            _LOGGER.warning("objective.compile: compilation failed, the row function runs eagerly: %s", reason)
            return evaluate_rows(block, plan=plan)
