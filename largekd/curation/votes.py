"""Votes of a row's samples: the answer that most of them agree on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Majority:
    """Groups of equal answers by their places in the row, the largest first; `winner` is None without a majority."""

    groups: tuple[tuple[int, ...], ...]
    winner: int | None
    why: str


def vote(answers: Sequence[str | None], *, same: Callable[[str, str], bool | None], agree_share: float) -> Majority:
    """The group that at least `agree_share` of all answers belong to; samples without an answer vote for none.

    An answer joins the first group whose first answer is the same; unknown counts as different. A tie of the largest
    groups, and a group of one among several samples, is no majority.
    """
    groups: list[list[int]] = []
    for place, answer in enumerate(answers):
        if answer is None:
            continue
        home = next((group for group in groups if _same(answers[group[0]], answer, same=same)), None)
        if home is None:
            groups.append([place])
        else:
            home.append(place)
    ordered = tuple(tuple(group) for group in sorted(groups, key=lambda group: -len(group)))
    return Majority(ordered, *_winner(ordered, samples=len(answers), agree_share=agree_share))


def _same(first: str | None, second: str, *, same: Callable[[str, str], bool | None]) -> bool:
    assert first is not None
    return first == second or same(first, second) is True


def _winner(groups: Sequence[Sequence[int]], *, samples: int, agree_share: float) -> tuple[int | None, str]:
    if not groups:
        return None, "no sample has an answer"
    if samples < 2:
        return None, "a single sample is no majority"
    largest = len(groups[0])
    if len(groups) > 1 and len(groups[1]) == largest:
        return (
            None,
            f"a tie of {sum(len(group) == largest for group in groups)} answers with {largest} of {samples} each",
        )
    if largest < 2 or largest < agree_share * samples:
        return None, f"only {largest} of {samples} samples agree"
    return 0, f"{largest} of {samples} samples agree"
