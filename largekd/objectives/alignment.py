"""All alignment terms of an objective as one module, and which pairs of layers take part in a step.

Shape letter: N alignment terms, in the order of the objective's summands.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from largekd.config.alignment import AttentionConfig, FeatureConfig
from largekd.contracts import Batch, TapRequest, Taps
from largekd.errors import ConfigError
from largekd.models.taps import AttentionShape
from largekd.objectives.attention import AttentionTerm
from largekd.objectives.attention_maps import AttentionLayout
from largekd.objectives.features import FeaturePositions, FeatureTerm
from largekd.objectives.layer_maps import LayerPair, sample_pairs
from largekd.objectives.terms import Objective


@dataclass(frozen=True)
class DecoderShape:
    """What alignment needs to know of a model. `attention` is the shape of all layers that are compared."""

    depth: int
    width: int
    attention: AttentionShape | None = None


@dataclass(frozen=True)
class AlignmentPlan:
    """The pairs of each term that take part in a step, and the layers that both models must capture for them."""

    pairs: tuple[tuple[LayerPair, ...], ...] = ()
    student: TapRequest = field(default_factory=TapRequest)
    teacher: TapRequest = field(default_factory=TapRequest)


class Alignment(nn.Module):
    """The terms with their projectors, predictors and head weights.

    Parameters are `terms.<name>.…`, with _ for dots. Errors: ConfigError for shapes that cannot be compared, and for
    names that a module cannot have.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        pairs: Mapping[str, Sequence[LayerPair]],
        student: DecoderShape,
        teacher: DecoderShape,
    ) -> None:
        super().__init__()
        self.configs: tuple[FeatureConfig | AttentionConfig, ...] = (*objective.features, *objective.attention)
        self.pairs = tuple(tuple(pairs[config.name]) for config in self.configs)
        self.terms = nn.ModuleDict()
        translated = objective.config.translation is not None
        for config, chosen in zip(self.configs, self.pairs, strict=True):
            if isinstance(config, FeatureConfig):
                term: nn.Module = FeatureTerm(
                    config,
                    pairs=chosen,
                    student_width=student.width,
                    teacher_width=teacher.width,
                    key=f"objective.features.{config.name}",
                )
            else:
                assert student.attention is not None and teacher.attention is not None
                term = AttentionTerm(
                    config, pairs=chosen, student=student.attention, teacher=teacher.attention, translated=translated
                )
            if hasattr(self.terms, _key(config)):
                raise ConfigError(
                    f"objective: a term of features or attention has the name {config.name!r}, which torch has taken, "
                    "or another term with _ for a dot; choose another name."
                )
            self.terms[_key(config)] = term

    def pair_anew(self, pairs: Mapping[str, Sequence[LayerPair]], /) -> None:
        """From the next plan on compare these layers in the named terms, which have one projector for all pairs."""
        for config, term in zip(self.configs, self.terms.values(), strict=True):
            if config.name in pairs:
                assert isinstance(term, FeatureTerm) and list(term.projectors) == ["shared"] and not term.predictors
                term.pairs = tuple(pairs[config.name])
        self.pairs = tuple(
            tuple(pairs.get(config.name, earlier)) for config, earlier in zip(self.configs, self.pairs, strict=True)
        )

    @property
    def attended(self) -> frozenset[int]:
        """The student's layers whose attention some term compares at some step."""
        return frozenset(
            pair.student
            for config, pairs in zip(self.configs, self.pairs, strict=True)
            if not isinstance(config, FeatureConfig)
            for pair in pairs
        )

    def plan(self, *, seed: int, step: int) -> AlignmentPlan:
        """What takes part in a step (0 is the first); a function of (seed, step), the same on all ranks."""
        active = tuple(
            chosen
            if config.sample_pairs is None
            else sample_pairs(chosen, count=config.sample_pairs, seed=seed, step=step)
            for config, chosen in zip(self.configs, self.pairs, strict=True)
        )
        layers: dict[tuple[str, str], set[int]] = {}
        for config, chosen in zip(self.configs, active, strict=True):
            kind = "hidden" if isinstance(config, FeatureConfig) else "attention"
            layers.setdefault(("student", kind), set()).update(pair.student for pair in chosen)
            layers.setdefault(("teacher", kind), set()).update(pair.teacher for pair in chosen)

        def request(side: str) -> TapRequest:
            hidden, attention = (tuple(sorted(layers.get((side, kind), ()))) for kind in ("hidden", "attention"))
            return TapRequest(hidden=hidden, attention=attention)

        return AlignmentPlan(pairs=active, student=request("student"), teacher=request("teacher"))

    def forward(
        self, student: Taps, teacher: Taps, *, batch: Batch, plan: AlignmentPlan, squares_N: Tensor | None = None
    ) -> Tensor:
        """(N,) differentiable float32 sums of the terms; see each for what it counts.

        To `squares_N` the backward pass adds the squared norm of each term's gradient of the captured activations.
        """
        positions = layout = None
        sums = []
        for index, (config, active) in enumerate(zip(self.configs, plan.pairs, strict=True)):
            term = self.terms[_key(config)]
            own = student if squares_N is None else _watched(student, square=squares_N[index])
            if isinstance(config, FeatureConfig):
                positions = positions or FeaturePositions.of(batch)
                total = term(own.hidden, teacher.hidden, positions=positions, pairs=active)
            else:
                layout = layout or AttentionLayout.of(batch)
                total = term(own.attention, teacher.attention, layout=layout, pairs=active)
            sums.append(total.float())
        return torch.stack(sums)


def check_attention_shapes(shapes: Mapping[int, AttentionShape], *, key: str) -> AttentionShape | None:
    """The one shape that all compared layers have. Errors: ConfigError when they differ."""
    if not shapes:
        return None
    first_layer, first = next(iter(shapes.items()))
    for layer, shape in shapes.items():
        if shape != first:
            raise ConfigError(
                f"objective.attention: layers {first_layer} and {layer} of the {key} have different attention shapes "
                f"({first} and {shape}); name layers of one shape with map: explicit."
            )
    return first


def _watched(taps: Taps, *, square: Tensor) -> Taps:
    """The same activations as tensors of their own, through which one term's gradients flow; `square` sums them up."""

    def add(gradient: Tensor) -> None:
        square.add_(gradient.float().square().sum())

    def watched(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        alias = tensor.view_as(tensor)
        alias.register_hook(add)
        return alias

    attention = {
        layer: replace(
            inputs,
            query_BHSd=watched(inputs.query_BHSd),
            key_BGSd=watched(inputs.key_BGSd),
            value_BGSd=watched(inputs.value_BGSd),
        )
        for layer, inputs in taps.attention.items()
    }
    return Taps({layer: watched(states) for layer, states in taps.hidden.items()}, attention)


def _key(config: FeatureConfig | AttentionConfig) -> str:
    # A module's name may not have dots.
    return config.name.replace(".", "_")
