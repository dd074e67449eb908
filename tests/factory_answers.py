"""Answers of a made-up model, and an examiner that needs no parser: "reasoning #### answer"."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from largekd.curation.answer_shards import RAW_FOLDER, Answer, write_shard
from largekd.curation.examination import Examined, Span
from largekd.curation.records import Ask, Curated, Draw, Item, Parsed, Verdict, Written

DRAW = Draw(temperature=0.7, top_p=1.0, top_k=None, min_p=0.0, max_new_tokens=64, stop=())
MARK = "####"


def answer(
    text: str,
    *,
    row: str = "row",
    question: str = "How many?",
    right: str | None = "42",
    sample: int = 0,
    template: str = "step_by_step",
    **written: Any,
) -> Answer:
    """What a model wrote for a row."""
    messages = ({"role": "system", "content": "Be exact."}, {"role": "user", "content": f"Think. {question}"})
    ask = Ask(Item(row, question, answer=right), template, sample, DRAW, 0, messages)
    settings = {"finish": "stop", "prompt_tokens": 5, "written_tokens": len(text.split()), "mean_logp": -0.5, **written}
    return Answer(ask, Written(key=ask.key, text=text, **settings))


def curated(text: str, *, outcome: str = "right", dropped_by: str | None = None, **settings: Any) -> Curated:
    """An answer as filters get it."""
    ask, written = answer(text, **settings)
    return Curated(ask, written, Parsed(answer="42"), Verdict(outcome, "exact"), dropped_by=dropped_by)


def write_job(folder: Path, *, shards: Sequence[Sequence[Answer]]) -> Path:
    """A job's folder with raw answers."""
    (folder / RAW_FOLDER).mkdir(parents=True)
    for number, answers in enumerate(shards):
        write_shard(folder / RAW_FOLDER, number=number, answers=answers)
    return folder


class MarkExaminer:
    """What follows the mark is the answer; it is right when it is the row's."""

    def examine(self, answers: Sequence[Answer]) -> list[Examined]:
        """Each alone."""
        return [self._one(one) for one in answers]

    def spans(self, parsed: Parsed, text: str) -> list[Span]:
        """Of reasoning and answer."""
        if parsed.answer is None:
            return []
        start = text.rindex(parsed.answer)
        return [
            Span(name="reasoning", start=0, end=text.index(MARK)),
            Span(name="answer", start=start, end=start + len(parsed.answer)),
        ]

    def _one(self, one: Answer) -> Examined:
        reasoning, mark, found = one.written.text.partition(MARK)
        parsed = Parsed(reasoning=reasoning.strip(), answer=found.strip()) if mark else Parsed(problem="no mark")
        unknown = one.ask.item.answer is None or parsed.answer is None
        outcome = "unknown" if unknown else "right" if parsed.answer == one.ask.item.answer else "wrong"
        return Examined(parsed, Verdict(outcome, "exact", detail=f"{parsed.answer!r} against {one.ask.item.answer!r}"))


def with_text(one: Answer, text: str) -> Answer:
    """The same ask, another text."""
    return Answer(one.ask, replace(one.written, text=text))
