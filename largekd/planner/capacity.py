"""How small a student may be: published results of smaller models that learned from larger ones.

Nothing here is a law. Each result is one pair of models, one data set and one budget of tokens; what a run of yours
keeps can differ by more than the results differ from one another. A score kept is the student's score over the
teacher's (or over the score of the model it was cut from); it is no loss and no KL.

What is not here: a prediction of the loss. The distillation scaling law of Busbridge et al. (arXiv 2502.08606) gives
the student's cross-entropy from the teacher's, the student's size and the tokens, but its coefficients are fitted to
one corpus and one family and say nothing of another tokenizer: no reliable figure exists for an arbitrary pair.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Task = Literal["simple", "knowledge", "arithmetic", "competition"]

TASKS: Mapping[Task, str] = {
    "simple": "common sense, reading comprehension, cloze tests",
    "knowledge": "MMLU",
    "arithmetic": "GSM8K, MATH-500",
    "competition": "AIME 2024, GPQA Diamond",
}


@dataclass(frozen=True)
class Evidence:
    """One published pair: `kept` score at `ratio` of the parameters.

    way: how the student was made. cut: some of the larger model's own weights, then training; separate: a model of its
    own that had been pretrained on trillions of tokens, so its ratio says little about what the teacher gave it.
    """

    task: Task
    ratio: float
    kept: float
    way: Literal["cut", "separate"]
    pair: str
    source: str


_SHEARED = "Sheared-LLaMA model cards, arXiv 2310.06694: mean of downstream tasks, 50B tokens, no teacher in training"
_MINITRON = "Minitron in practice, arXiv 2408.11796, table of base models"
_R1 = "DeepSeek-R1 repository, table of distilled models: answers of the teacher, no distributions"

EVIDENCE: Sequence[Evidence] = (
    Evidence("simple", 2.7 / 6.7, 56.7 / 64.6, "cut", "LLaMA2 7B to 2.7B", _SHEARED),
    Evidence("simple", 1.3 / 6.7, 51.0 / 64.6, "cut", "LLaMA2 7B to 1.3B", _SHEARED),
    Evidence("simple", 4.5 / 8.0, 76.1 / 81.8, "cut", "Llama 3.1 8B to 4.5B, width, HellaSwag", _MINITRON),
    Evidence("simple", 4.5 / 8.0, 73.2 / 81.8, "cut", "Llama 3.1 8B to 4.5B, depth, HellaSwag", _MINITRON),
    Evidence("knowledge", 8.4 / 12.2, 69.5 / 69.0, "cut", "Mistral NeMo 12.2B to 8.4B, 380B tokens", _MINITRON),
    Evidence("knowledge", 4.5 / 8.0, 60.5 / 65.3, "cut", "Llama 3.1 8B to 4.5B, width, 94B tokens", _MINITRON),
    Evidence("knowledge", 4.5 / 8.0, 58.7 / 65.3, "cut", "Llama 3.1 8B to 4.5B, depth, 94B tokens", _MINITRON),
    Evidence("arithmetic", 8.4 / 12.2, 58.5 / 56.4, "cut", "Mistral NeMo 12.2B to 8.4B, GSM8K", _MINITRON),
    Evidence("arithmetic", 4.5 / 8.0, 41.2 / 48.6, "cut", "Llama 3.1 8B to 4.5B, width, GSM8K", _MINITRON),
    Evidence("arithmetic", 4.5 / 8.0, 16.8 / 48.6, "cut", "Llama 3.1 8B to 4.5B, depth, GSM8K", _MINITRON),
    Evidence("arithmetic", 32 / 671, 94.3 / 97.3, "separate", "R1 671B to Qwen 32B, MATH-500", _R1),
    Evidence("arithmetic", 7 / 671, 92.8 / 97.3, "separate", "R1 671B to Qwen 7B, MATH-500", _R1),
    Evidence("arithmetic", 1.5 / 671, 83.9 / 97.3, "separate", "R1 671B to Qwen 1.5B, MATH-500", _R1),
    Evidence("competition", 32 / 671, 72.6 / 79.8, "separate", "R1 671B to Qwen 32B, AIME 2024", _R1),
    Evidence("competition", 7 / 671, 55.5 / 79.8, "separate", "R1 671B to Qwen 7B, AIME 2024", _R1),
    Evidence("competition", 1.5 / 671, 28.9 / 79.8, "separate", "R1 671B to Qwen 1.5B, AIME 2024", _R1),
    Evidence("competition", 7 / 671, 49.1 / 71.5, "separate", "R1 671B to Qwen 7B, GPQA Diamond", _R1),
    Evidence("competition", 1.5 / 671, 33.8 / 71.5, "separate", "R1 671B to Qwen 1.5B, GPQA Diamond", _R1),
)

NEAREST_FACTOR = 1.6
"""Evidence within this factor of a ratio is told for it; beyond it there is none."""

SMALL_GAP = 2.5
"""Teacher over student at which distillation gave the best student for its size, in models under 3B and one of 7B
(Zhang et al., arXiv 2311.07052; the factor is from a summary of the paper, not from its tables). A larger teacher gave
a worse student there; with another budget it may not."""

SMALL_REASONER = 3_000_000_000
"""Up to here students do not reliably gain from long chains of thought or from a much larger teacher's answers, and
learn more from short ones (Li et al., arXiv 2502.12143)."""

DEEP_AND_THIN = 1_000_000_000
"""Under this size, deep and thin beat wide and shallow at equal parameters when trained from scratch (MobileLLM,
arXiv 2402.14905)."""


@dataclass(frozen=True)
class Expectation:
    """The range of scores kept that was published near a ratio; None where nothing was."""

    task: Task
    kept: tuple[float, float] | None
    evidence: tuple[Evidence, ...]


def expectations(ratio: float) -> tuple[Expectation, ...]:
    """For each kind of task what students of about this ratio, cut from their teacher, kept of its score."""
    made = []
    for task in TASKS:
        near = tuple(
            entry
            for entry in EVIDENCE
            if entry.task == task and entry.way == "cut" and 1 / NEAREST_FACTOR <= entry.ratio / ratio <= NEAREST_FACTOR
        )
        kept = (min(entry.kept for entry in near), max(entry.kept for entry in near)) if near else None
        made.append(Expectation(task, kept, near))
    return tuple(made)


def recommended_ratio(task: Task, *, kept: float) -> tuple[float, Evidence] | None:
    """The smallest published ratio at which a student cut from its teacher kept this share of the score.

    Only the better of several results at one ratio counts, so this is an optimistic bound. None: no published student
    of that kind kept as much.
    """
    enough = [entry for entry in EVIDENCE if entry.task == task and entry.way == "cut" and entry.kept >= kept]
    best = min(enough, key=lambda entry: entry.ratio, default=None)
    return None if best is None else (best.ratio, best)


def guidance(*, ratio: float, parameters: int, keep: str) -> tuple[str, ...]:
    """What published results say of a student of this size, one line each, with their uncertainty."""
    lines = []
    if ratio >= 1:
        return ("the student is not smaller than its teacher: there is no compression to judge",)
    for made in expectations(ratio):
        name = f"{made.task} ({TASKS[made.task]})"
        if made.kept is None:
            lines.append(f"{name}: no reliable figure near 1/{1 / ratio:.1f} for a student cut from its teacher")
            continue
        low, high = made.kept
        pairs = "; ".join(f"{entry.pair}: {entry.kept:.0%}" for entry in made.evidence)
        kept = f"{low:.0%}" if low == high else f"{low:.0%} to {high:.0%}"
        lines.append(f"{name}: {kept} of the score kept ({pairs})")
    if ratio < 1 / SMALL_GAP:
        lines.append(
            f"a teacher {1 / ratio:.1f} times as large as the student: the best one was about {SMALL_GAP} times in one "
            "study of small models (arXiv 2311.07052); a model between the two as an assistant may help, order of "
            "magnitude only"
        )
    if parameters <= SMALL_REASONER:
        lines.append("up to 3B parameters long chains of thought may not help: prefer short ones (arXiv 2502.12143)")
    if keep == "width" and parameters < DEEP_AND_THIN:
        lines.append(
            "under 1B parameters deep and thin was better than wide and shallow, trained from scratch (arXiv "
            "2402.14905): compare --keep depth"
        )
    if keep == "width":
        lines.append("at 1/2, fewer layers kept less than a smaller width, most of all of GSM8K (arXiv 2408.11796)")
    lines.append("large budgets of tokens (50B to 380B) stand behind these figures: with less, expect less")
    return tuple(lines)
