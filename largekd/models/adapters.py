"""Low-rank adapters and binary masks on the linear layers of a frozen backbone, for two models at a time.

The student's layer is H(x) = m_o ∘ ((W + s·B·A)·(m_i ∘ x) + b), the teacher's (W + s·B_t·A_t)·x + b with the same W
(arXiv 2401.12200, section 4). Which model a forward is of is an argument of the call: it travels with the keyword
arguments of every decoder layer to its attention module, where a hook binds it for the layer. What activation
checkpointing runs again has the same arguments, and so the same adapters.

Shape letters: P positions of all rows, I inputs and O outputs of a linear layer, R largest rank.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from largekd.config.adapters import AdaptersConfig
from largekd.errors import ConfigError
from largekd.models.build import layers_path
from largekd.sharding.shards import full_numel, full_shape, sharded_modules

AdapterUse = Literal["student", "teacher", "both"]
"""Whose layer it is. `both`: the first half of the rows is the teacher's, the second the student's; each weight is
gathered and multiplied once for both."""

ADAPTERS_KEY = "largekd_adapters"
"""The keyword argument of a decoder's forward that carries an AdapterUse."""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose decoder layers are made of the linear layers below, and nothing else that has a unit's width."""

# Linear layer of a decoder layer -> the units along its (inputs, outputs).
_UNITS: Mapping[str, tuple[str | None, str]] = {
    "self_attn.q_proj": (None, "head_groups"),
    "self_attn.k_proj": (None, "head_groups"),
    "self_attn.v_proj": (None, "head_groups"),
    "self_attn.o_proj": ("head_groups", "layers"),
    "mlp.gate_proj": (None, "neurons"),
    "mlp.up_proj": (None, "neurons"),
    "mlp.down_proj": ("neurons", "layers"),
}


@dataclass
class Binding:
    """Whose adapters the linear layers of one decoder layer use, set by each run of that layer."""

    use: AdapterUse = "student"

    def bind(self, _module: nn.Module, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The hook before the forward of the layer's attention, its first module with adapters."""
        options = dict(options)
        self.use = options.pop(ADAPTERS_KEY, "student")
        return inputs, options


