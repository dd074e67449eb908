"""The stages of a job: what is asked first, and what is asked once that is answered.

A stage is a list of asks that do not depend on each other. Its answers decide the next stage's asks, so every rank,
and every later start, comes to the same stages from what is on disk. The last stage's answers are the job's.
"""

import logging
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace

from largekd.config.generate import GenerateConfig, RowSourceConfig, SeedSourceConfig, TopicSourceConfig
from largekd.curation.answer_shards import RAW_FOLDER, Answer
from largekd.curation.records import Ask, Item, Message, Written
from largekd.errors import GenerationError
from largekd.factory.asks import Asker, draw_some, read_lines
from largekd.factory.distinct import Distinct
from largekd.factory.prompts import load_prompter
from largekd.factory.sources import content_id, read_items

logger = logging.getLogger(__name__)

TURNS_FOLDER = "turns"
# What models put around a text that they were asked for.
_LEAD = re.compile(r"^\s*(?:(?:new )?(?:task|instruction|question)\s*:|\d+[.)])\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Stage:
    """`given`: answers that need no model: those of conversations that an earlier stage could not go on with.
    `retries`: what failed may be asked again; not where later stages have made up for it."""

    name: str
    asks: list[Ask]
    is_last: bool = False
    given: tuple[Answer, ...] = ()
    retries: bool = True

    @property
    def folder(self) -> str:
        """Where its shards are, below the job's folder."""
        return RAW_FOLDER if self.is_last else f"{TURNS_FOLDER}/{self.name}"


Plan = Generator[Stage, Mapping[str, Written], None]
"""Gives stages; is sent each one's answers by key, but for the last one's."""


def plan(config: GenerateConfig, *, asker: Asker) -> Plan:
    """The job's stages. Errors: DataError and ConfigError for sources and templates, before the first stage."""
    # Looked at first: a template that cannot be used must not be found after days.
    asker.digests()
    match config.source:
        case RowSourceConfig() as rows:
            items = read_items(rows)
            asker.try_out(items[0])
        case TopicSourceConfig() as topics:
            asker.try_out(Item("of a topic", "?", fields={"topic": "?", "task": "?", "persona": "?"}))
            items = yield from _of_topics(topics, asker=asker)
        case SeedSourceConfig() as seeds:
            asker.try_out(Item("of seeds", "?"))
            items = yield from _of_seeds(seeds, asker=asker)
    yield from _conversations(items, asker=asker)


def _of_topics(source: TopicSourceConfig, *, asker: Asker) -> Generator[Stage, Mapping[str, Written], list[Item]]:
    prompter = load_prompter(source.template, key="source.template")
    asks = []
    for topic in source.topics:
        for task in source.tasks:
            for persona in source.personas or (None,):
                fields = {"topic": topic, "task": task, "persona": persona or ""}
                item = Item(content_id(topic, task, persona or ""), "", fields=fields)
                messages = prompter.messages({**asker.prompts.variables, **fields}, row=item.id)
                for number in range(source.per_combination):
                    own = replace(item, id=f"{item.id}-{number}")
                    asks.append(asker.ask(own, template=prompter.name, sample=number, messages=messages))
    answers = yield Stage("instructions", asks)
    items = _instructions(asks, answers, known=Distinct(max_similarity=source.max_similarity))
    return _some(items, asked=len(asks))


def _of_seeds(source: SeedSourceConfig, *, asker: Asker) -> Generator[Stage, Mapping[str, Written], list[Item]]:
    prompter = load_prompter(source.template, key="source.template")
    pool = [line["instruction"] for line in read_lines(source.path, columns=("instruction",), key="source.path")]
    known = Distinct(max_similarity=source.max_similarity)
    for seed in pool:
        known.accept(seed)
    items: list[Item] = []
    asked = 0
    for number in range(source.rounds):
        asks = []
        for place in range(source.rows - len(items)):
            item = Item(f"round{number}-{place}", "")
            shown = draw_some(pool, count=source.examples, parts=(asker.sampling.seed, item.id))
            messages = prompter.messages({**asker.prompts.variables, "examples": shown}, row=item.id)
            asks.append(asker.ask(item, template=prompter.name, sample=0, messages=messages))
        if not asks:
            break
        asked += len(asks)
        answers = yield Stage(f"round_{number}", asks, retries=False)
        new = _instructions(asks, answers, known=known)
        items += new
        pool += [item.question for item in new]
    return _some(items, asked=asked)


def _instructions(asks: Sequence[Ask], answers: Mapping[str, Written], *, known: Distinct) -> list[Item]:
    """Rows out of instructions that a model wrote whole and that are new."""
    found, cut, doubles = [], 0, 0
    for ask in asks:
        written = answers[ask.key]
        text = _LEAD.sub("", written.text.strip()).strip().strip('"“”').strip()
        if written.finish != "stop" or not text:
            cut += 1
        elif not known.accept(text):
            doubles += 1
        else:
            found.append(replace(ask.item, question=text))
    logger.info("instructions: %d new, %d too much like others, %d not whole", len(found), doubles, cut)
    return found


def _some(items: list[Item], *, asked: int) -> list[Item]:
    if not items:
        raise GenerationError(
            f"none of {asked} instructions that the model wrote is whole and new; look at them below {TURNS_FOLDER}/, "
            "raise sampling.max_new_tokens or source.max_similarity, or choose another model."
        )
    return items


@dataclass
class _Talk:
    """A conversation and the ask that waits for its next answer."""

    ask: Ask
    template: str


def _conversations(items: Sequence[Item], *, asker: Asker) -> Plan:
    """The rows' own turns: answers, users' further messages, a revision."""
    prompts = asker.prompts
    talks = [_Talk(ask, ask.template) for ask in asker.asks(items)]
    lost: list[Answer] = []
    for turn in range(prompts.turns):
        is_last = turn == prompts.turns - 1 and not prompts.revise
        stage = Stage("" if is_last else f"answer_{turn}", [talk.ask for talk in talks], is_last, tuple(lost))
        if is_last:
            yield stage
            return
        answers = yield stage
        talks = _answered(talks, answers, lost=lost, revised=turn == prompts.turns - 1)
        if turn < prompts.turns - 1:
            talks = yield from _users(talks, asker=asker, turn=turn, lost=lost)
    yield _revision(talks, asker=asker, lost=lost)


def _answered(
    talks: Sequence[_Talk], answers: Mapping[str, Written], *, lost: list[Answer], revised: bool
) -> list[_Talk]:
    """Conversations with the answer in place; those without one, or with one that is cut off and will not be revised,
    go no further."""
    found = []
    for talk in talks:
        written = answers[talk.ask.key]
        if written.finish == "failed" or (written.finish == "length" and not revised):
            lost.append(Answer(talk.ask, written))
        else:
            talk.ask = replace(talk.ask, messages=(*talk.ask.messages, _says("assistant", written.text)))
            found.append(talk)
    return found


def _users(
    talks: Sequence[_Talk], *, asker: Asker, turn: int, lost: list[Answer]
) -> Generator[Stage, Mapping[str, Written], list[_Talk]]:
    """What the user says next, played by the model."""
    prompter = load_prompter(asker.prompts.user_template, key="prompts.user_template")
    asks = []
    for talk in talks:
        said = [message for message in talk.ask.messages if message["role"] != "system"]
        item = talk.ask.item
        messages = prompter.messages({**asker.variables(item), "conversation": said}, row=item.id)
        stage = f"user_{turn} {talk.template}"
        asks.append(asker.ask(item, template=prompter.name, sample=talk.ask.sample, messages=messages, stage=stage))
    answers = yield Stage(f"user_{turn}", asks)
    found = []
    for talk, ask in zip(talks, asks, strict=True):
        written = answers[ask.key]
        if written.finish == "failed" or not written.text.strip():
            reason = written.failure or "the model that plays the user said nothing"
            key = talk.ask.key
            lost.append(Answer(talk.ask, replace(written, key=key, text="", finish="failed", failure=reason)))
            continue
        talk.ask = asker.ask(
            talk.ask.item,
            template=talk.template,
            sample=talk.ask.sample,
            messages=(*talk.ask.messages, _says("user", written.text.strip())),
            stage=f"answer_{turn + 1}",
        )
        found.append(talk)
    return found


def _revision(talks: Sequence[_Talk], *, asker: Asker, lost: Sequence[Answer]) -> Stage:
    prompter = load_prompter(asker.prompts.revise_template, key="prompts.revise_template")
    asks = []
    for talk in talks:
        item = talk.ask.item
        more = prompter.messages(asker.variables(item), row=item.id)
        said = [*talk.ask.messages, *(message for message in more if message["role"] == "user")]
        template = f"{talk.template}+{prompter.name}"
        asks.append(asker.ask(item, template=template, sample=talk.ask.sample, messages=said, stage="revise"))
    return Stage("", asks, is_last=True, given=tuple(lost))


def _says(role: str, text: str) -> Message:
    return {"role": role, "content": text}
