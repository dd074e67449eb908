"""Experts out of MLPs, experts out of experts, and MLPs out of experts.

Shape letters: X experts of the teacher, Y of the student, F neurons of a dense MLP, J of an expert, D width, S slices
of a dense MLP, K experts that a token is sent to.

A dense teacher's function is kept exactly, up to rounding, without noise and where the other shapes are the teacher's:
copies: with weights that are made to add up to 1, or when all experts are active; otherwise with router_std = 0.
S slices, Y = R·S experts, expert r·S + s holding slice s: the S experts of a copy share a row of the router. Exact
where all experts are active (with weights that add up to 1, any router), and where K is a multiple of S and
router_std > 0, because the S experts of one copy tie and are chosen together (He et al. 2024, arXiv 2410.07524).
With fewer active experts than slices a token meets a part of the neurons: only the mean is right.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from largekd.config.experts import ExpertsConfig
from largekd.errors import ConfigError
from largekd.initialisation.axes import AxisMap, Select
from largekd.initialisation.derive import Derivation, Read
from largekd.initialisation.expert_maps import LayerLoads, correspondence, expert_map, most_used
from largekd.initialisation.expert_shapes import ExpertShape, experts_of, has_experts, slices_of
from largekd.initialisation.sizes import sizes_of
from largekd.models.build import layers_path

Rule = Callable[[str], Derivation]
"""How a tensor of this name, in the student's layers, is made of the teacher's but for its experts."""

_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight")
_MLP = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")


def expert_derivations(
    model: PreTrainedModel,
    *,
    config: ExpertsConfig,
    teacher_config: PretrainedConfig,
    layers: tuple[int, ...],
    rule: Rule,
    loads: Mapping[int, LayerLoads],
    seed: int,
) -> dict[str, Derivation]:
    """Derivations of the MLP tensors of every layer in which teacher and student differ in their experts.

    layers: the teacher's layer of each of the student's. rule: the maps of the other axes. loads: by the teacher's
    layer, where `needs_loads`. seed: of the new routers and the noise.
    Errors: ConfigError where two mixtures have ordinary MLPs in layers that do not correspond.
    """
    before, after = experts_of(teacher_config), experts_of(model.config)
    theirs, ours = sizes_of(teacher_config), sizes_of(model.config)
    made: dict[str, Derivation] = {}
    for new, old in enumerate(layers):
        prefix = f"{layers_path(model)}.{new}."
        was, becomes = has_experts(teacher_config, layer=old), has_experts(model.config, layer=new)
        if was != becomes and before is not None and after is not None:
            raise ConfigError(
                f"student.initialise: layer {new} of the student has {'experts' if becomes else 'an ordinary MLP'} and "
                f"the teacher's layer {old}, which it is made of, has not; change student.initialise.layers, or "
                "mlp_only_layers and decoder_sparse_step of student.config."
            )
        if becomes and not was:
            assert after is not None
            split = config.from_dense == "split"
            slices = slices_of(theirs.neurons(old), width=ours.neurons(new), experts=after.experts) if split else 1
            made |= _Upcycling(
                config=config,
                after=after,
                slices=slices,
                width=sizes_of(model.config).width,
                seed=seed,
                prefix=prefix,
                rule=rule,
            ).derivations()
        elif becomes and was and before != after:
            map_ = _experts_of(config, teacher=before, student=after, loads=loads.get(old))
            made |= {prefix + name: _mapped(rule(prefix + name), map_) for name in _EXPERTS}
        elif was and not becomes:
            neurons, width = ours.neurons(new), theirs.neurons(old)
            parts = -(-neurons // width) if config.to_dense == "concatenate" else 1
            made |= _dense(config, loads=loads[old], parts=parts, neurons=neurons, prefix=prefix, rule=rule)
    return made


def corresponding_experts(
    config: ExpertsConfig,
    *,
    teacher_config: PretrainedConfig,
    student_config: PretrainedConfig,
    layers: tuple[int, ...],
    loads: Mapping[int, LayerLoads],
) -> dict[str, list[int]]:
    """By the student's layer, where both are mixtures of different numbers of experts, what `correspondence` says: the
    file that objective.router.distil.expert_map takes. Empty otherwise."""
    before, after = experts_of(teacher_config), experts_of(student_config)
    if before is None or after is None or before.experts == after.experts:
        return {}
    return {
        str(new): correspondence(
            _experts_of(config, teacher=before, student=after, loads=loads.get(old)), of=before.experts
        )
        for new, old in enumerate(layers)
        if has_experts(student_config, layer=new)
    }


def _experts_of(
    config: ExpertsConfig, *, teacher: ExpertShape | None, student: ExpertShape | None, loads: LayerLoads | None
) -> AxisMap:
    assert teacher is not None
    assert student is not None
    return expert_map(config.fewer, count=student.experts, of=teacher.experts, loads=loads)


@dataclass(frozen=True)
class _Upcycling:
    """One layer's experts out of an MLP."""

    config: ExpertsConfig
    after: ExpertShape
    slices: int
    width: int
    seed: int
    prefix: str
    rule: Rule

    def derivations(self) -> dict[str, Derivation]:
        gate, up, down = (self.rule(self.prefix + name) for name in _MLP)
        gate_up_name, down_name, router_name = (self.prefix + name for name in _EXPERTS)
        copies = self.after.experts // self.slices
        how = f"{copies} copies" if self.slices == 1 else f"{copies} copies of {self.slices} slices"
        noisy = f", noise {self.config.noise:g}" if self.config.noise else ""
        scale = self._scale
        exact = 0.0 if self.config.noise else 1.0
        return {
            gate_up_name: Derivation(
                sources=(*gate.sources, *up.sources),
                how=f"{gate.how}, {how}{noisy}",
                make=functools.partial(self._gate_up, gate=gate, up=up, name=gate_up_name),
                copied_frac=exact * gate.copied_frac,
            ),
            down_name: Derivation(
                sources=down.sources,
                how=f"{down.how}, {how}{'' if scale == 1 else f', times {scale:g}'}{noisy}",
                make=functools.partial(self._down, down=down, name=down_name),
                copied_frac=exact * down.copied_frac if scale == 1 else 0.0,
            ),
            router_name: Derivation(
                sources=(),
                how=f"drawn, standard deviation {self.config.router_std:g}",
                make=functools.partial(self._router, name=router_name),
            ),
        }

    @property
    def _scale(self) -> float:
        """Of the outputs: S, and what the weights of a router that tells nothing apart lack to add up to 1."""
        return self.slices * (1.0 if self.after.renormalised else self.after.experts / self.after.active)

    def _gate_up(self, read: Read, *, gate: Derivation, up: Derivation, name: str) -> Tensor:
        halves = [part.make(read).unflatten(0, (self.slices, -1)) for part in (gate, up)]
        return self._copied(torch.cat(halves, dim=1), name=name)

    def _down(self, read: Read, *, down: Derivation, name: str) -> Tensor:
        down_SDJ = down.make(read).unflatten(1, (self.slices, -1)).movedim(1, 0)
        scaled = down_SDJ if self._scale == 1 else (down_SDJ.float() * self._scale).to(down_SDJ.dtype)
        return self._copied(scaled, name=name)

    def _copied(self, value: Tensor, *, name: str) -> Tensor:
        stacked = value.repeat(self.after.experts // self.slices, 1, 1)
        if not self.config.noise:
            return stacked
        noise = torch.randn(stacked.shape, generator=_generator(name, seed=self.seed))
        wide = stacked.float()
        return (wide + noise * (self.config.noise * wide.std())).to(stacked.dtype)

    def _router(self, _read: Read, *, name: str) -> Tensor:
        groups = self.after.experts // self.slices
        rows = torch.randn(groups, self.width, generator=_generator(name, seed=self.seed))
        return (rows * self.config.router_std).repeat_interleave(self.slices, dim=0)


def _mapped(base: Derivation, map_: AxisMap) -> Derivation:
    chosen = isinstance(map_, Select)
    return Derivation(
        sources=base.sources,
        how=f"{base.how}, experts {'chosen' if chosen else 'merged'}",
        make=lambda read: map_.apply(base.make(read), dim=0),
        copied_frac=base.copied_frac if chosen else 0.0,
    )


def _dense(
    config: ExpertsConfig, *, loads: LayerLoads, parts: int, neurons: int, prefix: str, rule: Rule
) -> dict[str, Derivation]:
    """An MLP out of a layer's experts, which count by the weight that the router gives them.

    Of experts side by side the most used stand first, and what is beyond `neurons` is cut.
    """
    gate_up, down = (rule(prefix + name) for name in _EXPERTS[:2])
    total = float(loads.weight_X.sum())
    if config.to_dense == "average":
        how, used, factor = "experts averaged", loads.weight_X / total, torch.tensor([total])
    else:
        chosen = most_used(loads, count=parts)
        chosen = chosen[loads.weight_X[chosen].argsort(descending=True, stable=True)]
        how = f"experts {', '.join(map(str, chosen.tolist()))}"
        shares = loads.weight_X[chosen]
        used, factor = chosen, shares / shares.sum() * total

    def experts(value: Tensor) -> Tensor:
        """(parts, …): the averaged expert, or the chosen ones."""
        if config.to_dense == "average":
            return torch.tensordot(used.float(), value.float(), dims=1)[None].to(value.dtype)
        return value[used]

    def half(read: Read, *, index: int) -> Tensor:
        return experts(gate_up.make(read)).chunk(2, dim=1)[index].flatten(0, 1)[:neurons]

    def output(read: Read) -> Tensor:
        value = experts(down.make(read))
        scaled_PDJ = (value.float() * factor[:, None, None]).to(value.dtype)
        return scaled_PDJ.movedim(0, 1).flatten(1, 2)[:, :neurons].contiguous()

    copied = 0.0 if config.to_dense == "average" else 1.0
    makers: tuple[Callable[[Read], Tensor], ...] = (
        functools.partial(half, index=0),
        functools.partial(half, index=1),
        output,
    )
    bases = (gate_up, gate_up, down)
    return {
        prefix + name: Derivation(
            sources=base.sources,
            how=f"{base.how}, {how}",
            make=make,
            copied_frac=copied * base.copied_frac if base is gate_up else 0.0,
        )
        for name, base, make in zip(_MLP, bases, makers, strict=True)
    }


def _generator(name: str, *, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
