"""A model that judges answers: a second job in the first one's folder, and the verdicts that it gives.

Its asks are those of a template that shows question and answer; they are dealt, written, paid for, committed and
resumed as any others, below `judge/`. Whose verdict counts is decided when the answers are curated.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from largekd.config.curation import CurationConfig
from largekd.config.generate import JudgeConfig
from largekd.curation.answer_shards import RAW_FOLDER, Answer, read_answers
from largekd.curation.examination import Examined, Examiner, Span, examine_rows
from largekd.curation.judge import judge_verdict
from largekd.curation.records import Ask, Draw, Item, Parsed, Verdict, Written
from largekd.curation.rules import gate
from largekd.factory.asks import seed_of
from largekd.factory.plan import Stage
from largekd.factory.prompts import load_prompter

JUDGE_FOLDER = "judge"


@dataclass(frozen=True)
class JudgeStage(Stage):
    """A job's only stage whose answers are verdicts."""

    @property
    def folder(self) -> str:
        """Where its shards are, below the job's folder."""
        return JUDGE_FOLDER


def open_keys(
    rows: Iterable[Sequence[Answer]], *, config: JudgeConfig, curation: CurationConfig, examiner: Examiner
) -> list[str]:
    """The keys of the answers that are to be judged; `rows` are the answers of one row each.

    Not those that would be dropped were they right: failed ones and, as `curation` says, cut off and unparsed ones.
    With `config.answers` unknown, neither those about which a rule has a verdict.
    """
    right = Verdict("right", "judge")
    return sorted(
        written.key
        for row in examine_rows(rows, examiner=examiner)
        for (_, written), (parsed, verdict) in row
        if (config.answers == "all" or verdict.outcome == "unknown")
        and gate(written, parsed=parsed, verdict=right, config=curation)[0] is None
    )


def try_template(config: JudgeConfig) -> None:
    """DataError now, and not after all answers, for a template that needs what there will not be; ConfigError for one
    that cannot be used at all."""
    variables = {**config.variables, "question": "?", "answer": None, "text": "?"}
    load_prompter(config.template, key="judge.template").messages(variables, row="to be judged")


def judge_asks(answers: Iterable[Answer], *, keys: Collection[str], config: JudgeConfig) -> list[Ask]:
    """What the judge is asked about the answers with these keys, in an order that does not depend on the answers'.

    An ask's item has the judged answer's key as its id. Errors: ConfigError, DataError for the template.
    """
    prompter = load_prompter(config.template, key="judge.template")
    wanted = set(keys)
    asks = []
    for answer in sorted((one for one in answers if one.written.key in wanted), key=lambda one: one.written.key):
        item, key = answer.ask.item, answer.written.key
        variables = {**config.variables, "question": item.question, "answer": item.answer, "text": answer.written.text}
        messages = prompter.messages(variables, row=item.id)
        for sample in range(config.samples):
            asks.append(
                Ask(
                    item=Item(id=key, question=item.question, answer=item.answer),
                    template=prompter.name,
                    sample=sample,
                    draw=_draw(config),
                    seed=seed_of(config.seed, key, prompter.name, sample),
                    messages=messages,
                )
            )
    return asks


def stored_verdicts(folder: Path, *, config: JudgeConfig) -> dict[str, Verdict]:
    """The verdict on each answer in a job's folder that was ever judged, by its key: that of most of the judge's
    samples, unknown where none has most.

    Verdicts by another template, other draws or another seed do not count. Errors: ConfigError, DataError for the
    template; DataError for damaged shards.
    """
    keys = {ask.item.id for ask, _ in read_answers(folder / JUDGE_FOLDER)}
    wanted = {ask.key for ask in judge_asks(read_answers(folder / RAW_FOLDER), keys=keys, config=config)}
    found: defaultdict[str, list[Verdict]] = defaultdict(list)
    for ask, written in read_answers(folder / JUDGE_FOLDER):
        if ask.key in wanted:
            found[ask.item.id].append(_verdict(written))
    return {key: _most(verdicts) for key, verdicts in found.items()}


class JudgedRows:
    """An examiner whose verdicts a judge completes: where the rule knows none, or, with `answers: all`, everywhere."""

    def __init__(self, examiner: Examiner, *, verdicts: Mapping[str, Verdict], config: JudgeConfig) -> None:
        self._examiner, self._verdicts, self._config = examiner, verdicts, config

    def examine(self, answers: Sequence[Answer]) -> list[Examined]:
        """Each answer's contents and verdict."""
        return [
            Examined(parsed, self._completed(verdict, key=answer.written.key))
            for answer, (parsed, verdict) in zip(answers, self._examiner.examine(answers), strict=True)
        ]

    def spans(self, parsed: Parsed, text: str) -> list[Span]:
        """Where `parsed` stands in its text."""
        return self._examiner.spans(parsed, text)

    def _completed(self, verdict: Verdict, *, key: str) -> Verdict:
        judged = self._verdicts.get(key)
        if judged is None or (self._config.answers == "unknown" and verdict.outcome != "unknown"):
            return verdict
        return judged


def _verdict(written: Written) -> Verdict:
    if written.finish == "failed":
        return Verdict("unknown", "judge", f"the judge did not answer: {written.failure}")
    return judge_verdict(written.text, finish=written.finish)


def _most(verdicts: Sequence[Verdict]) -> Verdict:
    if len(verdicts) == 1:
        return verdicts[0]
    counts = Counter(verdict.outcome for verdict in verdicts)
    detail = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    (outcome, count), *_ = counts.most_common(1)
    return Verdict(outcome if 2 * count > len(verdicts) else "unknown", "judge", f"{detail} of {len(verdicts)} samples")


def _draw(config: JudgeConfig) -> Draw:
    return Draw(
        temperature=config.temperature,
        top_p=1.0,
        top_k=None,
        min_p=0.0,
        max_new_tokens=config.max_new_tokens,
        stop=(),
    )
