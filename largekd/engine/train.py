"""The student's engine: forward, accumulated backward, optimizer step, state on disk."""

import importlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from largekd.engine.closing import close_engine
from largekd.engine.expert_inputs import ask_for_input_gradients
from largekd.engine.leaf_modules import mark_leaf_modules
from largekd.errors import CheckpointError
from largekd.optim.groups import ParameterGroup

_TAG = "state"


@dataclass(frozen=True)
class StepOutcome:
    """What an optimizer step did. `grad_norm` is the global norm before clipping; infinite when it was skipped."""

    applied: bool
    grad_norm: float


class TrainEngine:
    """A DeepSpeed ZeRO-3 engine around a module whose forward returns a dict with a scalar `loss`."""

    def __init__(self, *, module: nn.Module, groups: Sequence[ParameterGroup], ds_config: Mapping[str, Any]) -> None:
        import deepspeed

        _import_muon_uncompiled()
        mark_leaf_modules(module)
        self._engine = deepspeed.initialize(
            model=module,
            model_parameters=[_optimizer_group(group) for group in groups if not group.is_frozen],
            config=dict(ds_config),
            dist_init_required=False,
        )[0]
        ask_for_input_gradients(module)
        self._multiplier = {group.name: group.lr_multiplier for group in groups}
        # The script would unpickle the shards unverified, and its copy is a write between the barriers of a save.
        self._engine._copy_recovery_script = _copy_nothing

    @property
    def module(self) -> nn.Module:
        """The module inside, with sharded parameters."""
        return self._engine.module

    def __call__(self, **inputs: Any) -> dict[str, Tensor]:
        """The module's forward."""
        return self._engine(**inputs)

    def train(self) -> None:
        """Dropout and the like on."""
        self._engine.train()

    def eval(self) -> None:
        """Dropout and the like off."""
        self._engine.eval()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add this micro-batch's gradient; `last` is the step's last micro-batch.

        The loss is used as it is: DeepSpeed's division by the accumulation is off, its mean over ranks is not.
        """
        # Without the explicit boundary DeepSpeed counts calls of step() and updates only every n-th time.
        self._engine.set_gradient_accumulation_boundary(is_boundary=last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, *, lr: float) -> StepOutcome:
        """Clip, update with each group's multiple of `lr`, clear the gradients; skipped on all ranks if not finite."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * self._multiplier[group["name"]]
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        norm = self._engine.get_global_grad_norm()
        return StepOutcome(applied=applied, grad_norm=float("inf") if norm is None else float(norm))

    def learning_rates(self) -> dict[str, float]:
        """Group name -> the rate of the latest step."""
        return {group["name"]: float(group["lr"]) for group in self._engine.optimizer.param_groups}

    def save(self, folder: Path) -> None:
        """Write this rank's weights and optimizer state under `folder`. A collective call.

        Errors: what the write raised (disk full, quota), after all ranks have come through.
        """
        folder.mkdir(parents=True, exist_ok=True)
        writer = self._engine.checkpoint_engine
        write, errors = writer.save, []

        def keep_going(*arguments: Any, **options: Any) -> Any:
            try:
                return write(*arguments, **options)
            except (OSError, RuntimeError) as error:
                errors.append(error)
                return None

        # DeepSpeed has barriers inside its save: a rank that left them for a full disk would hang the others.
        writer.save = keep_going
        try:
            self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
        finally:
            writer.save = write
        if errors:
            raise errors[0]

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote with the same number of ranks; the folder must have been verified before.

        Errors: CheckpointError when DeepSpeed finds nothing to load.
        """
        path, _ = self._engine.load_checkpoint(str(folder), tag=_TAG, load_lr_scheduler_states=False)
        if path is None:
            raise CheckpointError(f"{folder}: DeepSpeed found no engine state to load there.")

    def close(self) -> None:
        """Remove the hooks and free optimizer state and buffers; the module stays, with its weights."""
        close_engine(self._engine)


def _optimizer_group(group: ParameterGroup) -> dict[str, Any]:
    return {
        "params": list(group.parameters),
        "name": group.name,
        "weight_decay": group.weight_decay,
        "betas": group.betas,
        "eps": group.eps,
    }


def _copy_nothing(save_dir: str) -> None:
    """Stands in for DeepSpeed's copy of its own conversion script into every checkpoint."""


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon ahead of its engine, which does so whatever the optimizer is, but without compilation.

    Decorating its kernels loads torch's whole compiler, which takes longer than everything else that an engine does
    when it starts. Nobody uses them here.
    """
    from deepspeed.runtime import compiler

    compile_kernel = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        # Not a promise of DeepSpeed's: another release may keep it elsewhere, and then only start-up is slower.
        with suppress(ImportError):
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_kernel
