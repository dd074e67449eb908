"""The row function, eager or compiled, behind one call."""

import logging
import threading
import types
from collections.abc import Callable

import torch

from largekd.objectives.plugins import PluginTerm
from largekd.objectives.rows import RowBlock, RowPlan, RowResult, evaluate_rows

_LOGGER = logging.getLogger(__name__)

_CompiledRows = Callable[[RowBlock], RowResult]


class RowFunction:
    """Calls `evaluate_rows`; with `compiles` through torch.compile, one compiled form per plan.

    Health figures are rare and stay eager; so do terms of the user's own, which differentiate inside. Where
    compilation fails (no C++ compiler, an unsupported interpreter) the eager form takes over for good and the reason is
    logged once. A failed compilation has executed nothing, so that the block is simply evaluated again. Calls may come
    from several threads.
    """

    def __init__(self, *, compiles: bool) -> None:
        self.compiles = compiles
        self._compiled: dict[RowPlan, _CompiledRows] = {}
        self._met: set[tuple[object, ...]] = set()
        self._compiling = threading.Lock()

    def __call__(self, block: RowBlock, /, *, plan: RowPlan) -> RowResult:
        if not self.compiles or plan.measure or any(isinstance(term.divergence, PluginTerm) for term in plan.terms):
            return evaluate_rows(block, plan=plan)
        rows = block.student_RV
        kind = (plan, rows.shape, rows.dtype, rows.device, torch.get_num_threads())
        if kind in self._met:
            return self._compiled[plan](block)
        with self._compiling:  # threads that meet a kind together would each compile it
            return self._first(block, plan=plan, kind=kind)

    def _first(self, block: RowBlock, /, *, plan: RowPlan, kind: tuple[object, ...]) -> RowResult:
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # loading these takes seconds

        if self.compiles:
            if plan not in self._compiled:
                self._compiled[plan] = torch.compile(_rows_of(plan), dynamic=False, fullgraph=True)
            try:
                result = self._compiled[plan](block)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                self.compiles = False
                reason = " ".join(str(error).split())[:300]
                _LOGGER.warning("objective.compile: compilation failed, the row function runs eagerly: %s", reason)
            else:
                self._met.add(kind)
                return result
        return evaluate_rows(block, plan=plan)


def _rows_of(plan: RowPlan, /) -> _CompiledRows:
    """`evaluate_rows` for one plan with a code object of its own: torch counts recompilations per code object."""

    def rows(block: RowBlock) -> RowResult:
        return evaluate_rows(block, plan=plan)

    return types.FunctionType(rows.__code__.replace(), rows.__globals__, rows.__name__, None, rows.__closure__)
