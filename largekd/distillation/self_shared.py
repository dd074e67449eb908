"""The self-shared teacher inside the student's engine: its pass, its own loss, and how the builder puts it together."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from largekd.config.adapters import SelfSharedTeacherConfig
from largekd.config.alignment import ClosestLayersConfig
from largekd.config.objective_checks import TEACHER_LOSS
from largekd.config.run import RunConfig
from largekd.contracts import Batch, HiddenSignal, TapRequest, Taps, TeacherSignal
from largekd.distillation.model import DistillModel
from largekd.models.adapters import adapt, adapter_sizes, check_family
from largekd.models.decoder import Decoder
from largekd.models.pruning import PrunedStudent, check_targets
from largekd.objectives.alignment import Alignment
from largekd.objectives.layer_maps import LayerPair, pair_layers
from largekd.objectives.options import PLAIN, PassOptions
from largekd.objectives.router import RouterTerms
from largekd.objectives.terms import Objective, Summand, VocabularyTerm
from largekd.objectives.vocabulary import VocabularyPass
from largekd.runtime.ranks import Ranks
from largekd.sharding.shards import register_external
from largekd.teachers.self_shared import SelfSharedTeacher

logger = logging.getLogger(__name__)


class SelfSharedModel(DistillModel):
    """One decoder for two models: L = μ·L_distill + (1 − μ)·L_task of the student + L_task of the teacher.

    Both run in one forward of the decoder, each with its own adapters, the teacher's rows first. The student sees the
    teacher's states as constants, so each set of adapters learns from its own model's losses alone.
    """

    def __init__(
        self,
        *,
        student: Decoder,
        vocabulary: VocabularyPass,
        alignment: Alignment | None = None,
        deep_layers: Sequence[int] = (),
        router: RouterTerms | None = None,
    ) -> None:
        assert not deep_layers and router is None, "the configuration refuses deep supervision and routers here"
        super().__init__(student=student, vocabulary=vocabulary, alignment=alignment)
        self.teacher_vocabulary = VocabularyPass(
            terms=(VocabularyTerm(TEACHER_LOSS, None),), chunk_tokens=vocabulary.chunk_tokens
        )
        for parameter in student.head_parameters:
            register_external(self.teacher_vocabulary, parameter)

    def forward(
        self, *, batch: Batch, signal: TeacherSignal | None, scales: Tensor, options: PassOptions = PLAIN
    ) -> dict[str, Tensor]:
        """As DistillModel; `signal` is None, no layer is left out, and the last of the sums is the teacher's
        cross-entropy.

        Without gradients that loss is left out, and its sum is 0. With `options.term_gradients` also `teacher_squares`.
        """
        assert signal is None, "the signal arises in here"
        assert not options.left_out, "which layers go is what pruning finds"
        assert options.load_LX is None, "the configuration refuses objective.router here"
        layers = sorted({*options.plan.student.hidden, *options.plan.teacher.hidden})
        outputs = self.student(batch=twice(batch), taps=TapRequest(hidden=tuple(layers)), adapters="both")
        rows = len(batch.input_ids_BS)
        teacher = {name: tensor[:rows] for name, tensor in outputs.items()}
        student = {name: tensor[rows:] for name, tensor in outputs.items()}
        results = self.losses(
            student,
            batch=batch,
            signal=self._signal({name: tensor.detach() for name, tensor in teacher.items()}),
            scales=scales[:-1],
            options=options,
        )
        if not torch.is_grad_enabled():
            return results | {"sums": torch.cat([results["sums"], results["sums"].new_zeros(1)])}
        own = self.read_head(
            teacher["last"],
            batch=batch,
            signal=None,
            scales=scales[-1:],
            options=PassOptions(term_gradients=options.term_gradients),
            vocabulary=self.teacher_vocabulary,
        )
        squares = {"teacher_squares": own["squares"]} if options.term_gradients else {}
        return (
            results
            | {"loss": results["loss"] + own["loss"], "sums": torch.cat([results["sums"], own["sums"]])}
            | squares
        )

    def _signal(self, states: Mapping[str, Tensor]) -> HiddenSignal:
        # The head itself, not an alias: it is whole only inside of the vocabulary pass.
        head = self.student.head_spec.with_weights(weight_VD=self.student.head_weight, bias_V=self.student.head_bias)
        hidden = {int(name.partition(".")[2]): tensor for name, tensor in states.items() if name != "last"}
        return HiddenSignal(states["last"], head, taps=Taps(hidden=hidden))


def check_shared(config: RunConfig, *, model_config: PretrainedConfig) -> None:
    """Refuse, before any weight is read, shares that leave no model of the family. Errors: ConfigError."""
    assert isinstance(config.teacher, SelfSharedTeacherConfig)
    pruning = config.teacher.pruning
    check_family(model_config)
    check_targets(model_config, neurons=pruning.neurons, head_groups=pruning.head_groups, layers=pruning.layers)


def share_backbone(
    config: RunConfig, *, student: Decoder, ds_config: Mapping[str, Any], ranks: Ranks
) -> PrunedStudent | None:
    """Freeze the student, give it both models' adapters, and say how much the teacher has for itself.

    None for a teacher of another kind. Errors: ConfigError for a rank or pattern that does not fit.
    """
    if not isinstance(config.teacher, SelfSharedTeacherConfig):
        return None
    adapt(student.model, config=config.teacher.adapters, ds_config=ds_config, seed=config.train.seed)
    sizes = adapter_sizes(student.model)
    if ranks.is_main:
        logger.info(
            "self-shared teacher: %s parameters of its own, %.2f %% of the backbone's %s; the student's adapters: %s",
            f"{sizes.teacher:,}",
            100 * sizes.duplicated_frac,
            f"{sizes.backbone:,}",
            f"{sizes.student:,}",
        )
    return PrunedStudent(student.model)


def serve_shared(
    config: RunConfig,
    *,
    student: PrunedStudent,
    objective: Objective,
    alignment: Alignment | None,
    total_steps: int,
    ranks: Ranks,
) -> SelfSharedTeacher:
    """The teacher, which pairs layers anew when some have gone."""
    assert isinstance(config.teacher, SelfSharedTeacherConfig)

    def repair(kept: tuple[int, ...]) -> None:
        if alignment is not None:
            alignment.pair_anew(closest_pairs(objective, kept=kept, depth=student.depth))

    return SelfSharedTeacher(config.teacher, student=student, total_steps=total_steps, ranks=ranks, repair=repair)


def shared_objective(objective: Objective) -> Objective:
    """The objective with μ = α on the alignment too, and with the teacher's own loss as the last summand."""
    summands = [
        replace(summand, share="distilled_alignment") if summand.share == "alignment" else summand
        for summand in objective.summands
    ]
    return replace(objective, summands=(*summands, Summand(TEACHER_LOSS, "teacher", 1.0, "label_tokens")))


def closest_pairs(objective: Objective, *, kept: tuple[int, ...], depth: int) -> dict[str, tuple[LayerPair, ...]]:
    """For the terms that ask for it, each teacher layer with the closest layer that the student has left."""
    pairs = {}
    for entry in objective.features:
        if isinstance(entry.layers, ClosestLayersConfig):
            key = f"objective.features.{entry.name}"
            found = pair_layers(entry.layers, student_depth=len(kept), teacher_depth=depth, kept=kept, key=key)
            pairs[entry.name] = tuple(LayerPair(kept[pair.student], pair.teacher) for pair in found)
    return pairs


def twice(batch: Batch) -> Batch:
    """The rows once for the teacher and once for the student, for the decoder alone."""
    doubled: dict[str, Any] = {
        name: torch.cat([tensor, tensor])
        for name in ("input_ids_BS", "attention_mask_BS", "position_ids_BS")
        if (tensor := getattr(batch, name)) is not None
    }
    return replace(batch, **doubled)
