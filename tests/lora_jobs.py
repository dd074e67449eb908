"""What the ranks do in the tests of adapters."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from step_jobs import ZERO3, own_micro_batches
from tiny import LENGTH, join_rows, make_rows

from largekd.checkpoint.export import write_export
from largekd.config.lora import LoraConfig
from largekd.config.objective import ObjectiveConfig
from largekd.config.train import OptimConfig, TrainConfig
from largekd.contracts import TapRequest
from largekd.distillation.backbone import BackboneModel
from largekd.distillation.builder import build_distill_model
from largekd.distillation.layers import decoder_shape
from largekd.distillation.step import StepSetting, plan_of, step_scales, train_step
from largekd.engine.ds_config import train_ds_config
from largekd.engine.train import TrainEngine
from largekd.models.build import build_model, load_pretrained
from largekd.models.decoder import Decoder, enable_checkpointing
from largekd.models.export import save_extras, stream_tensors
from largekd.models.lora import adapter_tensors, add_lora, base_alone, save_adapter
from largekd.models.replica import is_copyable, whole_copy
from largekd.models.source import read_config
from largekd.monitoring.timers import Timers
from largekd.objectives.alignment import Alignment
from largekd.objectives.layer_maps import pair_layers
from largekd.objectives.options import PassOptions
from largekd.objectives.terms import build_objective
from largekd.optim.groups import build_groups
from largekd.runtime.ranks import current_ranks
from largekd.sharding.accelerator import device
from largekd.sharding.shards import gathered, gathering_forward, is_sharded, sharded_modules
from largekd.teachers.backbone import BackboneTeacher

LORA: dict[str, Any] = {"rank": 3, "alpha": 6.0, "pattern": r"\.(q|v|up|down)_proj$"}
OBJECTIVE: dict[str, Any] = {"alpha": 0.6, "divergences": [{"name": "forward_kl"}], "chunk_tokens": 7}
NOISE = 0.2


class Adapted:
    """A student with adapters, and as its teacher itself without them."""

    def __init__(
        self,
        folder: str,
        *,
        accumulation: int = 1,
        checkpointing: bool = False,
        precision: str = "fp32",
        objective: dict | None = None,
        noise: float = NOISE,
        zero: dict | None = None,
        optim: dict | None = None,
        **lora: Any,
    ) -> None:
        self.ranks = current_ranks()
        world = self.ranks.world_size
        self.lora = LoraConfig.model_validate(LORA | lora)
        train = TrainConfig(
            global_batch_size=accumulation * world,
            micro_batch_size=1,
            sequence_length=LENGTH,
            precision=precision,
            gradient_clipping=0.0,
            max_steps=10,
        )
        self.optim = OptimConfig(lr=1e-2, schedule="constant", weight_decay=0.0, **(optim or {}))
        self.zero = train_ds_config(
            ZERO3 | (zero or {}), train=train, optim=self.optim, accumulation=accumulation, world_size=world
        )
        model = build_model(
            read_config(Path(folder), key="model", trust_remote_code=False),
            ds_config=self.zero,
            precision=precision,
            attention="sdpa",
        )
        load_pretrained(model, folder=Path(folder), rank=self.ranks.rank)
        add_lora(model, config=self.lora, ds_config=self.zero, seed=0)
        if checkpointing:
            enable_checkpointing(model)
        self.model, self.decoder = model, Decoder(model=model)
        if noise:
            add_noise(model, deviation=noise)
        self.objective = build_objective(ObjectiveConfig.model_validate(objective or OBJECTIVE))

    def _alignment(self) -> Alignment | None:
        depth = self.model.config.num_hidden_layers
        entries = (*self.objective.features, *self.objective.attention)
        if not entries:
            return None
        pairs = {
            entry.name: pair_layers(entry.layers, student_depth=depth, teacher_depth=depth, kept=None, key="objective")
            for entry in entries
        }
        shapes = {
            side: decoder_shape(self.decoder, side=side, pairs=pairs, objective=self.objective)
            for side in ("student", "teacher")
        }
        with sharded_modules(self.zero, seed=0):
            return Alignment(self.objective, pairs=pairs, **shapes)

    def start(self) -> "Adapted":
        """Build the engine."""
        self.alignment = self._alignment()
        module = build_distill_model(self.objective, student=self.decoder, alignment=self.alignment, kind=BackboneModel)
        groups = build_groups(module.named_trainables(), config=self.optim)
        self.engine = TrainEngine(module=module, groups=groups, ds_config=self.zero)
        self.engine.train()
        return self

    def step(self, batches: list, *, step: int = 0, lr: float = 0.0) -> Any:
        """One optimizer step."""
        plan = plan_of(self.alignment, step=step, seed=0)
        setting = StepSetting.at(self.objective, step=step, max_steps=10, seed=0, plan=plan)
        scales = step_scales(
            batches,
            objective=self.objective,
            factors=setting.factors,
            world_size=self.ranks.world_size,
            device=device(),
        )
        return train_step(
            batches,
            scales=scales,
            setting=setting,
            engine=self.engine,
            teacher=BackboneTeacher(self.model),
            lr=lr,
            timers=Timers(),
            options=PassOptions(measure=True),
        )


def add_noise(model: torch.nn.Module, *, deviation: float) -> None:
    """Make the zero halves of the adapters something, and DoRA's magnitudes something else."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name or ".lora_magnitude_vector." in name:
            with gathered([parameter], modifier_rank=0), torch.no_grad():
                parameter.add_(deviation * torch.randn(parameter.shape, generator=generator).abs())


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter."""
    found = {}
    for name, parameter in model.named_parameters():
        with gathered([parameter]):
            found[name] = parameter.detach().float().clone()
    return found


def start_of(*, folder: str, **options: Any) -> dict[str, Any]:
    """Adapters as they are made: their values, whether all are sharded, which learn, and what the model says."""
    side = Adapted(folder, noise=0.0, **options)
    batch = join_rows(make_rows(count=2, packed=True))
    with torch.no_grad(), gathering_forward(side.decoder):
        hidden = side.decoder(batch=batch)["last"]
    return {
        "weights": whole(side.model),
        "sharded": all(is_sharded(parameter) for parameter in side.model.parameters()),
        "learning": [name for name, parameter in side.model.named_parameters() if parameter.requires_grad],
        "dtypes": {parameter.dtype for parameter in side.model.parameters()},
        "hidden": hidden,
    }


def gradients(*, folder: str, rows: int = 4, **options: Any) -> dict[str, Any]:
    """Every learning parameter's gradient in one step, the loss's sums, and what the model looked like."""
    from deepspeed.utils import safe_get_full_grad

    share = rows // dist.get_world_size()
    side = Adapted(folder, accumulation=share, **options).start()
    found: dict[str, torch.Tensor] = {}
    step, passes = side.engine.step, [0]
    side.decoder.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))

    def reading(*, lr: float) -> Any:
        for name, parameter in side.engine.module.named_trainables():
            if parameter.requires_grad:
                found[name] = safe_get_full_grad(parameter).float().clone()
        return step(lr=lr)

    side.engine.step = reading  # type: ignore[method-assign]
    result = side.step(own_micro_batches(rows=rows, packed=True, micro_batch_size=1))
    sums = result.sums.double().clone()
    dist.all_reduce(sums)
    side.engine.close()
    return {"gradients": found, "sums": sums, "weights": whole(side.model), "passes": passes[0]}


def training(*, folder: str, steps: int, **options: Any) -> dict[str, Any]:
    """Weights before and after some steps, and the elements of optimizer state on all ranks."""
    rows = 2 * dist.get_world_size()
    side = Adapted(folder, accumulation=2, **options)
    before = whole(side.model)
    side.start()
    losses = []
    for step in range(steps):
        batches = own_micro_batches(rows=rows, packed=True, micro_batch_size=1, seed=step)
        losses.append(side.step(batches, step=step, lr=1e-2).sums.tolist())
    state = torch.tensor(state_elements(side.engine))
    dist.all_reduce(state)
    side.engine.close()
    return {"before": before, "after": whole(side.model), "state": int(state), "losses": losses}


def state_elements(engine: TrainEngine) -> int:
    """Elements of this rank's Adam moments."""
    states = engine._engine.optimizer.optimizer.state.values()
    return sum(value.numel() for state in states for name, value in state.items() if name != "step")


