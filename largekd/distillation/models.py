"""Building the two models of a run: found, shaped, sharded and filled."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from largekd.config.run import RunConfig
from largekd.config.teacher import (
    CachedTeacherConfig,
    MixtureTeacherConfig,
    OnlineTeacherConfig,
    RemoteTeacherConfig,
)
from largekd.data.vocabulary import check_same_tokenizer, load_tokenizer, shared_tokens
from largekd.distillation.design import designed_config
from largekd.distillation.initialise import Measures, check_initialise, initialise_student
from largekd.errors import ConfigError
from largekd.initialisation.report import InitialisationReport
from largekd.models.build import build_model, config_with_layers, initialise_randomly, load_layers, load_pretrained
from largekd.models.decoder import Decoder, enable_checkpointing
from largekd.models.lora import add_lora
from largekd.models.source import ModelFolder, find_model, read_config
from largekd.runtime.ranks import Ranks
from largekd.teachers.cache_format import TEACHER_FOLDER, read_manifest

First = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Sources:
    """What is known of both models before any weight is touched.

    With objective.translation `student_of_teacher` is (W,) the student's id of each of the teacher's, −1 where it has
    none, and `shared_vocab_size` the student's own width. Of several teachers `teacher` is the first and `members` are
    all of them; `shared_vocab_size` then counts the ids of all.
    """

    teacher: ModelFolder
    student: ModelFolder | None
    student_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase
    shared_vocab_size: int
    student_of_teacher: Tensor | None = None
    members: tuple[ModelFolder, ...] = ()

    @property
    def tokenizer_folder(self) -> Path:
        """Where the student's tokenizer and generation settings come from."""
        return (self.student or self.teacher).path


def find_sources(config: RunConfig, *, first: First, begins: bool = True) -> Sources:
    """Locate both models and check that they can be distilled into each other.

    begins: the student gets its first weights, and does not come from a stage before.
    Errors: ConfigError for a model that is absent or shorter than train.sequence_length; TeacherError or DataError
    when their token ids do not mean the same tokens.
    """
    student: ModelFolder | None = None
    if config.student.model is not None:
        student = _find(config.student.model, config=config.student, key="student.model", first=first)
    members: tuple[ModelFolder, ...] = ()
    if isinstance(config.teacher, MixtureTeacherConfig):
        members = tuple(
            _find_one(member.teacher, key=member_key(index), first=first)[0]
            for index, member in enumerate(config.teacher.members)
        )
        teacher, teacher_key = members[0], _member_model_key(0)
    else:
        teacher, teacher_key = _find_teacher(config, student=student, first=first)
    tokenizer = load_tokenizer(str(teacher.path), trust_remote_code=teacher.trust_remote_code, key=teacher_key)
    if student is not None:
        student_config = student.config
        if config.student.layers is not None:
            student_config = config_with_layers(student.config, layers=config.student.layers, key="student.layers")
    elif config.student.config is not None:
        student_config = read_config(
            Path(config.student.config), key="student.config", trust_remote_code=config.student.trust_remote_code
        )
    elif config.student.design is not None:
        student_config = designed_config(config.student.design, teacher=teacher.path, teacher_key=teacher_key)
    else:
        assert config.student.teacher_layers is not None
        student_config = config_with_layers(teacher.config, layers=config.student.teacher_layers)
    if config.student.initialise is not None and begins:
        check_initialise(config.student.initialise, teacher=teacher.config, student=student_config)
    teacher_tokenizer = tokenizer
    if student is not None:
        tokenizer = load_tokenizer(str(student.path), trust_remote_code=student.trust_remote_code, key="student.model")
    widths = {
        "teacher_vocab_size": teacher.config.vocab_size,
        "student_vocab_size": student_config.vocab_size,
    }
    student_of_teacher = None
    if config.objective.translation is None:
        shared = check_same_tokenizer(teacher_tokenizer, tokenizer, **widths, key=teacher_key)
        shared = min((shared, *_shared_with_members(members, tokenizer=tokenizer, student_vocab_size=shared)))
    else:
        shared = student_config.vocab_size
        student_of_teacher = torch.from_numpy(shared_tokens(teacher_tokenizer, tokenizer, **widths))
    teachers = [(_member_model_key(index), member.config) for index, member in enumerate(members)]
    student_key = "student.config" if config.student.config is not None else "student.model"
    if config.student.design is not None:
        student_key = "student.design"
    for key, model_config in (*(teachers or [(teacher_key, teacher.config)]), (student_key, student_config)):
        _check_positions(model_config, key=key, sequence_length=config.train.sequence_length)
    return Sources(
        teacher=teacher,
        student=student,
        student_config=student_config,
        tokenizer=tokenizer,
        teacher_tokenizer=teacher_tokenizer,
        shared_vocab_size=shared,
        student_of_teacher=student_of_teacher,
        members=members,
    )


def member_key(index: int) -> str:
    """The place of one of several teachers in the configuration."""
    return f"teacher.members.{index}.teacher"


def _member_model_key(index: int) -> str:
    return f"{member_key(index)}.model"


def _shared_with_members(
    members: Sequence[ModelFolder], *, tokenizer: PreTrainedTokenizerBase, student_vocab_size: int
) -> Iterator[int]:
    """The ids that each of several teachers has in common with the student. Errors: TeacherError names the member."""
    for index, member in enumerate(members):
        key = _member_model_key(index)
        theirs = load_tokenizer(str(member.path), trust_remote_code=member.trust_remote_code, key=key)
        yield check_same_tokenizer(
            theirs,
            tokenizer,
            teacher_vocab_size=member.config.vocab_size,
            student_vocab_size=student_vocab_size,
            key=key,
        )


