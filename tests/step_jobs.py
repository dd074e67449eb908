"""What the ranks do in test_step: build both engines, run optimizer steps, give back whole gradients and weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import join_rows, make_rows

from largekd.config.objective import ObjectiveConfig
from largekd.config.train import OptimConfig, TrainConfig
from largekd.contracts import Batch
from largekd.distillation.model import DistillModel
from largekd.distillation.step import step_scales, train_step
from largekd.engine.ds_config import frozen_ds_config, train_ds_config
from largekd.engine.frozen import FrozenEngine
from largekd.engine.train import TrainEngine
from largekd.models.build import build_model, load_pretrained
from largekd.models.decoder import Decoder, enable_checkpointing
from largekd.models.source import read_config
from largekd.monitoring.timers import Timers
from largekd.objectives.terms import build_terms, request_of
from largekd.objectives.vocabulary import VocabularyPass
from largekd.optim.groups import build_groups
from largekd.sharding.accelerator import device
from largekd.sharding.shards import gathered
from largekd.teachers.online import OnlineTeacher

OBJECTIVE = {
    "alpha": 0.7,
    "temperature": 2.0,
    "divergences": [{"name": "forward_kl"}, {"name": "reverse_kl", "weight": 0.5}, {"name": "jsd", "mix": 0.3}],
    "chunk_tokens": 7,
}
ZERO3: dict[str, Any] = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


@dataclass
class Side:
    """Both engines of one job."""

    engine: TrainEngine
    teacher: OnlineTeacher
    student: Decoder
    terms: tuple
    objective: ObjectiveConfig

    def close(self) -> None:
        self.teacher.close()
        self.engine.close()


def build_side(
    *,
    teacher: str,
    student: str,
    micro_batch_size: int = 1,
    accumulation: int = 1,
    checkpointing: bool = False,
    precision: str = "fp32",
    gather_head_once: bool = True,
    teacher_zero: dict | None = None,
    student_zero: dict | None = None,
    lr: float = 1e-2,
    clipping: float = 0.0,
    objective: dict | None = None,
    optim: dict | None = None,
) -> Side:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    train = TrainConfig(
        global_batch_size=micro_batch_size * accumulation * ranks,
        micro_batch_size=micro_batch_size,
        sequence_length=24,
        precision=precision,
        max_steps=10,
        gradient_clipping=clipping,
        activation_checkpointing=checkpointing,
    )
    optimizer = OptimConfig(lr=lr, schedule="constant", weight_decay=0.0, **(optim or {}))
    frozen = frozen_ds_config(ZERO3 | (teacher_zero or {}), train=train, world_size=ranks)
    trained = train_ds_config(
        ZERO3 | (student_zero or {}), train=train, optim=optimizer, accumulation=accumulation, world_size=ranks
    )
    decoders = []
    for name, config in ((teacher, frozen), (student, trained)):
        folder = Path(name)
        model = build_model(
            read_config(folder, key="model", trust_remote_code=False),
            ds_config=config,
            precision=precision,
            attention="sdpa",
        )
        load_pretrained(model, folder=folder, rank=rank)
        decoders.append(Decoder(model=model))
    if checkpointing:
        enable_checkpointing(decoders[1].model)
    settings = ObjectiveConfig.model_validate(objective or OBJECTIVE)
    terms = build_terms(settings)
    vocabulary = VocabularyPass(terms=terms, temperature=settings.temperature, chunk_tokens=settings.chunk_tokens)
    module = DistillModel(student=decoders[1], vocabulary=vocabulary)
    return Side(
        engine=TrainEngine(
            module=module, groups=build_groups(module.named_trainables(), config=optimizer), ds_config=trained
        ),
        teacher=OnlineTeacher(
            engine=FrozenEngine(module=decoders[0], ds_config=frozen),
            decoder=decoders[0],
            gather_head_once=gather_head_once,
        ),
        student=decoders[1],
        terms=terms,
        objective=settings,
    )


def own_micro_batches(*, rows: int, packed: bool, micro_batch_size: int, seed: int = 0, every: int = 1) -> list[Batch]:
    """This rank's contiguous block of the step's rows; with `every` 4 those without a counted token alone."""
    share = rows // dist.get_world_size()
    own = make_rows(count=rows * every, packed=packed, seed=seed)[::every][
        dist.get_rank() * share : (dist.get_rank() + 1) * share
    ]
    return [join_rows(own[start : start + micro_batch_size]) for start in range(0, share, micro_batch_size)]


def run_step(side: Side, batches: Sequence[Batch], *, lr: float = 0.0, measure: bool = False) -> tuple[Any, Any]:
    scales = step_scales(batches, terms=side.terms, world_size=dist.get_world_size(), device=device())
    result = train_step(
        batches,
        scales=scales,
        engine=side.engine,
        teacher=side.teacher,
        request=request_of(side.terms),
        lr=lr,
        timers=Timers(),
        measure=measure,
    )
    return scales, result


def whole_weights(side: Side) -> dict[str, torch.Tensor]:
    weights = {}
    for name, parameter in side.student.model.named_parameters():
        with gathered([parameter]):
            weights[name] = parameter.detach().float().clone()
    return weights


def gradient_of_step(
    *, rows: int, packed: bool, micro_batch_size: int, seed: int = 0, every: int = 1, **build: Any
) -> dict[str, Any]:
    """The gradient of one step, as a plain SGD-free reading of what DeepSpeed holds before its update."""
    from deepspeed.utils import safe_get_full_grad

    share = rows // dist.get_world_size()
    side = build_side(micro_batch_size=micro_batch_size, accumulation=share // micro_batch_size, **build)
    batches = own_micro_batches(rows=rows, packed=packed, micro_batch_size=micro_batch_size, seed=seed, every=every)
    gradients: dict[str, torch.Tensor] = {}
    step = side.engine.step

    def reading_step(*, lr: float) -> Any:
        for name, parameter in side.student.model.named_parameters():
            gradients[name] = safe_get_full_grad(parameter).float().clone()
        return step(lr=lr)

    side.engine.step = reading_step  # type: ignore[method-assign]
    scales, result = run_step(side, batches)
    sums = result.sums.double().clone()
    dist.all_reduce(sums)
    weights = torch.tensor([term.weight for term in side.terms], dtype=torch.float64)
    count = scales.label_tokens
    side.close()
    return {
        "gradients": gradients,
        "loss": float((weights * sums).sum() / count) if count else 0.0,
        "count": float(count),
        "norm": result.outcome.grad_norm,
    }


def weights_after(
    *, steps: int, rows: int, packed: bool, micro_batch_size: int, lr: float = 1e-2, watch: bool = True, **build: Any
) -> dict[str, Any]:
    """Losses of some steps on fresh rows each; with `watch` how far the weights moved in each step, and where to."""
    share = rows // dist.get_world_size()
    side = build_side(micro_batch_size=micro_batch_size, accumulation=share // micro_batch_size, lr=lr, **build)
    losses, moved, before = [], [], whole_weights(side) if watch else {}
    weights = torch.tensor([term.weight for term in side.terms], dtype=torch.float64)
    for step in range(steps):
        batches = own_micro_batches(rows=rows, packed=packed, micro_batch_size=micro_batch_size, seed=step)
        scales, result = run_step(side, batches, lr=lr)
        sums = result.sums.double().clone()
        dist.all_reduce(sums)
        losses.append(float((weights * sums).sum() / scales.label_tokens))
        if watch:
            now = whole_weights(side)
            moved.append(max(float((now[name] - before[name]).abs().max()) for name in now))
            before = now
    side.close()
    return {"losses": losses, "moved": moved, "weights": before}


def reference_gradient(*, rows: int, packed: bool, teacher: str, student: str, seed: int = 0) -> dict[str, Any]:
    """The same gradient with plain transformers models and full logits in float64, in one process."""
    from transformers import AutoModelForCausalLM

    objective = ObjectiveConfig.model_validate(OBJECTIVE)
    models = [AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64) for name in (teacher, student)]
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    temperature, alpha = objective.temperature, objective.alpha
    for row in make_rows(count=rows, packed=packed, seed=seed):
        with torch.no_grad():
            z = models[0](**row.model_inputs, use_cache=False).logits.flatten(0, 1)[row.counted_T]
        s = models[1](**row.model_inputs, use_cache=False).logits.flatten(0, 1)[row.counted_T]
        w = row.token_weight_BS.flatten()[row.counted_T].double()
        label = row.labels_BS.flatten()[row.counted_T]
        logp, logq = (x.div(temperature).log_softmax(-1) for x in (z, s))
        p, q = logp.exp(), logq.exp()
        mix = 0.3
        m = (mix * p + (1 - mix) * q).log()
        forward = (p * (logp - logq)).sum(-1)
        reverse = (q * (logq - logp)).sum(-1)
        jsd = mix * (p * (logp - m)).sum(-1) + (1 - mix) * (q * (logq - m)).sum(-1)
        hard = -s.log_softmax(-1).gather(-1, label[:, None]).squeeze(-1)
        per_token = (1 - alpha) * hard + alpha * temperature**2 * (forward + 0.5 * reverse + jsd)
        total = total + (w * per_token).sum()
        count += float(w.sum())
    (total / count).backward()
    named = {name: parameter.grad.float() for name, parameter in models[1].named_parameters()}
    return {"gradients": named, "loss": float(total / count), "count": count}
