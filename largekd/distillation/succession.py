"""What the models of a later stage must have in common with those of the first one."""

from largekd.config.staging import Stage
from largekd.data.vocabulary import check_same_tokenizer
from largekd.distillation.models import Sources
from largekd.errors import ConfigError, TeacherError

# Says where a shape came from, not what it is.
_ORIGIN = ("_name_or_path", "transformers_version")


def check_succession(sources: Sources, *, first: Sources, stage: Stage) -> None:
    """A student without a tokenizer of its own reads with its teacher's, and may be shaped like its teacher.

    Errors: TeacherError where `stage` reads with other token ids than the first stage; ConfigError where it would have
    a student of another shape.
    """
    place = f"stages.{stage.index} ({stage.name!r})"
    width = first.student_config.vocab_size
    try:
        check_same_tokenizer(
            sources.tokenizer,
            first.tokenizer,
            teacher_vocab_size=min(width, sources.shared_vocab_size),
            student_vocab_size=min(width, first.shared_vocab_size),
            key="its teacher",
        )
    except TeacherError as error:
        raise TeacherError(
            f"{place}: its teacher has another tokenizer than the teacher of the first stage, with which the student "
            "learns to read. Give all stages teachers of one tokenizer, or set student.model (and "
            f"objective.translation in this stage). {error}"
        ) from error
    mine, theirs = ({k: v for k, v in side.student_config.to_dict().items() if k not in _ORIGIN}
                    for side in (sources, first))  # fmt: skip
    unlike = sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key))
    if unlike:
        raise ConfigError(
            f"{place}: with its teacher the student would have another shape than in the first stage ({unlike[0]}: "
            f"{theirs.get(unlike[0])!r} -> {mine.get(unlike[0])!r}); set student.model or student.config, which name "
            "no teacher."
        )
