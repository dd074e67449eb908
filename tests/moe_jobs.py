"""What the ranks do in tests of mixtures of experts."""

from typing import Any

import torch
import torch.distributed as dist
from step_jobs import ZERO3, build_side, own_micro_batches, run_step
from tiny_moe import tiny_moe
from torch import Tensor, nn

from largekd.config.train import OptimConfig, TrainConfig
from largekd.engine import frozen as frozen_module
from largekd.engine import train as train_module
from largekd.engine.ds_config import frozen_ds_config, train_ds_config
from largekd.engine.frozen import FrozenEngine
from largekd.engine.train import TrainEngine
from largekd.models.decoder import enable_checkpointing
from largekd.optim.groups import build_groups

EXPERTS, WIDTH = 4, 16
IDS = torch.arange(3, 19)[None]


class ListMixture(nn.Module):
    """Experts as modules of their own: only those that a token chose are called."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))

    def forward(self, rows: Tensor) -> Tensor:
        probabilities = self.gate(rows).softmax(-1)
        weight, choice = probabilities.max(-1)
        result = rows
        for index, expert in enumerate(self.experts):
            places = (choice == index).nonzero().flatten()
            if len(places):
                result = result.index_add(0, places, expert(rows[places]) * weight[places, None])
        return result


class ListModel(nn.Module):
    """Two such mixtures; the ranks' inputs point them to different experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH, bias=False)
        self.layers = nn.ModuleList(ListMixture() for _ in range(2))

    def forward(self, *, rows: Tensor) -> dict[str, Tensor]:
        rows = self.embed(rows)
        for layer in self.layers:
            rows = layer(rows)
        return {"loss": rows.square().mean()}

    def named_trainables(self) -> Any:
        return self.named_parameters()


def list_model() -> ListModel:
    """The model, whose rank-dependent input vectors below choose expert 0 on rank 0 and expert 2 on rank 1."""
    torch.manual_seed(0)
    model = ListModel()
    with torch.no_grad():
        model.embed.weight.copy_(torch.eye(WIDTH))
        for layer in model.layers:
            layer.gate.weight.zero_()
            layer.gate.weight[:, :EXPERTS] = 4 * torch.eye(EXPERTS)
            for expert in layer.experts:
                expert.weight.mul_(0.2)
    return model


def rows_of(rank: int, *, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    rows = 0.1 * torch.randn((6, WIDTH), generator=generator)
    rows[:, 2 * rank] += 3.0
    return rows


def train_list_model(*, steps: int, leaf: bool = True) -> dict[str, Any]:
    """Losses and final weights; without `leaf` the marking is left out."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    marking = train_module.mark_leaf_modules
    train = TrainConfig(
        global_batch_size=ranks, micro_batch_size=1, sequence_length=16, precision="fp32", gradient_clipping=0.0
    )
    optim = OptimConfig(lr=1e-2, schedule="constant", weight_decay=0.0)
    ds_config = train_ds_config(ZERO3, train=train, optim=optim, accumulation=1, world_size=ranks)
    model = list_model()
    if not leaf:
        train_module.mark_leaf_modules = lambda module: ()
    try:
        engine = TrainEngine(
            module=model, groups=build_groups(model.named_parameters(), config=optim), ds_config=ds_config
        )
    finally:
        train_module.mark_leaf_modules = marking
    losses = []
    for step in range(steps):
        loss = engine(rows=rows_of(rank, step=step))["loss"]
        engine.backward(loss, last=True)
        engine.step(lr=1e-2)
        losses.append(loss.item())
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {name: safe_get_full_fp32_param(p).clone() for name, p in engine.module.named_parameters()}
    engine.close()
    return {"losses": losses, "weights": weights}


def evaluate_list_model(*, steps: int) -> list[float]:
    """The frozen engine's losses on inputs that choose other experts on each rank."""
    assert frozen_module.mark_leaf_modules is train_module.mark_leaf_modules
    ranks, rank = dist.get_world_size(), dist.get_rank()
    train = TrainConfig(global_batch_size=ranks, micro_batch_size=1, sequence_length=16, precision="fp32")
    engine = FrozenEngine(module=list_model(), ds_config=frozen_ds_config(ZERO3, train=train, world_size=ranks))
    losses = [float(engine(rows=rows_of(rank, step=step))["loss"]) for step in range(steps)]
    engine.close()
    return losses


class Answers(nn.Module):
    """A tiny model as an engine takes it; its loss has a gradient at every weight."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *, ids: Tensor) -> dict[str, Tensor]:
        return {"loss": self.model(input_ids=ids, use_cache=False).logits.float().square().mean()}


def gradients_above_frozen_layers(*, family: str, frozen: str, checkpointing: bool) -> dict[str, Tensor]:
    """Whole gradients of what learns, in one step of every rank on the same ids."""
    from deepspeed.utils import safe_get_full_grad

    ranks = dist.get_world_size()
    train = TrainConfig(
        global_batch_size=ranks, micro_batch_size=1, sequence_length=16, precision="fp32", gradient_clipping=0.0
    )
    optim = OptimConfig.model_validate({"groups": [{"name": "frozen", "pattern": frozen, "lr_multiplier": 0}]})
    model = Answers(tiny_moe(family, seed=3))
    if checkpointing:
        enable_checkpointing(model.model)
    engine = TrainEngine(
        module=model,
        groups=build_groups(model.named_parameters(), config=optim),
        ds_config=train_ds_config(ZERO3, train=train, optim=optim, accumulation=1, world_size=ranks),
    )
    engine.train()
    engine.backward(engine(ids=IDS)["loss"], last=True)
    found = {name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters() if p.requires_grad}
    engine.close()
    return found


def router_steps(*, steps: int, rows: int, micro_batch_size: int, lr: float, **build: Any) -> dict[str, Any]:
    """Steps on fresh rows: each expert's share of the load after each, and which experts this rank chose first."""
    share = rows // dist.get_world_size()
    side = build_side(micro_batch_size=micro_batch_size, accumulation=share // micro_batch_size, lr=lr, **build)
    loads, figures, own = [], [], None
    for step in range(steps):
        batches = own_micro_batches(rows=rows, packed=True, micro_batch_size=micro_batch_size, seed=step)
        _, result = run_step(side, batches, step=min(step, 9), lr=lr)
        assert side.loads is not None and result.outcome.applied
        loads.append(side.loads.share_LX.clone())
        figures.append(side.loads.figures())
        own = result.extras["router"] if own is None else own
    side.close()
    return {"loads": torch.stack(loads), "figures": figures, "own": own}


def squares_of_step(*, rows: int, micro_batch_size: int, **build: Any) -> tuple[list[str], list[float]]:
    """Names of the terms and the squared norms of their gradients in one step."""
    share = rows // dist.get_world_size()
    side = build_side(micro_batch_size=micro_batch_size, accumulation=share // micro_batch_size, **build)
    batches = own_micro_batches(rows=rows, packed=True, micro_batch_size=micro_batch_size)
    _, result = run_step(side, batches, term_gradients=True)
    side.close()
    return [summand.name for summand in side.objective.summands], result.extras["squares"].tolist()
