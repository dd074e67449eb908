"""Staged runs inside a rank pool, looked at from within; every function here runs on each rank."""

import gc
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from step_jobs import build_side, mean_loss, own_micro_batches, run_step, whole_weights
from tiny_run import settings

import largekd
import largekd.distillation.run as run
from largekd.config.train import OptimConfig
from largekd.engine.carried import by_updates, release, restore_optimizer, take, updates_of
from largekd.engine.train import TrainEngine
from largekd.optim.groups import ParameterGroup
from largekd.sharding.master import own_shard

STEPS = (3, 4, 6)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def staged(assets: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """Hidden states first; then logits with half the rate for attention and the embeddings frozen; then longer rows,
    with the lower layer frozen in the second half."""
    tree = settings(assets, run_dir, train__max_steps=None, optim__warmup_steps=1, **changes)
    features = [{"name": "hidden", "loss": "mse", "projector": {"kind": "linear"}, "layers": {"map": "uniform"}}]
    groups = [
        {"name": "embeddings", "pattern": "embed_tokens", "lr_multiplier": 0},
        {"name": "attention", "pattern": r"self_attn\.", "lr_multiplier": 0.5},
    ]
    tree["stages"] = [
        {"name": "hidden", "steps": STEPS[0], "set": {"objective": {"features": features, "alpha": 0.5}}},
        {"name": "logits", "tokens": 8 * 64 * STEPS[1], "keep_optimizer": True, "set": {"optim.groups": groups}},
        {
            "name": "long",
            "steps": STEPS[2],
            "set": {"train.sequence_length": 128, "optim": {"lr": 5e-4}, "freezing": {"parts": 2}},
        },
    ]
    return tree


def observed(*, tree: Mapping[str, Any]) -> dict[str, Any]:
    """A whole run; of each phase: hooks of the student, size of optimizer state, backward calls per layer,
    which shards moved, and how many of all phases' vocabulary passes, master copies, inheritances and teachers are
    alive."""
    build, steps = run.build, run.run_steps
    phases: list[dict[str, Any]] = []
    owned: tuple[list[Any], ...] = ([], [], [])
    decoders: list[Any] = []

    def watched_build(*arguments: Any, **options: Any) -> Any:
        parts = build(*arguments, **options)
        inherited = options["beginning"].inherited
        carried = () if inherited is None else (next(iter(inherited.carried.values())).master,)
        made = ((parts.engine.module.vocabulary,), (_flat(parts.engine),), carried)
        for kind, values in zip(owned, made, strict=True):
            kind += map(weakref.ref, values)
        if parts.teacher_model is not None and parts.teacher_model.decoder is not None:
            decoders.append(weakref.ref(parts.teacher_model.decoder))
        return parts

    def watched_steps(session: Any, **options: Any) -> bool:
        parts = session.parts
        gc.collect()
        student = parts.student
        layers = student.model.get_decoder().layers
        calls = [0] * len(layers)
        before = {name: own_shard(p).clone() for name, p in student.model.named_parameters()}
        hooks = sum(len(getattr(module, kind)) for module in student.modules() for kind in HOOKS)
        handles = [layer.register_forward_hook(_counting(calls, index)) for index, layer in enumerate(layers)]
        finished = steps(session, **options)
        for handle in handles:
            handle.remove()
        after = dict(student.model.named_parameters())
        phases.append(
            {
                "hooks": hooks,
                "state": _state_numel(parts.engine),
                "backward": calls,
                "moved": [n for n, shard in before.items() if not torch.equal(shard, own_shard(after[n]))],
                "alive": [sum(reference() is not None for reference in kind) for kind in owned],
                "teacher": id(parts.teacher),
                "decoders": len({id(decoder()) for decoder in decoders if decoder() is not None}),
            }
        )
        return finished

    run.build, run.run_steps = watched_build, watched_steps
    try:
        return {"summary": largekd.distill(tree), "phases": phases}
    finally:
        run.build, run.run_steps = build, steps


def passed_on(*, tree: Mapping[str, Any]) -> dict[str, Any]:
    """A whole run; what each phase has gathered when it begins and when it ends, and the number of teachers built."""
    steps = run.run_steps
    phases: list[tuple[Any, Any]] = []
    teachers: list[Any] = []

    def watched_steps(session: Any, **options: Any) -> bool:
        parts = session.parts
        if not any(parts.teacher is teacher for teacher in teachers):
            teachers.append(parts.teacher)
        begun = {name: owner.state() for name, owner in parts.stateful.items()}
        finished = steps(session, **options)
        phases.append((begun, {name: owner.state() for name, owner in parts.stateful.items()}))
        return finished

    run.run_steps = watched_steps
    try:
        largekd.distill(tree)
    finally:
        run.run_steps = steps
    return {"phases": phases, "teachers": len(teachers)}


def _counting(calls: list[int], index: int) -> Any:
    def count(_gradient: torch.Tensor) -> None:
        calls[index] += 1

    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(count)

    return hook


def _flat(engine: TrainEngine) -> torch.Tensor:
    """A part of the master copy."""
    return engine._engine.optimizer.fp32_partitioned_groups_flat[0]


def _state_numel(engine: TrainEngine) -> int:
    """Elements of AdamW's moments on this rank."""
    states = engine._engine.optimizer.optimizer.state.values()
    return sum(value.numel() for state in states for key, value in state.items() if key.startswith("exp_avg"))


def split_training(*, steps: int, switch_at: int | None, moments: bool, rows: int = 4, **build: Any) -> dict[str, Any]:
    """Some steps, at one of which the engine is taken down and another built around the same weights."""
    side = build_side(micro_batch_size=1, accumulation=rows // dist.get_world_size(), **build)
    losses = []
    for step in range(steps):
        if step == switch_at:
            side.engine = _rebuilt(side, moments=moments)
        batches = own_micro_batches(rows=rows, packed=False, micro_batch_size=1, seed=step)
        scales, result = run_step(side, batches, step=step, lr=1e-3)
        losses.append(mean_loss(side, scales=scales, result=result, step=step))
    named = list(side.engine.module.named_trainables())
    masters = {name: entry.master for name, entry in take(named, moments=False).items()}
    weights = whole_weights(side)
    side.close()
    return {"losses": losses, "masters": masters, "weights": weights}


def _rebuilt(side: Any, *, moments: bool) -> TrainEngine:
    engine = side.engine
    module, ds_config = engine.module, engine._engine.config
    named = list(module.named_trainables())
    carried = take(named, moments=moments)
    assert all(entry.updates > 0 for entry in carried.values()) == moments
    engine.close()
    release(module)
    groups = (
        ParameterGroup(
            name="default",
            lr_multiplier=1.0,
            weight_decay=0.0,
            betas=OptimConfig().betas,
            eps=OptimConfig().eps,
            parameter_names=tuple(name for name, _ in named),
            parameters=tuple(weight for _, weight in named),
        ),
    )
    groups = by_updates(groups, updates=updates_of(named, carried=carried))
    rebuilt = TrainEngine(module=module, groups=groups, ds_config=ds_config)
    restore_optimizer(named, carried=carried)
    rebuilt.train()
    return rebuilt
