"""The units that a self-shared student can lose, their salience and masks, and the smaller model that is left.

Units: MLP neurons, key-value heads with their query heads, whole decoder layers. Every layer keeps the same number of
neurons and of heads, because a configuration has one size for all layers; whole layers go besides.

Shape letters: L layers, U units of a kind in a layer, A adapters of the student, R largest rank.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from largekd.errors import ConfigError
from largekd.models.adapters import AdaptedLinear, LowRankMap, adapted_linears
from largekd.models.build import config_with_layers, layers_path
from largekd.models.export import persistent_buffers
from largekd.sharding.accelerator import device
from largekd.sharding.shards import full_shape, gathered

MASKED_KINDS = ("neurons", "head_groups")
"""The kinds of units that every layer has as many of; `layers` themselves are the third kind."""


def cubic_sparsity(target: float, *, done: float) -> float:
    """The share that is pruned when `done` (0 to 1) of the span is over: target·(1 − (1 − done)³).

    Source: Zhu and Gupta 2017, arXiv 1710.01878, equation 1, from an initial sparsity of 0.
    """
    return target * (1.0 - (1.0 - min(max(done, 0.0), 1.0)) ** 3)


def kept_count(units: int, *, sparsity: float) -> int:
    """Units that are left at a sparsity: units·(1 − sparsity), rounded half up, at least one."""
    return max(int(units * (1.0 - sparsity) + 0.5), 1)


def keep_salient(salience: Tensor, kept: Tensor, /, *, count: int) -> Tensor:
    """Of the units that are kept (bool, …, U), the `count` of largest salience in each row; ties go to the first.

    What has gone does not come back: where fewer than `count` are kept, all of them stay.
    """
    ranked = salience.masked_fill(~kept, -torch.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(kept).scatter(-1, order, True) & kept


@dataclass(frozen=True)
class Masks:
    """Which units are left: bool (L, neurons), (L, key-value heads), (L,)."""

    neurons: Tensor
    head_groups: Tensor
    layers: Tensor

    def of(self, kind: str, /, *, layer: int, width: int) -> Tensor:
        """(width,) bool along a linear layer's inputs or outputs, which have a kind of units each as wide as others."""
        kept_U = self.layers[layer : layer + 1] if kind == "layers" else getattr(self, kind)[layer]
        return kept_U.repeat_interleave(width // kept_U.numel())


class PrunedStudent:
    """The masks, saliences and ranks of a model that `adapt` has prepared.

    A unit's salience in a step is |Σ m·∂L/∂m| over all positions of all ranks, with m the unit's mask as a factor: to
    first order, how much the loss changes without it. That of a layer is the sum over its units. That of an adapter is
    the sum of |Σ ρ·∂L/∂ρ| over its ranks. The tensors are the same on all ranks.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._linears: list[tuple[int, AdaptedLinear]] = []
        prefix = layers_path(model) + "."
        for name, linear in adapted_linears(model):
            self._linears.append((int(name.removeprefix(prefix).split(".")[0]), linear))
        config = model.config
        self.depth = int(config.num_hidden_layers)
        sizes = {"neurons": int(config.intermediate_size), "head_groups": int(config.num_key_value_heads)}
        self.masks = Masks(
            **{kind: self._full(self.depth, sizes[kind]) for kind in MASKED_KINDS}, layers=self._full(self.depth)
        )
        self.adapters: list[LowRankMap] = [linear.student for _, linear in self._linears if linear.student is not None]
        self.salience = {kind: self._full(self.depth, sizes[kind]).float() * 0.0 for kind in MASKED_KINDS}
        self.salience["ranks"] = torch.zeros(len(self.adapters), self._room, device=device())
        self._sums = self._track()

    @staticmethod
    def _full(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.bool, device=device())

    @property
    def _room(self) -> int:
        return self.adapters[0].ranks_R.numel()

    def _track(self) -> dict[str, Tensor]:
        """Where the backward passes add this rank's m·∂L/∂m: (L, width) by kind, and (A, R)."""
        sums: dict[str, Tensor] = {"ranks": torch.zeros_like(self.salience["ranks"])}
        for adapter, row_R in zip(self.adapters, sums["ranks"], strict=True):
            adapter.salience_R = row_R
        for layer, linear in self._linears:
            if linear.in_units is not None:
                width = int(full_shape(linear.weight)[1])
                if linear.in_units not in sums:
                    sums[linear.in_units] = torch.zeros(self.depth, width, device=device())
                linear.salience_I = sums[linear.in_units][layer]
        return sums

    def forget_step(self) -> None:
        """Begin a step: what an earlier one has left, such as one that was skipped, does not count."""
        for total in self._sums.values():
            total.zero_()

    @property
    def step_sums(self) -> Tensor:
        """This rank's m·∂L/∂m since the step began, flat; to be added up over ranks."""
        return torch.cat([self._sums[kind].flatten() for kind in self.salience])

    def learn(self, sums: Tensor, /, *, decay: float) -> None:
        """Move the exponential averages of the saliences by a step's `step_sums` over all ranks."""
        parts = sums.split([self._sums[kind].numel() for kind in self.salience])
        for (_, average), part in zip(self.salience.items(), parts, strict=True):
            # Columns of one unit lie side by side.
            step = part.view(len(average), average.shape[-1], -1).sum(-1).abs()
            average.mul_(decay).add_(step, alpha=1.0 - decay)

    def prune(self, *, neurons: float, head_groups: float, layers: float) -> None:
        """Bring every kind to its sparsity; the same on all ranks, without communication."""
        targets = {"neurons": neurons, "head_groups": head_groups}
        kept = {}
        for kind in MASKED_KINDS:
            mask_LU = getattr(self.masks, kind)
            count = kept_count(mask_LU.shape[-1], sparsity=targets[kind])
            kept[kind] = keep_salient(self.salience[kind], mask_LU, count=count)
        of_layer_L = torch.stack([(self.salience[kind] * kept[kind]).sum(-1) for kind in MASKED_KINDS]).sum(0)
        count = kept_count(self.depth, sparsity=layers)
        self.masks = Masks(**kept, layers=keep_salient(of_layer_L, self.masks.layers, count=count))
        self.apply_masks()

    def apply_masks(self) -> None:
        """Write the masks into the linear layers."""
        for layer, linear in self._linears:
            outputs, inputs = full_shape(linear.weight)
            linear.mask_O.copy_(self.masks.of(linear.out_units, layer=layer, width=outputs))
            if linear.in_units is not None:
                assert linear.mask_I is not None
                linear.mask_I.copy_(self.masks.of(linear.in_units, layer=layer, width=inputs))

    def grow(self, *, by: int) -> None:
        """Give the more salient half of the adapters `by` more ranks, as far as there is room."""
        salience_A = self.salience["ranks"].sum(-1)
        everything = torch.ones_like(salience_A, dtype=torch.bool)
        chosen_A = keep_salient(salience_A, everything, count=(len(self.adapters) + 1) // 2)
        self.ranks = torch.where(chosen_A, (self.ranks + by).clamp(max=self._room), self.ranks)

    @property
    def ranks(self) -> Tensor:
        """(A,) ranks in use, int64."""
        return torch.stack([adapter.ranks_R.sum() for adapter in self.adapters]).long()

    @ranks.setter
    def ranks(self, ranks_A: Tensor) -> None:
        places_R = torch.arange(self._room, device=ranks_A.device)
        for adapter, rank in zip(self.adapters, ranks_A, strict=True):
            adapter.ranks_R.copy_(places_R < rank)

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """The layers that are left, in order; waits for the device."""
        return tuple(self.masks.layers.nonzero().flatten().tolist())

    def state(self) -> dict[str, Tensor]:
        """Masks, saliences and ranks."""
        return {
            "ranks": self.ranks,
            **{f"mask.{kind}": getattr(self.masks, kind) for kind in (*MASKED_KINDS, "layers")},
            **{f"salience.{kind}": average for kind, average in self.salience.items()},
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Become what `state` gave."""
        here = {name: tensor.to(device()) for name, tensor in state.items()}
        self.masks = Masks(**{kind: here[f"mask.{kind}"] for kind in (*MASKED_KINDS, "layers")})
        for kind, average in self.salience.items():
            average.copy_(here[f"salience.{kind}"])
        self.ranks = here["ranks"]
        self.apply_masks()


def check_targets(config: PretrainedConfig, *, neurons: float, head_groups: float, layers: float) -> None:
    """Whether the family has a configuration for what would be left. Errors: ConfigError."""
    depth = int(config.num_hidden_layers)
    smaller_config(
        config,
        neurons=kept_count(int(config.intermediate_size), sparsity=neurons),
        head_groups=kept_count(int(config.num_key_value_heads), sparsity=head_groups),
        layers=range(kept_count(depth, sparsity=layers)),
    )


def smaller_config(
    config: PretrainedConfig, *, neurons: int, head_groups: int, layers: Sequence[int]
) -> PretrainedConfig:
    """The same family with so many neurons and key-value heads, and these layers.

    Errors: ConfigError where the family has no such model.
    """
    heads, groups = int(config.num_attention_heads), int(config.num_key_value_heads)
    tree = config_with_layers(config, layers=tuple(layers)).to_dict()
    tree |= {
        "intermediate_size": neurons,
        "num_attention_heads": heads // groups * head_groups,
        "num_key_value_heads": head_groups,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
    }
    try:
        return type(config).from_dict(deepcopy(tree))
    except (StrictDataclassError, ValueError) as error:
        raise ConfigError(
            f"teacher.pruning.head_groups: a {config.model_type!r} model of width {config.hidden_size} cannot have "
            f"{tree['num_attention_heads']} heads ({str(error).splitlines()[-1].strip()}); choose another share."
        ) from error


def pruned_config(student: PrunedStudent) -> PretrainedConfig:
    """The configuration of what is left of the student."""
    neurons, head_groups = (int(getattr(student.masks, kind)[0].sum()) for kind in MASKED_KINDS)
    return smaller_config(student.model.config, neurons=neurons, head_groups=head_groups, layers=student.kept_layers)


def pruned_tensors(student: PrunedStudent) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of what is left, adapters merged, once, under its Hugging Face name, whole.

    A collective call: all ranks walk it to the end. A tensor is valid until the next one is asked for.
    """
    model, kept = student.model, student.kept_layers
    path = layers_path(model) + "."
    new_name = {f"{path}{old}.": f"{path}{new}." for new, old in enumerate(kept)}
    linears = dict(adapted_linears(model))
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, LowRankMap):
            continue
        prefix = name
        if name.startswith(path):
            start = ".".join(name.split(".")[: path.count(".") + 1]) + "."
            if start not in new_name:
                continue
            prefix = new_name[start].rstrip(".") + name[len(start) - 1 :]
        if name in linears:
            layer = int(name.removeprefix(path).split(".")[0])
            yield from _merged(linears[name], masks=student.masks, layer=layer, name=prefix)
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                with gathered([parameter]):
                    yield _joined(prefix, own), parameter.detach()
    left = persistent_buffers(model)
    assert not left, f"buffers {sorted(left)} of a family without any"


def _merged(linear: AdaptedLinear, *, masks: Masks, layer: int, name: str) -> Iterator[tuple[str, Tensor]]:
    outputs, inputs = full_shape(linear.weight)
    rows = masks.of(linear.out_units, layer=layer, width=outputs).nonzero().flatten()
    own = [parameter for parameter in (linear.weight, linear.bias) if parameter is not None]
    adapter = list(linear.student.parameters()) if linear.student is not None else []
    with gathered([*own, *adapter]), torch.no_grad():
        weight_OI = linear.weight.float()
        if linear.student is not None:
            weight_OI = weight_OI + linear.student.product()
        weight_OI = weight_OI.index_select(0, rows)
        if linear.in_units is not None:
            kept_I = masks.of(linear.in_units, layer=layer, width=inputs).nonzero().flatten()
            weight_OI = weight_OI.index_select(1, kept_I)
        yield f"{name}.weight", weight_OI
        if linear.bias is not None:
            yield f"{name}.bias", linear.bias.detach().index_select(0, rows)


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
