"""Whether an answer is right. What cannot be decided is unknown, never right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from largekd.config.curation import VerifyConfig
from largekd.curation.equality import Agreement, Options, Rule, choice, exact, numeric, options_of, symbolic
from largekd.curation.final_answers import find_answer
from largekd.curation.mathematics import Mathematics
from largekd.curation.records import Item, Parsed, Verdict
from largekd.curation.votes import vote
from largekd.sandbox.unit_tests import NO_TEST


class ProgramOutcome(Protocol):
    """How a program ended, as the sandbox reports it; `status` "ok" means that it came to its end."""

    @property
    def status(self) -> str: ...
    @property
    def stdout(self) -> str: ...


class TestsOutcome(Protocol):
    """Whether a program passed its tests, and what failed."""

    @property
    def passed(self) -> bool: ...
    @property
    def problems(self) -> Sequence[str]: ...


RunTests = Callable[[str, str], TestsOutcome]
"""run_tests(code, tests)."""


@dataclass(frozen=True)
class Means:
    """What verification needs from outside: a sandbox for kind `tests`, a process for kind `symbolic`."""

    run_tests: RunTests | None = None
    mathematics: Mathematics | None = None


def verify(
    parsed: Parsed,
    item: Item,
    *,
    config: VerifyConfig,
    program_result: ProgramOutcome | None = None,
    means: Means | None = None,
) -> Verdict:
    """The verdict on one answer by `config.kind`; of a majority, which one answer cannot have, see `verify_row`.

    program_result: how `parsed.program` ended, where `config.programs` had it run. `run`: its output is the answer;
    `must_agree`: where text and program both have an answer, they must also be the same, else the verdict is wrong;
    with kind `none` such an agreement is all there is, and counts as right.
    """
    means = means or Means()
    if config.kind == "tests":
        return _tested(parsed, item, run_tests=means.run_tests)
    answer, verdict = effective_answer(parsed, item, config=config, program_result=program_result, means=means)
    if verdict is not None:
        return verdict
    if config.kind in ("none", "majority"):
        return Verdict("unknown", config.kind, "nothing to compare with")
    if item.answer is None:
        return Verdict("unknown", config.kind, "the row has no right answer")
    if answer is None:
        return Verdict("unknown", config.kind, parsed.problem or "no answer")
    found = rule_of(config, item=item, means=means)(gold_of(item), answer)
    if found.same is None:
        return Verdict("unknown", config.kind, found.detail)
    return Verdict("right" if found.same else "wrong", config.kind, found.detail)


def verify_row(
    parsed: Sequence[Parsed],
    item: Item,
    *,
    config: VerifyConfig,
    program_results: Sequence[ProgramOutcome | None] | None = None,
    means: Means | None = None,
) -> list[Verdict]:
    """The verdicts on all samples of a row. With kind `majority` the answer of at least `agree_share` of them is right.

    Without a majority, or without an answer, a sample is unknown; the others of a row with a majority are wrong.
    """
    means = means or Means()
    results = program_results or [None] * len(parsed)
    if config.kind != "majority":
        pairs = zip(parsed, results, strict=True)
        return [verify(one, item, config=config, program_result=result, means=means) for one, result in pairs]
    found = [
        effective_answer(one, item, config=config, program_result=result, means=means)
        for one, result in zip(parsed, results, strict=True)
    ]
    answers = [answer if verdict is None or verdict.outcome == "right" else None for answer, verdict in found]
    rule = rule_of(config, item=item, means=means)
    majority = vote(answers, same=lambda first, other: rule(first, other).same, agree_share=config.agree_share)
    winners = set(majority.groups[majority.winner]) if majority.winner is not None else set()
    verdicts = []
    for place, (answer, verdict) in enumerate(found):
        if verdict is not None and verdict.outcome != "right":
            verdicts.append(verdict)
        elif answer is None or not winners:
            verdicts.append(Verdict("unknown", "majority", majority.why if answer else "no answer"))
        else:
            verdicts.append(Verdict("right" if place in winners else "wrong", "majority", majority.why))
    return verdicts


def rule_of(config: VerifyConfig, *, item: Item, means: Means) -> Rule:
    """The equality that `config.kind` asks for; of votes: choices, then numbers or formulas, then text."""
    options = options_of(item.fields)
    match config.kind:
        case "exact":
            return exact
        case "numeric":
            return partial(numeric, tolerance=config.tolerance)
        case "symbolic":
            assert means.mathematics is not None, "kind symbolic needs a process that compares formulas"
            return partial(symbolic, tolerance=config.tolerance, mathematics=means.mathematics)
        case "choice":
            return partial(choice, options=options)
        case _:
            return _either(config, options=options, mathematics=means.mathematics)


def _either(config: VerifyConfig, *, options: Options, mathematics: Mathematics | None) -> Rule:
    rules: list[Rule] = [partial(choice, options=options)] if options.texts else []
    if mathematics is not None:
        rules.append(partial(symbolic, tolerance=config.tolerance, mathematics=mathematics))
    else:
        rules.append(partial(numeric, tolerance=config.tolerance))

    def compare(gold: str, answer: str) -> Agreement:
        for rule in rules:
            found = rule(gold, answer)
            if found.same is not None:
                return found
        return exact(gold, answer)

    return compare


def _tested(parsed: Parsed, item: Item, *, run_tests: RunTests | None) -> Verdict:
    assert run_tests is not None, "kind tests needs a sandbox"
    if item.tests is None:
        return Verdict("unknown", "tests", "the row has no tests")
    if parsed.program is None:
        return Verdict("unknown", "tests", parsed.problem or "no program")
    found = run_tests(parsed.program, item.tests)
    if tuple(found.problems) == (NO_TEST,):
        return Verdict("unknown", "tests", NO_TEST)
    return Verdict("right" if found.passed else "wrong", "tests", "; ".join(found.problems)[:500])


def gold_of(item: Item) -> str:
    """The row's right answer; of a whole solution, as data sets have them, the part after #### or in \\boxed{}."""
    assert item.answer is not None
    for format in ("hashes", "boxed"):
        found = find_answer(item.answer, format=format, cut=False)
        if found is not None:
            return found.piece.of(item.answer)
    return item.answer


