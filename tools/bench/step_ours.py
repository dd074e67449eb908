"""One contender's process: a rank of largekd's own step, both engines sharded by ZeRO-3 with the shipped placements."""

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from step_cell import LR, Cell, Clock, Job, serve, token_ids

from largekd.config.objective import ForwardKLConfig, ObjectiveConfig
from largekd.config.placement import read_placement
from largekd.config.train import OptimConfig, TrainConfig
from largekd.contracts import IGNORE_LABEL, Batch
from largekd.distillation.builder import build_distill_model
from largekd.distillation.step import StepSetting, step_scales, train_step
from largekd.engine.carried import take
from largekd.engine.ds_config import frozen_ds_config, train_ds_config
from largekd.engine.frozen import FrozenEngine
from largekd.engine.train import TrainEngine
from largekd.models.build import build_model, load_pretrained
from largekd.models.decoder import Decoder
from largekd.models.frozen_layers import FrozenLayers, freeze_layers
from largekd.models.source import read_config
from largekd.monitoring.timers import Timers
from largekd.objectives.terms import Objective, build_objective
from largekd.optim.groups import build_groups
from largekd.sharding.accelerator import device
from largekd.sharding.cluster import process_group
from largekd.teachers.online import OnlineTeacher

PLACEMENTS = {"teacher": "ds_configs/teacher_zero3.json", "student": "ds_configs/zero3.json"}
COMPILED = "ours_compiled"
# What does not learn: the lower half of the student's layers, alone or with the look-up of the embeddings.
FROZEN = {"ours_frozen_layers": False, "ours_frozen": True}


def run(job: Job) -> dict[str, Any]:
    """Build both engines, run the steps, report."""
    with process_group(timeout_s=600):
        clock = Clock(job)
        engine, teacher, objective = build_engines(job)
        ranks, rank = dist.get_world_size(), dist.get_rank()
        for step in range(job.steps):
            clock.before_step(step)
            batches = [make_batch(job.cell, step=step, rank=rank).to(device=device())]
            setting = StepSetting.at(objective, step=step, max_steps=job.steps, seed=0)
            scales = step_scales(
                batches, objective=objective, factors=setting.factors, world_size=ranks, device=device()
            )
            result = train_step(
                batches,
                scales=scales,
                setting=setting,
                engine=engine,
                teacher=teacher,
                lr=LR,
                timers=Timers(),
            )
            clock.after_step(step)
            clock.add_loss(float(result.sums.sum()) / float(batches[0].counted_T.numel()))
        report = clock.report() | {"optimizer_bytes": _optimizer_bytes(engine)}
        teacher.close()
        engine.close()
    return report


def build_engines(job: Job, /) -> tuple[TrainEngine, OnlineTeacher, Objective]:
    """Both engines as the builder of a run makes them, from the cell instead of a recipe."""
    cell, ranks = job.cell, dist.get_world_size()
    train = TrainConfig(
        global_batch_size=cell.micro_batch * ranks,
        micro_batch_size=cell.micro_batch,
        sequence_length=cell.positions,
        precision=cell.dtype,
        max_steps=job.steps,
    )
    optim = OptimConfig(lr=LR, schedule="constant")
    placements = {name: read_placement(path, key=f"{name}.deepspeed") for name, path in PLACEMENTS.items()}
    frozen = frozen_ds_config(placements["teacher"], train=train, world_size=ranks)
    trained = train_ds_config(placements["student"], train=train, optim=optim, accumulation=1, world_size=ranks)
    teacher = _decoder(Path(job.models) / "teacher", ds_config=frozen, precision=cell.dtype)
    student = _decoder(Path(job.models) / "student", ds_config=trained, precision=cell.dtype)
    objective = build_objective(
        ObjectiveConfig(alpha=1.0, divergences=(ForwardKLConfig(name="forward_kl"),), compile=job.contender == COMPILED)
    )
    module = build_distill_model(objective, student=student)
    if job.contender in FROZEN:
        lower = tuple(range(cell.student[0] // 2))
        freeze_layers(student.model, frozen=FrozenLayers(lower, embeddings=FROZEN[job.contender]))
    frozen_engine = FrozenEngine(module=teacher, ds_config=frozen)
    engine = TrainEngine(module=module, groups=build_groups(module.named_trainables(), config=optim), ds_config=trained)
    served = OnlineTeacher(engine=frozen_engine, decoder=teacher, gather_head_once=True, shared_ids=cell.vocab)
    return engine, served, objective


def _optimizer_bytes(engine: TrainEngine) -> int:
    """Master copies and moments of what learns, on this rank."""
    named = [(name, weight) for name, weight in engine.module.named_parameters() if weight.requires_grad]
    carried = take(named, moments=True).values()
    return sum(tensor.nbytes for entry in carried for tensor in (entry.master, *entry.moments.values()))


def make_batch(cell: Cell, /, *, step: int, rank: int) -> Batch:
    """Packed rows of one segment each, labels shifted."""
    ids_BS = token_ids(cell, step=step, rank=rank)
    labels_BS = ids_BS.roll(-1, dims=1)
    labels_BS[:, -1] = IGNORE_LABEL
    return Batch(
        input_ids_BS=ids_BS,
        labels_BS=labels_BS,
        token_weight_BS=torch.ones(ids_BS.shape),
        counted_T=(labels_BS != IGNORE_LABEL).flatten().nonzero().flatten(),
        position_ids_BS=torch.arange(cell.positions).expand_as(ids_BS).contiguous(),
    )


def _decoder(folder: Path, *, ds_config: dict[str, Any], precision: str) -> Decoder:
    model = build_model(
        read_config(folder, key="model", trust_remote_code=False),
        ds_config=ds_config,
        precision=precision,
        attention="sdpa",
    )
    load_pretrained(model, folder=folder, rank=dist.get_rank())
    return Decoder(model=model)


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    serve(run)
