"""What a job would do, told before anything is loaded or paid for."""

from collections.abc import Callable
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from largekd.config.generate import EmbeddedBackendConfig, EndpointBackendConfig, GenerateConfig
from largekd.config.render import render_config
from largekd.curation.records import Ask
from largekd.data.vocabulary import load_tokenizer
from largekd.factory.asks import Asker
from largekd.factory.chat import chat_text
from largekd.factory.endpoint import check_sampling
from largekd.factory.judge import try_template
from largekd.factory.plan import Stage, plan

_SHOWN = 2
_CHARACTERS_PER_TOKEN = 4
_PER = 1_000_000


def preview(config: GenerateConfig) -> str:
    """The resolved configuration, the first prompts as the model will see them, and estimates of tokens and cost.

    Only the first stage's asks are known beforehand: what is asked later depends on answers.
    Errors: LargeKDError for sources and templates that cannot be used.
    """
    if isinstance(config.backend, EndpointBackendConfig):
        check_sampling(config.backend, sampling=config.sampling)
    if config.judge is not None:
        try_template(config.judge)
    stage = next(plan(config, asker=Asker(config.prompts, config.sampling)))
    parts = [render_config(config)]
    shown = {ask.template: ask for ask in reversed(stage.asks)}
    render = _renderer(config)
    for ask in [*shown.values()][: max(_SHOWN, len(config.prompts.templates))]:
        parts.append(f"--- row {ask.item.id}, template {ask.template}, sample {ask.sample}\n{render(ask)}\n---\n")
    return "\n".join([*parts, *_estimates(config, stage=stage)])


def _estimates(config: GenerateConfig, *, stage: Stage) -> list[str]:
    characters = sum(len(message["content"]) for ask in stage.asks for message in ask.messages)
    read, written = characters // _CHARACTERS_PER_TOKEN, sum(ask.draw.max_new_tokens for ask in stage.asks)
    rows = len({ask.item.id for ask in stage.asks})
    later = "" if stage.is_last else f" in the first stage ({stage.name}); later ones depend on its answers"
    lines = [
        f"asks: {len(stage.asks)} of {rows} rows{later}",
        f"tokens: about {read} of prompts ({_CHARACTERS_PER_TOKEN} characters each), at most {written} written",
    ]
    if isinstance(config.backend, EndpointBackendConfig):
        cost = (read * config.backend.input_price + written * config.backend.output_price) / _PER
        limit = "" if config.backend.max_cost is None else f"; stops before {config.backend.max_cost:g}"
        lines.append(f"cost: at most about {cost:.4f}{limit}")
    if config.judge is not None and stage.is_last:
        judged = "without a verdict of a rule" if config.judge.answers == "unknown" else "of all"
        lines.append(f"judge: at most {len(stage.asks) * config.judge.samples} further asks, for answers {judged}")
    return lines


def _chat_text(ask: Ask, *, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return chat_text(ask, tokenizer=tokenizer)
    except TemplateError as error:
        return f"the model's chat template refuses this conversation: {error}"


def _renderer(config: GenerateConfig) -> Callable[[Ask], str]:
    backend = config.backend
    if isinstance(backend, EmbeddedBackendConfig):
        tokenizer = load_tokenizer(
            str(Path(backend.model).expanduser()),
            revision=backend.revision,
            trust_remote_code=backend.trust_remote_code,
            key="backend.model",
        )
        return lambda ask: _chat_text(ask, tokenizer=tokenizer)
    # The server applies the chat template.
    return lambda ask: "\n".join(f"[{message['role']}]\n{message['content']}" for message in ask.messages)
