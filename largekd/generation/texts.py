"""Rollouts as a reader sees them."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from largekd.generation.buffer import Rollout


def sample_texts(rollouts: Sequence[Rollout], *, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """`rollout/sample_<n>` -> Markdown with the prompt, the answer and, if it was scored, its mean reward."""
    return {f"rollout/sample_{place}": _text(rollout, tokenizer) for place, rollout in enumerate(rollouts)}


def _text(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, /) -> str:
    prompt, answer = (
        _indented(str(tokenizer.decode(list(ids)))) for ids in (rollout.ids[: rollout.prompt], rollout.answer)
    )
    score = ""
    if rollout.rewards:
        score = f"\n\n**reward per token** {sum(rollout.rewards) / len(rollout.rewards):.3f}"
    return f"**prompt**\n\n{prompt}\n\n**answer**\n\n{answer}{score}"


def _indented(text: str) -> str:
    """As a block of code, so that nothing in the text is taken for Markdown."""
    return "\n".join(f"    {line}" for line in text.splitlines())
