"""What the ranks do in test_features_sharded: a feature term in a ZeRO-3 engine, and its gradients as a whole."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from largekd.config.alignment import FeatureConfig
from largekd.config.train import OptimConfig, TrainConfig
from largekd.contracts import Batch, Segment
from largekd.engine.ds_config import train_ds_config
from largekd.engine.train import TrainEngine
from largekd.objectives.features import FeaturePositions, FeatureTerm
from largekd.objectives.layer_maps import LayerPair
from largekd.optim.groups import build_groups
from largekd.sharding.shards import gathered, sharded_init

PAIRS = (LayerPair(0, 1), LayerPair(1, 2), LayerPair(2, 5))
WIDTH = 10
# Per step the active pairs and each rank's segments in two rows of 12; a rank may have nothing to compare.
STEPS: tuple[tuple[tuple[LayerPair, ...], tuple[tuple, tuple]], ...] = (
    (PAIRS, (((Segment(0, 0, 5), Segment(1, 6, 6)), (Segment(2, 0, 3),)), ((Segment(3, 0, 12),), ()))),
    (PAIRS[1:2], (((Segment(0, 0, 9),), (Segment(1, 2, 4),)), ((), ()))),
    (PAIRS[::2], (((), ()), ((Segment(0, 0, 2),), (Segment(1, 0, 7),)))),
)


class Host(nn.Module):
    """A student of three layers with a feature term beside it."""

    def __init__(self, config: FeatureConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.term = FeatureTerm(config, pairs=PAIRS, student_width=WIDTH, teacher_width=teacher_width(config), key="k")

    def forward(self, *, states: Tensor, teacher: dict, positions: Any, pairs: Any, scale: float) -> dict[str, Tensor]:
        captured = {}
        for number, layer in enumerate(self.layers):
            states = captured[number] = states + layer(states).tanh()
        aligned = self.term(captured, teacher, positions=positions, pairs=pairs)
        # A student's last states always have a part in its loss; without one ZeRO-3 keeps old gradients.
        return {"loss": scale * aligned + 0.0 * states.sum()}


def teacher_width(config: FeatureConfig) -> int:
    return WIDTH if config.projector.kind == "none" else 13


def inputs_of(step: int, *, rank: int, config: FeatureConfig) -> dict[str, Any]:
    pairs, segments = STEPS[step]
    generator = torch.Generator().manual_seed(10 * step + rank)
    ids = torch.zeros(2, 12, dtype=torch.int64)
    batch = Batch(ids, ids, ids.float(), ids[0, :0], segments=segments[rank])
    return {
        "states": torch.randn(2, 12, WIDTH, generator=generator),
        "teacher": {p.teacher: torch.randn(2, 12, teacher_width(config), generator=generator) for p in PAIRS},
        "positions": FeaturePositions.of(batch),
        "pairs": pairs,
    }


def gradients(*, configs: list[dict], built_sharded: bool) -> list[dict[str, Any]]:
    """For each configuration the weights, the gradient of every step, and how far a last step moves each parameter."""
    return [_gradients_of_one(FeatureConfig.model_validate(one), built_sharded=built_sharded) for one in configs]


def _gradients_of_one(config: FeatureConfig, *, built_sharded: bool) -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_grad

    world, rank = dist.get_world_size(), dist.get_rank()
    train = TrainConfig(global_batch_size=world, micro_batch_size=1, sequence_length=24, precision="fp32", max_steps=1)
    optim = OptimConfig(lr=1e-2, schedule="constant", weight_decay=0.0)
    placement = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    ds_config = train_ds_config(placement, train=train, optim=optim, accumulation=1, world_size=world)
    torch.manual_seed(5)
    with sharded_init(ds_config) if built_sharded else nullcontext():
        module = Host(config)
    if built_sharded:
        for parameter in module.layers.parameters():
            with gathered([parameter], modifier_rank=0), torch.no_grad():
                parameter.normal_(std=0.3)
    engine = TrainEngine(
        module=module, groups=build_groups(module.named_parameters(), config=optim), ds_config=ds_config
    )
    weights, found = _whole(module), []
    for step in range(len(STEPS)):
        inputs = inputs_of(step, rank=rank, config=config)
        # DeepSpeed averages over ranks.
        engine.backward(engine(**inputs, scale=float(world))["loss"], last=True)
        found.append({name: safe_get_full_grad(p).clone() for name, p in module.named_parameters()})
        engine.step(lr=1e-2 if step == len(STEPS) - 1 else 0.0)
    moved = {name: float((value - weights[name]).abs().max()) for name, value in _whole(module).items()}
    engine.close()
    return {"weights": weights, "gradients": found, "moved": moved}


def _whole(module: nn.Module) -> dict[str, Tensor]:
    result = {}
    for name, parameter in module.named_parameters():
        with gathered([parameter]):
            result[name] = parameter.detach().clone()
    return result
