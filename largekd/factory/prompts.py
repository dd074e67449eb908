"""Templates: Jinja files that turn a row into the messages of a conversation.

A template has a block `user`, and may have a block `system`. With blocks `example_user` and `example_assistant`, each
written for one `example` of `examples`, the worked examples become earlier turns of the conversation. Variables are the
row's `question`, `answer` and other columns, `prompts.variables`, `examples` and what a template's stage adds. Anything
that is missing is an error; nothing of a row is ever taken for template code.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import BaseLoader, ChoiceLoader, FileSystemLoader, PackageLoader, StrictUndefined, Template, TemplateError
from jinja2.exceptions import SecurityError, TemplateNotFound, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from largekd.curation.records import Message
from largekd.errors import ConfigError, DataError

SUFFIX = ".jinja"
_PACKAGE_FOLDER = "templates"
_TURN = {"user": "example_user", "assistant": "example_assistant"}
"""The block that writes each side of a worked example."""


def template_names() -> list[str]:
    """The package's templates."""
    folder = files("largekd.factory").joinpath(_PACKAGE_FOLDER)
    return sorted(path.name.removesuffix(SUFFIX) for path in folder.iterdir() if path.name.endswith(SUFFIX))


@dataclass(frozen=True)
class Prompter:
    """One template: `name` is what asks and reports call it, `digest` tells its text from others."""

    name: str
    digest: str
    template: Template

    def messages(self, variables: Mapping[str, Any], *, row: str, system: str | None = None) -> tuple[Message, ...]:
        """The conversation for a row; `system` replaces the template's own system message.

        Errors: DataError that names the template, the row and what is missing.
        """
        if system is None and "system" in self.template.blocks:
            system = self._block("system", variables=variables, row=row)
        found = [{"role": "system", "content": system}] if system else []
        if _TURN["assistant"] in self.template.blocks:
            found += self._turns(variables, row=row)
        question = self._block("user", variables=variables, row=row)
        if not question:
            raise DataError(f"template {self.name!r}, row {row}: the block `user` is empty: nothing is asked.")
        return (*found, {"role": "user", "content": question})

    def _turns(self, variables: Mapping[str, Any], *, row: str) -> list[Message]:
        """The worked examples, each a question and its answer."""
        if not variables.get("examples"):
            raise DataError(
                f"template {self.name!r}, row {row}: there are no worked examples; name their file in prompts.few_shot."
            )
        return [
            {"role": role, "content": self._block(block, variables={**variables, "example": example}, row=row)}
            for example in variables["examples"]
            for role, block in _TURN.items()
        ]

    def _block(self, name: str, *, variables: Mapping[str, Any], row: str) -> str:
        try:
            context = self.template.new_context(dict(variables))
            return "".join(self.template.blocks[name](context)).strip()
        except UndefinedError as error:
            raise DataError(
                f"template {self.name!r}, row {row}: {error.message}. There is {', '.join(sorted(variables))}; name "
                "the column in source, add a value to prompts.variables, or choose another template."
            ) from error
        except (TemplateError, SecurityError, TypeError, ValueError) as error:
            raise DataError(f"template {self.name!r}, row {row}: {error}") from error


def load_prompter(name: str, *, key: str) -> Prompter:
    """A template of the package by its name, or of a .jinja file. Errors: ConfigError; `key` named it."""
    loaders: list[BaseLoader] = [PackageLoader("largekd.factory", _PACKAGE_FOLDER)]
    file = f"{name}{SUFFIX}"
    if name.endswith(SUFFIX):
        path = Path(name).expanduser()
        file = path.name
        loaders.insert(0, FileSystemLoader(path.parent))
    environment = ImmutableSandboxedEnvironment(
        loader=ChoiceLoader(loaders),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # The result is a prompt for a model, not a page: escaping would change it.
        autoescape=False,
    )
    if name.endswith(SUFFIX) and not Path(name).expanduser().is_file():
        raise ConfigError(f"{key}: there is no file {name}.")
    try:
        template = environment.get_template(file)
        assert environment.loader is not None
        source = environment.loader.get_source(environment, file)[0]
    except TemplateNotFound as error:
        known = ", ".join(template_names())
        raise ConfigError(f"{key} = {name!r}: not a .jinja file, and not one of the package's: {known}.") from error
    except (TemplateError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key} = {name!r}: cannot be used as a template ({error}).") from error
    if "user" not in template.blocks:
        raise ConfigError(f"{key} = {name!r}: has no block `user`, which holds what the model is asked.")
    if len(template.blocks.keys() & set(_TURN.values())) == 1:
        raise ConfigError(f"{key} = {name!r}: blocks {' and '.join(_TURN.values())} belong together; one is missing.")
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    return Prompter(file.removesuffix(SUFFIX), digest, template)
