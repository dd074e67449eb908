"""What ranks do in the tests of jobs that a server writes for."""

from typing import Any

from largekd.config.generate import GenerateConfig


def generated(*, tree: dict[str, Any]) -> dict[str, Any] | str | None:
    """A whole job without curation; its summary, or what the user is told instead."""
    from largekd.errors import LargeKDError
    from largekd.factory.run import generate

    try:
        return generate(GenerateConfig.model_validate(tree), curate=False)
    except LargeKDError as error:
        return f"{type(error).__name__}: {error}"
