"""What becomes of the answers: parsing, verification, filters, the training data they make."""

from typing import Annotated, Literal

from pydantic import Field

from largekd.config.common import Frozen
from largekd.config.sandbox import SandboxConfig


class VerifyConfig(Frozen):
    """How an answer is compared with the right one."""

    kind: Literal["none", "exact", "numeric", "symbolic", "choice", "tests", "majority"] = Field(
        "none",
        description="symbolic: numbers too. majority: what most samples of the row agree on counts as right.",
    )
    tolerance: float = Field(
        1e-6,
        ge=0,
        description="Relative difference of numbers that still agree; whole numbers must be equal up to 1e-6.",
    )
    agree_share: float = Field(0.5, gt=0, le=1, description="Least share of samples behind a majority.")
    programs: Literal["ignore", "run", "must_agree"] = Field(
        "ignore", description="run: a program's output is its answer. must_agree: and must equal the reasoning's."
    )
    formula_cpu_s: float = Field(
        3.0, ge=0.1, description="CPU seconds for comparing two formulas; what takes longer is unknown."
    )
    sandbox: SandboxConfig = Field(default_factory=SandboxConfig)


class LengthFilterConfig(Frozen):
    """Words of an answer."""

    kind: Literal["length"]
    min_words: int = Field(1, ge=0, description="Fewest words.")
    max_words: int | None = Field(None, ge=1, description="Most words; null: no limit.")


class RepetitionFilterConfig(Frozen):
    """Share of repeated n-grams and lines, and of unique words."""

    kind: Literal["repetition"]
    ngram: int = Field(4, ge=1, description="Words of an n-gram.")
    max_ngram_share: float = Field(0.3, ge=0, le=1, description="Largest share of n-grams that occur before.")
    max_line_share: float = Field(0.3, ge=0, le=1, description="Largest share of lines that occur before.")
    min_unique_words: float = Field(0.1, ge=0, le=1, description="Smallest share of distinct words.")


class LanguageFilterConfig(Frozen):
    """Language of an answer's prose; code and formulas are left out (needs the extra `factory`)."""

    kind: Literal["language"]
    languages: tuple[str, ...] = Field(("en",), min_length=1, description="ISO 639-1 codes that are kept.")
    min_probability: float = Field(0.5, ge=0, le=1, description="Least probability of these languages together.")
    min_words: int = Field(8, ge=1, description="Answers with fewer words of prose are kept without being judged.")


class DuplicateFilterConfig(Frozen):
    """Exact and near duplicates; the first one stays (near ones need the extra `factory`)."""

    kind: Literal["duplicates"]
    field: Literal["answer", "question", "both"] = Field(
        "both", description="What is compared. question: with those of other rows, and a row goes with all its answers."
    )
    threshold: float = Field(0.8, gt=0, le=1, description="Jaccard similarity of word n-grams; 1: exact ones alone.")
    ngram: int = Field(5, ge=1, description="Words of an n-gram.")
    permutations: int = Field(128, ge=16, description="Hashes of a MinHash signature.")


class ContaminationFilterConfig(Frozen):
    """Overlap with evaluation sets."""

    kind: Literal["contamination"]
    sets: tuple[str, ...] = Field(min_length=1, description="JSONL or text files that the data must not contain.")
    columns: tuple[str, ...] = Field((), description="Columns of JSON rows that count; none: every text in them.")
    ngram: int = Field(13, ge=2, description="Words of an n-gram; texts down to half as long count as a whole.")
    max_share: float = Field(0.0, ge=0, le=1, description="Largest share of a row's n-grams that occur in the sets.")


class ConfidenceFilterConfig(Frozen):
    """The writer's own certainty; answers of a backend that does not tell it are dropped."""

    kind: Literal["confidence"]
    min_mean_logp: float = Field(-2.0, le=0, description="Least mean log-probability of the written tokens.")


class DifficultyFilterConfig(Frozen):
    """Share of a row's samples that are right."""

    kind: Literal["difficulty"]
    min_pass_rate: float = Field(0.0, ge=0, le=1, description="Drop rows that are harder than this.")
    max_pass_rate: float = Field(1.0, ge=0, le=1, description="Drop rows that are easier than this.")
    per_row: int | None = Field(None, ge=1, description="Answers that are kept of a row; null: all.")
    buckets: int = Field(5, ge=1, description="Equal intervals of the pass rate, for per_bucket.")
    per_bucket: int | None = Field(None, ge=1, description="Rows that are kept of each interval; null: all.")


class HookFilterConfig(Frozen):
    """A user's own filter, such as one for toxicity or personal data."""

    kind: Literal["hook"]
    module: str = Field(description="Python module (dotted name or .py file) with `score(row) -> dict[str, float]`.")
    name: str = Field(description="Name of the score that decides.")
    min_score: float | None = Field(None, description="Least score; null: no limit.")
    max_score: float | None = Field(None, description="Largest score; null: no limit.")


FilterConfig = Annotated[
    LengthFilterConfig
    | RepetitionFilterConfig
    | LanguageFilterConfig
    | DuplicateFilterConfig
    | ContaminationFilterConfig
    | ConfidenceFilterConfig
    | DifficultyFilterConfig
    | HookFilterConfig,
    Field(discriminator="kind"),
]


class DatasetConfig(Frozen):
    """The training data that are made of what is kept."""

    reasoning: Literal["with", "without", "both"] = Field(
        "with", description="Whether targets hold the reasoning. both: each answer becomes two records."
    )
    answer_text: str = Field("{answer}", description="A target without reasoning; {answer} stands for the answer.")
    answer_hint: str = Field("", description="Appended to the last question of records without reasoning.")
    prompt: Literal["asked", "question"] = Field(
        "asked",
        description="asked: the conversation that the model was shown. question: the row's question alone, without "
        "the template's words, examples and earlier turns.",
    )
    learn: Literal["last", "all"] = Field(
        "last",
        description="Answers of a conversation that are learnt; the last one is what is verified. last: earlier ones, "
        "such as drafts before a revision, get `weight: 0`.",
    )
    held_out: int = Field(0, ge=0, description="Rows (with all their answers) that are set aside for evaluation.")
    parquet: bool = Field(False, description="Also write parquet, readable as a Hugging Face data set.")
    seed: int = Field(0, ge=0, description="Seed of the order and of what is set aside.")


class CurationConfig(Frozen):
    """Cheap, and repeatable with other settings on answers that were paid for once."""

    answer_format: Literal["auto", "boxed", "hashes", "answer_line", "last_number", "choice", "none"] = Field(
        "auto", description="Where the final answer stands; auto tries several marks in turn, but not last_number."
    )
    verify: VerifyConfig = Field(default_factory=VerifyConfig)
    keep_unknown: bool = Field(False, description="Keep answers that could not be verified (verify.kind not none).")
    keep_unparsed: bool = Field(False, description="Keep answers that could not be parsed, or were cut off.")
    filters: tuple[FilterConfig, ...] = Field((), description="Applied in order; all scores of a row are kept.")
    dataset: DatasetConfig = Field(default_factory=DatasetConfig)