def outputs(*, folder: str, into: str, **options: Any) -> dict[str, Any]:
    """Hidden states with and without adapters, of a whole copy, and an export with adapters merged and apart."""
    side = Adapted(folder, **options)
    batch = join_rows(make_rows(count=2, packed=False))
    taps = TapRequest(hidden=(0,), attention=(1,))
    side.decoder.eval()
    with torch.no_grad(), gathering_forward(side.decoder):
        found = {"student": side.decoder(batch=batch, taps=taps)}
        with base_alone(side.model):
            found["base"] = side.decoder(batch=batch, taps=taps)
        found["student again"] = side.decoder(batch=batch, taps=taps)
    own = {name: tensor.clone() for name, tensor in adapter_tensors(side.model)}

    def extras(pending: Path) -> None:
        save_extras(
            pending,
            model=side.model,
            dtype=torch.float32,
            tokenizer=_NoTokenizer(),
            source=pending,  # type: ignore[arg-type]
        )
        save_adapter(pending / "adapter", model=side.model, config=side.lora, tensors=own, base=folder)

    write_export(
        Path(into), tensors=stream_tensors(side.model), max_shard_bytes=1 << 30, save_extras=extras, ranks=side.ranks
    )
    assert is_copyable(side.model)
    with whole_copy(side.model, device=device()) as copy, torch.no_grad():
        found["copy"] = {"last": copy.model(**batch.model_inputs).last_hidden_state}
    return {"outputs": found, "names": [name for name, _ in stream_tensors(side.model)]}


class _NoTokenizer:
    """Stands in for a tokenizer where none is needed."""

    def save_pretrained(self, _folder: Path) -> None:
        """Nothing to write."""
