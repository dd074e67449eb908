"""Terms of the user's own: functions in modules that a recipe names."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from largekd.errors import ConfigError
from largekd.runtime.user_modules import import_user_module

TABLE = "TERMS"


@dataclass(frozen=True)
class TermRows:
    """What a term of the user's is given: some rows (tokens) of both models' logits, in float32.

    student_logits_RV, teacher_logits_RV: (rows, ids), after the temperature, over the ids that both models have.
    labels_R: (rows,) the next token's id, which may lie beyond the shared ids.
    """

    student_logits_RV: Tensor
    teacher_logits_RV: Tensor
    labels_R: Tensor


PluginFunction = Callable[..., Tensor]
"""(TermRows, **options) -> (rows,), differentiable in the student's logits; the blend's T² is applied outside."""


@dataclass(frozen=True)
class PluginTerm:
    """A function with its options; differentiated by autograd, one block of rows at a time."""

    function: PluginFunction
    options: tuple[tuple[str, Any], ...] = ()

    def evaluate(self, rows: TermRows, *, factor_R: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """The value per row, and the gradient of Σ factor · value with respect to the student's logits."""
        with torch.enable_grad():
            student_RV = rows.student_logits_RV.detach().requires_grad_(gradient)
            value_R = self.function(TermRows(student_RV, rows.teacher_logits_RV, rows.labels_R), **dict(self.options))
            self._check(value_R, rows=factor_R.numel())
            if not gradient:
                return value_R.detach(), None
            if not value_R.requires_grad:
                raise ConfigError(
                    f"plugins: the term {self._name} returned values that do not depend on student_logits_RV, or are "
                    "detached from it; a term is differentiable in them."
                )
            (gradient_RV,) = torch.autograd.grad((value_R * factor_R).sum(), student_RV)
        return value_R.detach(), gradient_RV

    @property
    def _name(self) -> str:
        return repr(getattr(self.function, "__name__", self.function))

    def _check(self, value: object, *, rows: int) -> None:
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"plugins: the term {self._name} returned {type(value).__name__}; a term returns a tensor with one "
                "value per row."
            )
        if value.shape != (rows,):
            raise ConfigError(
                f"plugins: the term {self._name} returned the shape {tuple(value.shape)} for {rows} rows; a term "
                "returns one value per row."
            )


def load_plugins(names: Sequence[str]) -> dict[str, PluginFunction]:
    """The terms of all modules by name.

    Errors: ConfigError for a module that cannot be imported or has no TERMS, and for a name that two of them use.
    """
    found: dict[str, PluginFunction] = {}
    for name in names:
        table = getattr(import_user_module(name, key="plugins"), TABLE, None)
        if not isinstance(table, Mapping) or not all(callable(function) for function in table.values()):
            raise ConfigError(f"plugins: {name!r} has no {TABLE}, a dictionary of term names and functions; add it.")
        for term, function in table.items():
            if term in found:
                raise ConfigError(f"plugins: two modules name a term {term!r}; rename the one in {name!r}.")
            found[term] = function
    return found