def build_teacher(
    config: OnlineTeacherConfig,
    *,
    folder: ModelFolder,
    precision: str,
    ds_config: Mapping[str, Any],
    ranks: Ranks,
    key: str,
) -> Decoder:
    """The sharded teacher with its weights; `key` is the place of `config` in the configuration."""
    model = build_model(
        folder.config,
        ds_config=ds_config,
        precision=precision,
        attention=config.attention,
        trust_remote_code=config.trust_remote_code,
        key=key,
    )
    load_pretrained(model, folder=folder.path, rank=ranks.rank)
    return Decoder(model=model)


def build_student(
    config: RunConfig,
    *,
    sources: Sources,
    ds_config: Mapping[str, Any],
    ranks: Ranks,
    measures: Measures,
    report_to: Callable[[InitialisationReport], None],
    resumed: bool = False,
) -> Decoder:
    """The sharded student: pretrained, some layers of a pretrained model, random, or made of the teacher.

    measures: of the teacher, for the rules of initialisation that need them. report_to: takes the report of an
    initialisation, which a resumed run does not repeat: its checkpoint replaces whatever weights are drawn here.
    A collective call.
    """
    model = _student_model(config, sources=sources, ds_config=ds_config)
    if sources.student is not None:
        _load_student(model, config=config, folder=sources.student, ranks=ranks)
    elif config.student.initialise is not None and not resumed:
        report_to(
            initialise_student(
                model,
                config=config.student.initialise,
                teacher=sources.teacher,
                seed=config.train.seed,
                ranks=ranks,
                measures=measures,
            )
        )
    elif config.student.teacher_layers is None or resumed:
        # Of a later stage's teacher the weights may not be here.
        initialise_randomly(model, seed=config.train.seed, rank=ranks.rank)
    else:
        assert config.student.teacher_layers is not None
        load_layers(model, folder=sources.teacher.path, rank=ranks.rank, layers=config.student.teacher_layers)
    if config.student.lora is not None:
        add_lora(model, config=config.student.lora, ds_config=ds_config, seed=config.train.seed)
    if config.train.activation_checkpointing:
        enable_checkpointing(model)
    return Decoder(model=model)


def build_average(config: RunConfig, *, sources: Sources, ds_config: Mapping[str, Any], ranks: Ranks) -> Decoder:
    """A second model like the student, with the weights that the student starts from."""
    assert sources.student is not None
    model = _student_model(config, sources=sources, ds_config=ds_config)
    _load_student(model, config=config, folder=sources.student, ranks=ranks)
    return Decoder(model=model)


def _student_model(config: RunConfig, *, sources: Sources, ds_config: Mapping[str, Any]) -> PreTrainedModel:
    return build_model(
        sources.student_config,
        ds_config=ds_config,
        precision=config.train.precision,
        attention=config.student.attention,
        trust_remote_code=config.student.trust_remote_code,
    )


def _load_student(model: PreTrainedModel, *, config: RunConfig, folder: ModelFolder, ranks: Ranks) -> None:
    """All layers of the student's folder, or those that are chosen."""
    if config.student.layers is not None:
        load_layers(model, folder=folder.path, rank=ranks.rank, layers=config.student.layers)
    else:
        load_pretrained(model, folder=folder.path, rank=ranks.rank)


def _find_teacher(config: RunConfig, *, student: ModelFolder | None, first: First) -> tuple[ModelFolder, str]:
    """Where the teacher's configuration and tokenizer are, with its weights where this job reads them; and the key that
    names this place."""
    teacher, key = config.teacher, "teacher.model"
    match teacher:
        case OnlineTeacherConfig() | CachedTeacherConfig():
            return _find_one(teacher, key="teacher", first=first)
        case RemoteTeacherConfig():
            # Only a student that is made of the teacher reads its weights.
            weights = config.student.teacher_layers is not None or config.student.initialise is not None
            return _find(teacher.model, config=teacher, key=key, first=first, weights=weights), key
    assert student is not None
    return student, "student.model"


def _find_one(teacher: OnlineTeacherConfig | CachedTeacherConfig, *, key: str, first: First) -> tuple[ModelFolder, str]:
    """The model of a teacher that stands at `key` in the configuration, and the key that names its place."""
    if teacher.model is not None:
        return _find(teacher.model, config=teacher, key=f"{key}.model", first=first), f"{key}.model"
    assert isinstance(teacher, CachedTeacherConfig)
    folder, key = Path(teacher.path).expanduser(), f"{key}.path"
    read_manifest(folder, key=key)
    return _find(str(folder / TEACHER_FOLDER), config=teacher, key=key, first=first), key


def _find(name: str, *, config: Any, key: str, first: First, weights: bool = True) -> ModelFolder:
    return find_model(
        name,
        key=key,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        first=first,
        weights=weights,
    )


def _check_positions(model_config: PretrainedConfig, *, key: str, sequence_length: int) -> None:
    limit = getattr(model_config, "max_position_embeddings", None)
    if limit is not None and sequence_length > limit:
        raise ConfigError(
            f"train.sequence_length = {sequence_length}: the model of {key} has {limit} positions "
            f"(max_position_embeddings); lower it or choose another {key}."
        )
