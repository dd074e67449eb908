"""What the ranks do in test_ema: a student, the average of its weights as teacher, steps, and whole tensors back."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from step_jobs import Side, build_side, mean_loss, own_micro_batches, run_step
from torch import nn

from largekd.distillation.step import StepSetting
from largekd.errors import CheckpointError
from largekd.models.decoder import Decoder
from largekd.objectives.options import PassOptions
from largekd.runtime.ranks import current_ranks
from largekd.sharding.master import master_shard
from largekd.sharding.shards import gathered
from largekd.teachers.average import ShardAverage
from largekd.teachers.ema import EMATeacher

OBJECTIVE = {"alpha": 0.5, "divergences": [{"name": "forward_kl"}]}


def build_ema(*, student: str, decay: float, warmup: bool = False, **build: Any) -> tuple[Side, Decoder, ShardAverage]:
    """A side whose teacher is the average of its student; the teacher's model and the average besides."""
    side = build_side(teacher=student, student=student, objective=OBJECTIVE, **build)
    decoder = side.teacher._decoder
    average = ShardAverage(source=side.student.model, target=decoder.model, decay=decay, warmup=warmup)
    side.teacher = EMATeacher(online=side.teacher, average=average, model=decoder.model, ranks=current_ranks())  # type: ignore[assignment]
    return side, decoder, average


def whole(module: Any) -> dict[str, torch.Tensor]:
    """Every parameter, gathered, in its own dtype."""
    weights = {}
    for name, parameter in module.named_parameters():
        with gathered([parameter]):
            weights[name] = parameter.detach().clone()
    return weights


def masters(module: Any) -> dict[str, torch.Tensor]:
    """This rank's float32 shards, in float64."""
    return {name: master_shard(parameter).detach().double() for name, parameter in module.named_parameters()}


def long_average(*, student: str, updates: int, decay: float) -> dict[str, Any]:
    """A bf16 student whose master weights drift at random: largest errors of the average against float64.

    `error` of our average, `half` of one that had taken in the bf16 weights, both over the largest weight.
    """
    from deepspeed.utils import safe_set_local_fp32_param

    side, decoder, average = build_ema(student=student, decay=decay, precision="bf16")
    generator = torch.Generator().manual_seed(dist.get_rank())
    reference = masters(side.student.model)
    rounded = {name: value.clone() for name, value in reference.items()}
    scale = max(float(value.abs().max()) for value in reference.values())
    for _ in range(updates):
        for name, parameter in side.student.model.named_parameters():
            step = 1e-3 * torch.randn(parameter.ds_tensor.shape, generator=generator) + 2e-4
            value = master_shard(parameter) + step
            safe_set_local_fp32_param(parameter, value)
            for target, taken in ((reference, value), (rounded, value.bfloat16())):
                target[name].mul_(decay).add_((1.0 - decay) * taken.double())
        average.update()
    result: dict[str, Any] = {"error": 0.0, "half": 0.0, "cast": True}
    start = masters(decoder.model)
    for name, value in average.shards():
        result["error"] = max(result["error"], float((value - reference[name]).abs().max()) / scale)
        result["half"] = max(result["half"], float((rounded[name] - reference[name]).abs().max()) / scale)
        result["cast"] &= torch.equal(start[name], value.bfloat16().double())
    side.close()
    return result


def train_with_average(
    *, student: str, steps: int, decay: float, warmup: bool = False, rows: int = 8, **build: Any
) -> dict[str, Any]:
    """Real steps: losses, the teacher's whole weights after them, and the average of the student's whole weights that
    float64 makes of what the student was after each step."""
    share = rows // dist.get_world_size()
    side, decoder, average = build_ema(
        student=student, decay=decay, warmup=warmup, micro_batch_size=2, accumulation=share // 2, **build
    )
    reference = {name: value.double() for name, value in whole(side.student.model).items()}
    losses, decays = [], []
    for step in range(steps):
        keeps = average.decay
        batches = own_micro_batches(rows=rows, packed=True, micro_batch_size=2, seed=step)
        scales, result = run_step(side, batches, step=step, lr=1e-2)
        losses.append(mean_loss(side, scales=scales, result=result, step=step))
        decays.append(keeps)
        for name, value in whole(side.student.model).items():
            reference[name] = keeps * reference[name] + (1 - keeps) * value.double()
    teacher = whole(decoder.model)
    outputs = forward_of_teacher(side, rows=rows)
    side.close()
    return {"losses": losses, "decays": decays, "teacher": teacher, "reference": reference, "last": outputs}


