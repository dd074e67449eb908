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
from largekd.distillation.builder import build_distill_model
from largekd.distillation.layers import decoder_shape
from largekd.distillation.router import build_router
from largekd.distillation.step import StepSetting, plan_of, step_scales, train_step
from largekd.engine.ds_config import frozen_ds_config, train_ds_config
from largekd.engine.frozen import FrozenEngine
from largekd.engine.train import TrainEngine
from largekd.models.build import build_model, load_pretrained
from largekd.models.decoder import Decoder, enable_checkpointing
from largekd.models.source import read_config
from largekd.monitoring.timers import Timers
from largekd.objectives.alignment import Alignment
from largekd.objectives.layer_maps import pair_layers
from largekd.objectives.options import PassOptions
from largekd.objectives.router import RouterTerms
from largekd.objectives.router_loads import RouterLoads
from largekd.objectives.selection import TokenSelection
from largekd.objectives.terms import Objective, build_objective
from largekd.optim.groups import build_groups
from largekd.runtime.ranks import all_sum
from largekd.sharding.accelerator import device
from largekd.sharding.shards import gathered, sharded_modules
from largekd.teachers.online import OnlineTeacher

OBJECTIVE = {
    "alpha": 0.7,
    "temperature": 2.0,
    "divergences": [{"name": "forward_kl"}, {"name": "reverse_kl", "weight": 0.5}, {"name": "jsd", "mix": 0.3}],
    "chunk_tokens": 7,
}
SEED = 0
ZERO3: dict[str, Any] = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


@dataclass
class Side:
    """Both engines of one job."""

    engine: TrainEngine
    teacher: OnlineTeacher
    student: Decoder
    objective: Objective
    alignment: Alignment | None
    selection: TokenSelection | None
    router: RouterTerms | None = None
    loads: RouterLoads | None = None

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
    alignment_noise: float = 0.0,
) -> Side:
    """Both engines; `alignment_noise` is added to the alignment's weights, some of which start at zero."""
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
    whole = build_objective(ObjectiveConfig.model_validate(objective or OBJECTIVE))
    alignment = build_alignment(whole, teacher=decoders[0], student=decoders[1], ds_config=trained)
    if alignment_noise:
        _add_noise(alignment, deviation=alignment_noise)
    chosen = whole.config.selection
    selection = None if chosen is None else TokenSelection(chosen, device=device())
    router = build_router(whole, student=decoders[1], teacher=decoders[0], teacher_kind="online")
    module = build_distill_model(whole, student=decoders[1], alignment=alignment, selection=selection, router=router)
    return Side(
        engine=TrainEngine(
            module=module, groups=build_groups(module.named_trainables(), config=optimizer), ds_config=trained
        ),
        teacher=OnlineTeacher(
            engine=FrozenEngine(module=decoders[0], ds_config=frozen),
            decoder=decoders[0],
            gather_head_once=gather_head_once,
            shared_ids=min(decoder.head_spec.vocab_size for decoder in decoders),
            rank=rank,
        ),
        student=decoders[1],
        objective=whole,
        alignment=alignment,
        selection=selection,
        router=router,
        loads=None if router is None else RouterLoads(router, device=device()),
    )


def build_alignment(objective: Objective, *, teacher: Decoder, student: Decoder, ds_config: dict) -> Alignment | None:
    """As the builder does, with the pairs that the configuration names."""
    if not objective.features and not objective.attention:
        return None
    depths = {
        f"{side}_depth": d.model.config.num_hidden_layers for side, d in (("student", student), ("teacher", teacher))
    }
    pairs = {
        entry.name: pair_layers(entry.layers, **depths, kept=None, key="objective")
        for entry in (*objective.features, *objective.attention)
    }
    shapes = {
        side: decoder_shape(decoder, side=side, pairs=pairs, objective=objective)
        for side, decoder in (("student", student), ("teacher", teacher))
    }
    with sharded_modules(ds_config, seed=0):
        return Alignment(objective, pairs=pairs, **shapes)


def _add_noise(alignment: Alignment, *, deviation: float) -> None:
    generator = torch.Generator().manual_seed(11)
    for parameter in alignment.parameters():
        with gathered([parameter], modifier_rank=0), torch.no_grad():
            parameter.add_(deviation * torch.randn(parameter.shape, generator=generator))


def own_micro_batches(*, rows: int, packed: bool, micro_batch_size: int, seed: int = 0, every: int = 1) -> list[Batch]:
    """This rank's contiguous block of the step's rows; with `every` 4 those without a counted token alone."""
    share = rows // dist.get_world_size()
    own = make_rows(count=rows * every, packed=packed, seed=seed)[::every][
        dist.get_rank() * share : (dist.get_rank() + 1) * share
    ]
    return [join_rows(own[start : start + micro_batch_size]) for start in range(0, share, micro_batch_size)]


def run_step(
    side: Side,
    batches: Sequence[Batch],
    *,
    step: int = 0,
    lr: float = 0.0,
    measure: bool = False,
    left_out: tuple[tuple[int, ...], ...] = (),
    **options: Any,
) -> tuple[Any, Any]:
    plan = plan_of(side.alignment, step=step, seed=SEED, router=side.router)
    setting = StepSetting.at(side.objective, step=step, max_steps=10, seed=SEED, plan=plan, left_out=left_out)
    selection = side.selection
    scales = step_scales(
        batches,
        objective=side.objective,
        factors=setting.factors,
        world_size=dist.get_world_size(),
        device=device(),
        kept_share=1.0 if selection is None else selection.expected_share,
    )
    result = train_step(
        batches,
        scales=scales,
        setting=setting,
        engine=side.engine,
        teacher=side.teacher,
        lr=lr,
        timers=Timers(),
        options=PassOptions(
            measure=measure,
            limit=None if selection is None else selection.limit,
            load_LX=None if side.loads is None else side.loads.share_LX,
            **options,
        ),
    )
    if side.loads is not None and result.outcome.applied:
        side.loads.learn(result.extras["router"], reduce=all_sum)
    if selection is not None:
        selection.learn(result.extras["histogram"], reduce=all_sum)
    return scales, result


def mean_loss(side: Side, *, scales: Any, result: Any, step: int = 0) -> float:
    """The loss of a step over all ranks."""
    sums = result.sums.double().clone()
    dist.all_reduce(sums)
    factors = torch.tensor(side.objective.factors(step=step, max_steps=10), dtype=torch.float64)
    return float(torch.where(scales.counts > 0, factors * sums / scales.counts, 0.0).sum())


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
        for name, parameter in side.engine.module.named_trainables():
            gradients[name] = safe_get_full_grad(parameter).float().clone()
        return step(lr=lr)

    side.engine.step = reading_step  # type: ignore[method-assign]
    scales, result = run_step(side, batches)
    loss, count = mean_loss(side, scales=scales, result=result), scales.label_tokens
    side.close()
    return {
        "gradients": gradients,
        "loss": loss,
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
    for step in range(steps):
        batches = own_micro_batches(rows=rows, packed=packed, micro_batch_size=micro_batch_size, seed=step)
        scales, result = run_step(side, batches, step=step, lr=lr)
        losses.append(mean_loss(side, scales=scales, result=result, step=step))
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
