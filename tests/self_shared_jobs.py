"""What the ranks do in the tests of the self-shared teacher."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from step_jobs import SEED, ZERO3, own_micro_batches
from tiny import LENGTH, join_rows, make_rows

from largekd.checkpoint.export import write_export
from largekd.config.run import RunConfig
from largekd.contracts import Batch
from largekd.distillation.builder import build_distill_model
from largekd.distillation.layers import decoder_shape
from largekd.distillation.self_shared import SelfSharedModel, serve_shared, share_backbone, shared_objective, twice
from largekd.distillation.step import StepSetting, plan_of, step_scales, train_step
from largekd.engine.ds_config import train_ds_config
from largekd.engine.train import StepOutcome, TrainEngine
from largekd.models.build import build_model, load_pretrained
from largekd.models.decoder import Decoder, enable_checkpointing
from largekd.models.pruning import pruned_config, pruned_tensors
from largekd.models.source import read_config
from largekd.monitoring.timers import Timers
from largekd.objectives.alignment import Alignment
from largekd.objectives.layer_maps import pair_layers
from largekd.objectives.options import PassOptions
from largekd.objectives.terms import build_objective
from largekd.optim.groups import build_groups
from largekd.runtime.ranks import current_ranks
from largekd.sharding.accelerator import device
from largekd.sharding.shards import gathered, gathering_forward, sharded_modules
from largekd.teachers.self_shared import SelfSharedTeacher

PATTERN = r"\.(q|v|up|down)_proj$"
OBJECTIVE: dict[str, Any] = {
    "alpha": 0.6,
    "divergences": [{"name": "forward_kl"}],
    "chunk_tokens": 7,
    "features": [
        {
            "name": "layers",
            "loss": "mse",
            "layers": {"map": "closest_non_pruned"},
            "projector": {"kind": "low_rank_identity", "rank": 2},
            "sample_pairs": 2,
        }
    ],
}


class Shared:
    """A self-shared job of one engine, as the builder puts it together."""

    def __init__(
        self,
        *,
        folder: str,
        accumulation: int = 1,
        checkpointing: bool = False,
        precision: str = "fp32",
        teacher: dict | None = None,
        objective: dict | None = None,
        noise: float = 0.0,
        total_steps: int = 10,
    ) -> None:
        self.ranks = current_ranks()
        self.total_steps = total_steps
        tree = {
            "run": {"dir": "unused"},
            "teacher": {"kind": "self_shared", "adapters": {"pattern": PATTERN, "rank": 2}} | (teacher or {}),
            "student": {"model": folder, "deepspeed": "unused"},
            "data": {"train": {"path": "unused"}},
            "train": {
                "global_batch_size": accumulation * self.ranks.world_size,
                "micro_batch_size": 1,
                "sequence_length": LENGTH,
                "precision": precision,
                "gradient_clipping": 0.0,
                "max_steps": total_steps,
                "seed": SEED,
            },
            "optim": {"lr": 1e-2, "schedule": "constant", "weight_decay": 0.0},
            "objective": objective or OBJECTIVE,
        }
        self.config = RunConfig.model_validate(tree)
        train = self.config.train
        zero = train_ds_config(
            ZERO3, train=train, optim=self.config.optim, accumulation=accumulation, world_size=self.ranks.world_size
        )
        model = build_model(
            read_config(Path(folder), key="model", trust_remote_code=False),
            ds_config=zero,
            precision=precision,
            attention="sdpa",
        )
        load_pretrained(model, folder=Path(folder), rank=self.ranks.rank)
        if checkpointing:
            enable_checkpointing(model)
        self.decoder = Decoder(model=model)
        self.zero = zero
        student = share_backbone(self.config, student=self.decoder, ds_config=zero, ranks=self.ranks)
        assert student is not None
        self.student = student
        if noise:
            add_noise(self.decoder, deviation=noise)
        self.objective = shared_objective(build_objective(self.config.objective))
        self.alignment = self._alignment()
        self.teacher = serve_shared(
            self.config,
            student=student,
            objective=self.objective,
            alignment=self.alignment,
            total_steps=total_steps,
            ranks=self.ranks,
        )

    def _alignment(self) -> Alignment | None:
        depth = self.student.depth
        pairs = {
            entry.name: pair_layers(
                entry.layers, student_depth=depth, teacher_depth=depth, kept=range(depth), key="objective"
            )
            for entry in self.objective.features
        }
        if not pairs:
            return None
        shape = decoder_shape(self.decoder, side="student", pairs=pairs, objective=self.objective)
        with sharded_modules(self.zero, seed=0):
            return Alignment(self.objective, pairs=pairs, student=shape, teacher=shape)

    def start(self) -> "Shared":
        """Build the engine."""
        module = build_distill_model(
            self.objective, student=self.decoder, alignment=self.alignment, kind=SelfSharedModel
        )
        groups = build_groups(module.named_trainables(), config=self.config.optim)
        self.engine = TrainEngine(module=module, groups=groups, ds_config=self.zero)
        self.engine.train()
        return self

    def step(self, batches: list[Batch], *, step: int = 0, lr: float = 0.0, **options: Any) -> Any:
        """One optimizer step."""
        plan = plan_of(self.alignment, step=step, seed=SEED)
        setting = StepSetting.at(self.objective, step=step, max_steps=self.total_steps, seed=SEED, plan=plan)
        scales = step_scales(
            batches,
            objective=self.objective,
            factors=setting.factors,
            world_size=self.ranks.world_size,
            device=device(),
        )
        return setting, train_step(
            batches,
            scales=scales,
            setting=setting,
            engine=self.engine,
            teacher=self.teacher,
            lr=lr,
            timers=Timers(),
            options=PassOptions(measure=True, **options),
        )


def add_noise(decoder: Decoder, *, deviation: float) -> None:
    """Make the zero halves of the adapters something, so that both models differ from the backbone and each other."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in decoder.named_parameters():
        if name.endswith("lora_b"):
            with gathered([parameter], modifier_rank=0), torch.no_grad():
                parameter.add_(deviation * torch.randn(parameter.shape, generator=generator))