def forward_of_teacher(side: Side, *, rows: int) -> torch.Tensor:
    """The teacher's last hidden states of the first micro-batch of rank 0's rows."""
    from largekd.contracts import SignalRequest

    batches = own_micro_batches(rows=rows, packed=False, micro_batch_size=2)
    with side.teacher.signals(batches, request=SignalRequest("full")) as signals:
        return next(signals).hidden_BSE.float().clone()


def saved_and_loaded(*, student: str, folder: str) -> dict[str, bool]:
    """Train, save, train on, load: whether all is as it was when it was saved, and whether it had changed meanwhile."""
    side, decoder, average = build_ema(student=student, decay=0.9, micro_batch_size=2, accumulation=1)
    place = Path(folder)
    batches = own_micro_batches(rows=2 * dist.get_world_size(), packed=True, micro_batch_size=2)
    run_step(side, batches, lr=1e-2)
    side.teacher.state.save(place)
    before, shards, updates = (
        whole(decoder.model),
        {name: value.clone() for name, value in average.shards()},
        average.updates,
    )
    dist.barrier()
    run_step(side, batches, lr=1e-2)
    moved = any(not torch.equal(value, before[name]) for name, value in whole(decoder.model).items())
    side.teacher.state.load(place)
    after = whole(decoder.model)
    same = all(torch.equal(value, before[name]) for name, value in after.items())
    same &= all(torch.equal(value, shards[name]) for name, value in average.shards())
    side.close()
    return {"moved": moved, "same": same, "updates": average.updates == updates == 1}


def averaged_buffers() -> dict[str, Any]:
    """Persistent buffers of floating point follow, others are copied, those outside of checkpoints are left alone."""
    pair = [nn.Module(), nn.Module()]
    for module in pair:
        module.register_buffer("bias", torch.full((3,), 2.0, dtype=torch.bfloat16))
        module.register_buffer("seen", torch.tensor([1, 2]))
        module.register_buffer("angles", torch.ones(2), persistent=False)
    source, target = pair
    average = ShardAverage(source=source, target=target, decay=0.75, warmup=False)
    source.bias.fill_(4.0)
    source.seen.add_(10)
    source.angles.zero_()
    average.update()
    return {name: buffer.tolist() for name, buffer in target.named_buffers()}


def refusals(*, student: str, folder: str) -> list[str]:
    """What loading says of a file of another model, one without its number of updates, and one that is no file."""
    side, _, average = build_ema(student=student, decay=0.9)
    path = Path(folder) / f"{dist.get_rank()}.safetensors"
    average.save(path=path)
    tensors = load_file(path)
    messages = []
    for damage in ("tensor", "updates", "bytes"):
        if damage == "tensor":
            save_file({name: value for name, value in tensors.items() if "norm" not in name}, path)
        elif damage == "updates":
            save_file(tensors, path)
        else:
            path.write_bytes(b"no tensors")
        try:
            average.load(path=path)
        except CheckpointError as error:
            messages.append(str(error))
    side.close()
    return messages


def deep_figures(*, teacher: str, student: str, rows: int, objective: dict[str, Any]) -> dict[str, Any]:
    """Names, sums and squared gradients of a step's summands, and their sums in evaluation mode."""
    share = rows // dist.get_world_size()
    side = build_side(teacher=teacher, student=student, objective=objective, micro_batch_size=share, accumulation=1)
    (batch,) = own_micro_batches(rows=rows, packed=True, micro_batch_size=share)
    side.engine.eval()
    setting = StepSetting.at(side.objective, step=0, max_steps=10, seed=0)
    with torch.no_grad(), side.teacher.signals([batch], request=setting.request) as signals:
        outputs = side.engine(
            batch=batch,
            signal=next(signals),
            scales=torch.zeros(len(side.objective.summands)),
            options=PassOptions(temperature=torch.tensor(setting.temperature)),
        )
    side.engine.train()
    _, result = run_step(side, [batch], lr=0.0, term_gradients=True)
    side.close()
    return {
        "names": [summand.name for summand in side.objective.summands],
        "sums": result.sums.tolist(),
        "squares": result.extras["squares"].tolist(),
        "evaluation": outputs["sums"].tolist(),
    }