def output_answer(stdout: str) -> str | None:
    """The answer that a program printed: what its last line says, or marks as the answer; None without output."""
    lines = [line.strip() for line in stdout.splitlines() if line.strip()]
    if not lines:
        return None
    found = find_answer(lines[-1], format="auto", cut=False)
    return lines[-1] if found is None else found.piece.of(lines[-1])


def effective_answer(
    parsed: Parsed,
    item: Item,
    *,
    config: VerifyConfig,
    program_result: ProgramOutcome | None,
    means: Means,
) -> tuple[str | None, Verdict | None]:
    """The answer that counts, and a verdict where text and program have decided it among themselves."""
    if config.programs == "ignore" or parsed.program is None:
        return parsed.answer, None
    if program_result is None:
        return None, Verdict("unknown", "program", "it was not run")
    if program_result.status != "ok":
        return None, Verdict("wrong", "program", f"it ended with status {program_result.status}")
    printed = output_answer(program_result.stdout)
    if printed is None:
        return None, Verdict("wrong", "program", "it printed nothing")
    if config.programs == "run" or parsed.answer is None:
        return printed, None
    rule = _either(config, options=options_of(item.fields), mathematics=means.mathematics)
    agreement = rule(parsed.answer, printed)
    if agreement.same is None:
        return None, Verdict("unknown", "agreement", agreement.detail)
    if not agreement.same:
        return None, Verdict("wrong", "agreement", f"text and program disagree: {agreement.detail}")
    return printed, Verdict("right", "agreement", agreement.detail) if config.kind == "none" else None