def hidden_of_each(*, folder: str, noise: float, packed: bool = True) -> dict[str, torch.Tensor]:
    """Last hidden states of the backbone, of each model alone, and of both halves of a forward for both."""
    side = Shared(folder=folder, noise=noise)
    batch = join_rows(make_rows(count=2, packed=packed))
    with torch.no_grad(), gathering_forward(side.decoder):
        found = {use: side.decoder(batch=batch, adapters=use)["last"] for use in ("student", "teacher")}
        found["plain"] = side.decoder(batch=batch)["last"]
        both = side.decoder(batch=twice(batch), adapters="both")["last"]
    found["teacher half"], found["student half"] = both.chunk(2)
    return found


def gradients(*, folder: str, rows: int = 4, **options: Any) -> dict[str, Any]:
    """Every parameter's gradient in one step, with the step's sums, and the saliences that it led to."""
    from deepspeed.utils import safe_get_full_grad

    share = rows // dist.get_world_size()
    side = Shared(folder=folder, accumulation=share, noise=0.1, **options).start()
    found: dict[str, Any] = {}
    step = side.engine.step

    def reading(*, lr: float) -> Any:
        for name, parameter in side.engine.module.named_trainables():
            gradient = safe_get_full_grad(parameter) if parameter.requires_grad else parameter.grad
            found[name] = None if gradient is None else gradient.float().clone()
        return step(lr=lr)

    side.engine.step = reading  # type: ignore[method-assign]
    batches = own_micro_batches(rows=rows, packed=True, micro_batch_size=1)
    _, result = side.step(batches, term_gradients=True)
    sums = result.sums.double().clone()
    dist.all_reduce(sums)
    salience = {kind: average.clone() for kind, average in side.student.salience.items()}
    squares = result.extras["squares"]
    side.engine.close()
    return {"gradients": found, "sums": sums, "salience": salience, "squares": squares}


