"""What ranks do in the tests of jobs that a server writes for."""

from pathlib import Path
from typing import Any

from largekd.config.generate import GenerateConfig
from largekd.config.load import parse_record


def generated(*, tree: dict[str, Any]) -> dict[str, Any] | str | None:
    """A whole job without curation; its summary, or what the user is told instead."""
    from largekd.errors import LargeKDError
    from largekd.factory.run import generate

    try:
        return generate(parse_record(GenerateConfig, mapping=tree), curate=False)
    except LargeKDError as error:
        return f"{type(error).__name__}: {error}"


def answered_and_judged(*, tree: dict[str, Any]) -> dict[str, str] | str | None:
    """A job and its judge; the outcomes by the answers' keys, or what the user is told instead."""
    from factory.test_judge import ByText

    from largekd.curation.ordering import OrderedAnswers
    from largekd.errors import LargeKDError
    from largekd.factory.judge import open_keys, stored_verdicts
    from largekd.factory.judging import judge_answers
    from largekd.factory.run import build_backend
    from largekd.runtime.ranks import current_ranks
    from largekd.runtime.shutdown import StopSignal

    generated(tree=tree)
    config = parse_record(GenerateConfig, mapping=tree)
    folder, ranks, judge = Path(config.output.dir), current_ranks(), config.judge
    assert judge is not None
    try:
        whole = judge_answers(
            config,
            folder=folder,
            find_open=lambda: open_keys(
                OrderedAnswers(folder, seed=0).rows(), config=judge, curation=config.curation, examiner=ByText()
            ),
            build=lambda config, own: build_backend(config, folder=own, ranks=ranks),
            ranks=ranks,
            stop=StopSignal(launched=False),
        )
    except LargeKDError as error:
        return f"{type(error).__name__}: {error}"
    if not whole:
        return None
    return {key: verdict.outcome for key, verdict in stored_verdicts(folder, config=judge).items()}