class LowRankMap(nn.Module):
    """scale·B·(ρ ∘ (A·x)). B starts at zero, so that the map starts at zero; ρ are ones for the ranks in use.

    The shapes are those of the largest rank, because shards of a partitioned parameter have a fixed size. A rank that
    is not in use has no gradient, and its column of B stays zero, so that using it changes nothing at first.
    """

    salience_R: Tensor | None = None

    def __init__(self, *, in_width: int, out_width: int, rank: int, room: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.lora_a = nn.Parameter(torch.empty(room, in_width))
        self.lora_b = nn.Parameter(torch.empty(out_width, room))
        with torch.no_grad():
            self.lora_a.normal_(std=in_width**-0.5)
            self.lora_b.zero_()
        ranks_R = torch.zeros(room, device=self.lora_a.device, dtype=self.lora_a.dtype)
        ranks_R[:rank] = 1.0
        self.register_buffer("ranks_R", ranks_R, persistent=False)

    ranks_R: Tensor

    def forward(self, x_PI: Tensor) -> Tensor:
        """(P, I) to (P, O)."""
        narrow_PR = masked(F.linear(x_PI, self.lora_a), self.ranks_R, salience=self.salience_R)
        return F.linear(narrow_PR, self.lora_b) * self.scale

    def product(self) -> Tensor:
        """(O, I) scale·B·A of the ranks in use, float32; the parameters must be whole."""
        return self.scale * (self.lora_b.float() * self.ranks_R.float()) @ self.lora_a.float()


class AdaptedLinear(nn.Module):
    """A frozen linear layer with masks for the student and, where they are asked for, adapters for both models."""

    salience_I: Tensor | None = None
    bias: nn.Parameter | None
    mask_I: Tensor | None
    mask_O: Tensor

    def __init__(
        self,
        base: nn.Linear,
        *,
        binding: Binding,
        units: tuple[str | None, str],
        adapters: AdaptersConfig | None,
    ) -> None:
        super().__init__()
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.binding = binding
        self.in_units, self.out_units = units
        out_width, in_width = full_shape(base.weight)
        empty = self.weight.new_empty(0)
        mask_I = None if self.in_units is None else empty.new_ones(in_width)
        self.register_buffer("mask_I", mask_I, persistent=False)
        self.register_buffer("mask_O", empty.new_ones(out_width), persistent=False)
        self.student: LowRankMap | None = None
        self.teacher: LowRankMap | None = None
        if adapters is not None:
            shape: dict[str, Any] = {"in_width": in_width, "out_width": out_width, "scale": adapters.scale}
            self.student = LowRankMap(**shape, rank=adapters.rank, room=adapters.largest_rank)
            self.teacher = LowRankMap(**shape, rank=adapters.rank, room=adapters.rank)

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) to (…, O)."""
        x_PI = x.reshape(-1, x.shape[-1])
        match self.binding.use:
            case "teacher":
                y_PO = self._teachers(x_PI, self._frozen(x_PI))
            case "student":
                x_PI = self._kept(x_PI)
                y_PO = self._students(x_PI, self._frozen(x_PI))
            case "both":
                teacher_PI, student_PI = x_PI.chunk(2)
                if self.mask_I is not None:
                    student_PI = self._kept(student_PI)
                    x_PI = torch.cat([teacher_PI, student_PI])
                teacher_PO, student_PO = self._frozen(x_PI).chunk(2)
                y_PO = torch.cat([self._teachers(teacher_PI, teacher_PO), self._students(student_PI, student_PO)])
        return y_PO.view(*x.shape[:-1], y_PO.shape[-1])

    def _frozen(self, x_PI: Tensor) -> Tensor:
        return F.linear(x_PI, self.weight, self.bias)

    def _kept(self, x_PI: Tensor) -> Tensor:
        return x_PI if self.mask_I is None else masked(x_PI, self.mask_I, salience=self.salience_I)

    def _teachers(self, x_PI: Tensor, y_PO: Tensor) -> Tensor:
        return y_PO if self.teacher is None else y_PO + self.teacher(x_PI)

    def _students(self, x_PI: Tensor, y_PO: Tensor) -> Tensor:
        return (y_PO if self.student is None else y_PO + self.student(x_PI)) * self.mask_O


def masked(x_PI: Tensor, mask_I: Tensor, *, salience: Tensor | None) -> Tensor:
    """mask ∘ x. Where gradients are recorded, the backward pass adds mask ∘ ∂L/∂mask to `salience`, float32 (I,)."""
    if salience is None or not torch.is_grad_enabled():
        return x_PI * mask_I
    assert x_PI.requires_grad, "no gradient reaches the mask: its units would seem to be worth nothing"
    result: Tensor = _Masked.apply(x_PI, mask_I, salience)
    return result


class _Masked(torch.autograd.Function):
    """Reads the mask's gradient on the way, so that the mask need not be a parameter."""

    @staticmethod
    def forward(ctx: Any, x_PI: Tensor, mask_I: Tensor, salience_I: Tensor) -> Tensor:
        ctx.save_for_backward(x_PI, mask_I)
        ctx.salience_I = salience_I
        return x_PI * mask_I

    @staticmethod
    def backward(ctx: Any, gradient_PI: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_PI, mask_I = ctx.saved_tensors
        kept_PI = gradient_PI * mask_I
        ctx.salience_I.add_((kept_PI * x_PI).sum(0, dtype=ctx.salience_I.dtype))
        return kept_PI, None, None


def adapt(model: PreTrainedModel, *, config: AdaptersConfig, ds_config: Mapping[str, Any], seed: int) -> None:
    """Freeze `model` and give its decoder layers masks, and adapters where the pattern finds their names.

    Both models start as the backbone. The modules keep their names: adapters are `<name>.student.lora_a` and so on.
    Errors: ConfigError for a family whose parts are not known, a pattern that finds nothing, and a rank beyond a width.
    """
    check_family(model.config)
    pattern = re.compile(config.pattern)
    model.requires_grad_(False)
    path, found = layers_path(model), 0
    with sharded_modules(ds_config, seed=seed):
        for index, layer in enumerate(_layers(model)):
            if index == 0:
                layer.register_forward_pre_hook(_with_gradients, with_kwargs=True)
            binding = Binding()
            layer.get_submodule("self_attn").register_forward_pre_hook(binding.bind, with_kwargs=True)
            for name, units in _UNITS.items():
                base, whole = layer.get_submodule(name), f"{path}.{index}.{name}"
                assert isinstance(base, nn.Linear), whole
                chosen = config if pattern.search(whole) else None
                if chosen is not None:
                    _check_rank(config, base=base, name=whole)
                    found += 1
                layer.set_submodule(name, AdaptedLinear(base, binding=binding, units=units, adapters=chosen))
    if not found:
        raise ConfigError(
            f"teacher.adapters.pattern = {config.pattern!r}: finds no linear layer of the decoder; they are called "
            f"{path}.0.self_attn.q_proj and so on, with {', '.join(name.split('.')[1] for name in _UNITS)}."
        )


def _with_gradients(
    _module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The hook before the first decoder layer: the embedding's output requires gradients.

    Else those of a frozen model begin at its first adapter, and the units before it would have no salience. A hook on
    the embedding itself would do the same, but ZeRO-3 would gather its weight once more for the backward pass.
    """
    if not torch.is_grad_enabled():
        return inputs, options
    if inputs:
        return (inputs[0].detach().requires_grad_(), *inputs[1:]), options
    return inputs, options | {"hidden_states": options["hidden_states"].detach().requires_grad_()}


def check_family(config: PretrainedConfig) -> None:
    """Whether the parts of such a model are known. Errors: ConfigError."""
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"teacher.kind = 'self_shared': the parts of a {config.model_type!r} model are not known; student.model "
            f"must be one of {', '.join(FAMILIES)}."
        )


def adapted_linears(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """The layers that `adapt` made, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            yield name, module


@dataclass(frozen=True)
class AdapterSizes:
    """Elements of the backbone, and of each model's adapters; the teacher's are what it has for itself."""

    backbone: int
    student: int
    teacher: int

    @property
    def duplicated_frac(self) -> float:
        """The teacher's own parameters over those of the backbone."""
        return self.teacher / self.backbone


def adapter_sizes(model: PreTrainedModel) -> AdapterSizes:
    """Elements over all ranks."""
    own = {"student": 0, "teacher": 0}
    for _, linear in adapted_linears(model):
        for side in own:
            adapter = getattr(linear, side)
            own[side] += 0 if adapter is None else sum(full_numel(parameter) for parameter in adapter.parameters())
    total = sum(full_numel(parameter) for parameter in model.parameters())
    return AdapterSizes(backbone=total - sum(own.values()), **own)


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    layers = model.get_submodule(layers_path(model))
    assert isinstance(layers, nn.ModuleList)
    return layers


def _check_rank(config: AdaptersConfig, *, base: nn.Linear, name: str) -> None:
    narrower = min(full_shape(base.weight))
    if config.largest_rank > narrower:
        key = "rank" if config.max_rank is None else "max_rank"
        raise ConfigError(
            f"teacher.adapters.{key} = {config.largest_rank}: {name} is {narrower} wide on its narrower side, which is "
            "the largest rank of a map beside it; lower it."
        )
