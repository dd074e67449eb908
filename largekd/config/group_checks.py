"""Rules that the learning-rate groups must keep, beyond those of each key."""

import re
from collections import Counter
from collections.abc import Iterator

from largekd.config.train import OptimConfig

DEFAULT_GROUP = "default"
"""The group of every parameter that no pattern claims."""

NO_DECAY_SUFFIX = ".no_decay"
"""What the name of a group's part without weight decay ends in."""

_OWN_NAMES = re.compile(r"\.(no_decay|embedding|layer_\d+|after_\d+)$")


def check_groups(optim: OptimConfig) -> Iterator[str]:
    """The rules that the groups break, one line each."""
    for name, count in Counter(group.name for group in optim.groups).items():
        if count > 1:
            yield f"optim.groups: the name {name!r} is used {count} times; names must differ"
    yield from _check_betas("optim.betas", optim.betas)
    for index, group in enumerate(optim.groups):
        key = f"optim.groups.{index}"
        if group.name == DEFAULT_GROUP or _OWN_NAMES.search(group.name):
            yield f"{key}.name = {group.name!r}: names a group, or a part of one, that is made anyway; choose another"
        try:
            re.compile(group.pattern)
        except re.error as error:
            yield f"{key}.pattern = {group.pattern!r}: not a regular expression ({error})"
        if group.betas is not None:
            yield from _check_betas(f"{key}.betas", group.betas)
    if optim.strict and not optim.groups:
        yield "optim.strict = true: without optim.groups every parameter would be an error; name groups"


def _check_betas(key: str, betas: tuple[float, float]) -> Iterator[str]:
    for index, beta in enumerate(betas):
        if not 0 <= beta < 1:
            yield f"{key}.{index} = {beta}: must be at least 0 and less than 1"