def pruning_course(*, folder: str, steps: int, teacher: dict, skipped: tuple[int, ...] = ()) -> dict[str, Any]:
    """Metrics, kept layers and planned pairs after each step, the masks at the end; `skipped` ones count from 1."""
    accumulation = 2 // dist.get_world_size()
    side = Shared(folder=folder, teacher=teacher, noise=0.1, total_steps=steps, accumulation=accumulation).start()
    course, pairs = [], []
    apply = side.engine.step

    def skip(*, lr: float) -> StepOutcome:
        apply(lr=0.0 * lr)
        return StepOutcome(applied=False, grad_norm=float("inf"))

    for step in range(steps):
        side.engine.step = skip if step + 1 in skipped else apply  # type: ignore[method-assign]
        batches = own_micro_batches(rows=2, packed=True, micro_batch_size=1, seed=step)
        setting, _ = side.step(batches, step=step, lr=1e-2)
        pairs.append(setting.plan.pairs[0])
        course.append(dict(side.teacher.metrics) | {"kept": side.student.kept_layers})
    state = {name: value.clone() for name, value in side.student.state().items()}
    side.engine.close()
    return {"course": course, "pairs": pairs, "state": state}


def state_round_trip(*, folder: str, into: str) -> tuple[dict, dict, dict]:
    """The state of a side that was pruned, what a fresh side reads of it, and the figures of that side."""
    teacher = {
        "adapters": {"pattern": PATTERN, "rank": 2, "max_rank": 4},
        "pruning": {"neurons": 0.3, "head_groups": 0.5, "layers": 0.5, "every_steps": 1},
    }
    side = Shared(folder=folder, teacher=teacher, noise=0.1)
    generator = torch.Generator().manual_seed(1)
    sums = torch.rand(side.student.step_sums.shape, generator=generator)
    side.student.learn(sums.to(device()), decay=0.5)
    side.student.prune(neurons=0.3, head_groups=0.5, layers=0.5)
    side.student.grow(by=1)
    if side.ranks.is_main:
        Path(into).mkdir(exist_ok=True)
    dist.barrier()
    side.teacher.save(Path(into))
    dist.barrier()
    fresh = Shared(folder=folder, teacher=teacher, noise=0.1)
    assert isinstance(fresh.teacher, SelfSharedTeacher)
    fresh.teacher.load(Path(into))
    return side.student.state(), fresh.student.state(), dict(fresh.teacher.metrics)


def export_pruned(*, folder: str, into: str, targets: dict[str, float]) -> dict[str, Any]:
    """Hidden states of the masked student and its head's logits; the pruned export goes to `into`."""
    teacher = {"adapters": {"pattern": PATTERN, "rank": 2, "max_rank": 3}}
    side = Shared(folder=folder, teacher=teacher, noise=0.2)
    generator = torch.Generator().manual_seed(1)
    side.student.learn(torch.rand(side.student.step_sums.shape, generator=generator).to(device()), decay=0.5)
    side.student.prune(**targets)
    side.student.grow(by=1)
    batch = join_rows(make_rows(count=2, packed=True))
    with torch.no_grad(), gathering_forward(side.decoder):
        hidden = side.decoder(batch=batch)["last"]
    with gathered(side.decoder.head_parameters), torch.no_grad():
        logits = hidden @ side.decoder.head_weight.T
    config = pruned_config(side.student)
    write_export(
        Path(into),
        tensors=pruned_tensors(side.student),
        max_shard_bytes=10_000,
        save_extras=config.save_pretrained,
        ranks=side.ranks,
        dtype=torch.float32,
    )
    return {"logits": logits, "kept": side.student.kept_layers}
