"""From rows to asks: the list of wanted answers, the same on every rank and in every start."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from largekd.config.generate import PromptConfig, SamplingConfig
from largekd.curation.records import Ask, Draw, Item, Message
from largekd.errors import ConfigError, DataError
from largekd.factory.prompts import Prompter, load_prompter
from largekd.factory.sources import json_objects, plain_record


@dataclass(frozen=True)
class Asker:
    """Renders rows by the configured templates and deals draws and seeds."""

    prompts: PromptConfig
    sampling: SamplingConfig

    @cached_property
    def prompters(self) -> list[Prompter]:
        """The templates of `prompts.templates`. Errors: ConfigError, also for two of one name: data know them by it."""
        names = self.prompts.templates
        found = [load_prompter(name, key=f"prompts.templates.{place}") for place, name in enumerate(names)]
        for place, prompter in enumerate(found):
            if prompter.name in [earlier.name for earlier in found[:place]]:
                raise ConfigError(
                    f"prompts.templates.{place} = {names[place]!r}: an earlier one is called {prompter.name!r} too; "
                    "rename the file, or leave one out."
                )
        return found

    @cached_property
    def examples(self) -> list[dict[str, Any]]:
        """The worked examples of `prompts.few_shot`. Errors: DataError."""
        if self.prompts.few_shot is None:
            return []
        return read_lines(self.prompts.few_shot, columns=("question", "answer"), key="prompts.few_shot")

    def asks(self, items: Sequence[Item]) -> list[Ask]:
        """Every row with every template, `sampling.samples` times. Errors: DataError for a missing variable."""
        found = []
        for item in items:
            variables = self.variables(item)
            for prompter in self.prompters:
                messages = prompter.messages(variables, row=item.id, system=self.prompts.system)
                found += [
                    self.ask(item, template=prompter.name, sample=sample, messages=messages)
                    for sample in range(self.sampling.samples)
                ]
        return found

    def ask(self, item: Item, *, template: str, sample: int, messages: Sequence[Message], stage: str = "") -> Ask:
        """One ask; its seed depends on `sampling.seed`, the row, the template, the sample and the stage."""
        return Ask(
            item=item,
            template=template,
            sample=sample,
            draw=self.draw(sample),
            seed=seed_of(self.sampling.seed, item.id, template, sample, stage),
            messages=tuple(messages),
        )

    def draw(self, sample: int) -> Draw:
        """How the sample of this number is drawn."""
        sampling = self.sampling
        cycle = sampling.temperatures or (sampling.temperature,)
        return Draw(
            temperature=cycle[sample % len(cycle)],
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_new_tokens=sampling.max_new_tokens,
            stop=sampling.stop,
        )

    def variables(self, item: Item) -> dict[str, Any]:
        """What templates may use. A row's columns win over `prompts.variables`."""
        known: dict[str, Any] = {**self.prompts.variables, **item.fields, "question": item.question}
        known |= {name: value for name, value in (("answer", item.answer), ("tests", item.tests)) if value is not None}
        if self.prompts.few_shot is not None:
            # An example must not give the row's own answer away.
            own = " ".join(item.question.split())
            others = [example for example in self.examples if " ".join(example["question"].split()) != own]
            known["examples"] = draw_some(others, count=self.prompts.few_shot_count, parts=("few-shot", item.id))
        return known

    def digests(self) -> dict[str, str]:
        """What tells the templates' texts from others."""
        found = dict(zip(self.prompts.templates, self.prompters, strict=True))
        return {name: prompter.digest for name, prompter in (found | self._later).items()}

    def try_out(self, item: Item) -> None:
        """DataError now, and not after days, for a template that needs what rows like this one do not have."""
        variables = {**self.variables(item), "conversation": [{"role": "user", "content": item.question}]}
        for prompter in (*self.prompters, *self._later.values()):
            prompter.messages(variables, row=item.id)

    @cached_property
    def _later(self) -> dict[str, Prompter]:
        """Those of further turns."""
        prompts = self.prompts
        names = {"revise_template": prompts.revise_template} if prompts.revise else {}
        names |= {"user_template": prompts.user_template} if prompts.turns > 1 else {}
        return {name: load_prompter(name, key=f"prompts.{key}") for key, name in names.items()}


def seed_of(*parts: int | str) -> int:
    """A seed in [0, 2³¹) out of numbers and names; servers take no more than 32 bits."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4], "big") >> 1


def draw_some(values: Sequence[Any], *, count: int, parts: tuple[int | str, ...]) -> list[Any]:
    """`count` of the values in drawn order, fewer where there are fewer."""
    order = np.random.default_rng(seed_of(*parts)).permutation(len(values))[:count]
    return [values[place] for place in order]


def read_lines(name: str, *, columns: Sequence[str], key: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file, each with text in these columns. Errors: DataError; `key` named the file."""
    try:
        found = list(json_objects([Path(name).expanduser()], key=key))
    except OSError as error:
        raise DataError(f"{key} = {name!r}: cannot be read ({error}).") from error
    for number, record in enumerate(found, start=1):
        for column in columns:
            if not isinstance(record.get(column), str):
                raise DataError(f"{name}, object {number} ({key}): no text in {column!r}.")
    if not found:
        raise DataError(f"{key} = {name!r}: the file has no line.")
    return [plain_record(record) for record in found]
