"""Tokenizers: loading them, and proof that teacher and student mean the same tokens by the same ids."""

from collections.abc import Mapping

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from largekd.errors import DataError, TeacherError

NAMED_DIFFERENCES = 5
# Digits, indentation, accents, other scripts, an emoji: where tokenizers with equal vocabularies split differently.
PROBE = "In 1994, 12345 naïve cafés\n\tdef f(x):\n        return x  # don't\n  Привет, 世界 مرحبا 🙂 e\u0301"


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False, key: str = "teacher.model"
) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder or hub name.

    Args:
        key: configuration key that holds `path`, named in messages.

    Raises:
        DataError: nothing there, no tokenizer files, or a tokenizer class that cannot be built here.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise DataError(
            f"{key} = {path!r}: no tokenizer could be loaded from this folder or hub name "
            f"(a folder needs tokenizer.json and tokenizer_config.json): {error}"
        ) from error
    if not tokenizer.get_vocab():
        raise DataError(f"{key} = {path!r}: its tokenizer has an empty vocabulary; the tokenizer files are missing.")
    return tokenizer


def check_same_tokenizer(
    teacher: PreTrainedTokenizerBase,
    student: PreTrainedTokenizerBase,
    *,
    teacher_vocab_size: int,
    student_vocab_size: int,
) -> int:
    """The number of ids that both models can take, once it is certain that these ids mean the same to both.

    Compared are all ids below the smaller width, special tokens among them, and how a probe text is split. Widths may
    differ (151,936 and 152,064 rows for one tokenizer), and so may the roles of tokens (a base model's and its chat
    variant's end token) and tokens that were added to one side alone.

    Raises:
        TeacherError: an id means different tokens, or equal vocabularies split text differently.
    """
    shared = min(teacher_vocab_size, student_vocab_size)
    if teacher is student:
        return shared
    differences = _differences(teacher, student, shared=shared)
    if differences:
        more = f", and {len(differences) - NAMED_DIFFERENCES} more" if len(differences) > NAMED_DIFFERENCES else ""
        raise TeacherError(
            f"the tokenizers of teacher.model and student.model differ: {len(differences)} ids mean different tokens "
            f"({'; '.join(differences[:NAMED_DIFFERENCES])}{more}). Choose a student.model with the teacher's "
            "tokenizer, or leave student.model empty."
        )
    theirs, own = (side(PROBE, add_special_tokens=False, verbose=False)["input_ids"] for side in (teacher, student))
    if theirs != own:
        place = next((i for i, pair in enumerate(zip(theirs, own, strict=False)) if pair[0] != pair[1]), 0)
        raise TeacherError(
            "the tokenizers of teacher.model and student.model have the same tokens but split text differently: "
            f"after {place} equal tokens the teacher has {teacher.convert_ids_to_tokens(theirs[place : place + 3])} "
            f"and the student {student.convert_ids_to_tokens(own[place : place + 3])}. "
            "Give both models the same tokenizer files."
        )
    return shared


def _differences(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, *, shared: int) -> list[str]:
    theirs, own = _tokens_by_id(teacher), _tokens_by_id(student)
    added = teacher.added_tokens_decoder.keys() | student.added_tokens_decoder.keys()
    return [
        f"id {place} is {_named(theirs, place)} to the teacher and {_named(own, place)} to the student"
        for place in sorted(theirs.keys() | own.keys())
        if place < shared
        and theirs.get(place) != own.get(place)
        # A token that was added to one side stands where the other has an unused row.
        and not (place in added and (place not in theirs or place not in own))
    ]


def _tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {place: token for token, place in tokenizer.get_vocab().items()}


def _named(tokens: Mapping[int, str], place: int) -> str:
    return repr(tokens[place]) if place in tokens else "no token"
